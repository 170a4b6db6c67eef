"""A comparison for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from recipes_lib.compare.answers import ANSWERS_HEAD, AnswerCounts, AnswerDifference
from recipes_lib.compare.claims import Comparison
from recipes_lib.compare.findings import Finding
from recipes_lib.compare.row import TableRow
from recipes_lib.compare.table import Score
from recipes_lib.compare.wording import NONE, interval_text, metric_text, p_text
from recipes_lib.core.terminal import aligned

HEAD = ("metric", "effect [95%]", "p (Holm)", "n", "verdict")


def comparison_lines(comparison: Comparison) -> list[str]:
    """Return the answer, the table by pairs of arms, the scores of a single run, the findings."""
    rows = comparison.rows
    lines = list(comparison.answer) if rows else score_lines(comparison.scores)
    for pair in dict.fromkeys(row.arms for row in rows):
        lines += ["", *pair_lines([row for row in rows if row.arms == pair])]
    lines += answer_lines(comparison.answers)
    lines += answer_difference_lines(comparison.answer_differences)
    if comparison.looks:
        lines += ["", comparison.looks.sentence]
    if comparison.relabelling:
        lines += ["", comparison.relabelling.sentence]
    return [*lines, *finding_lines(comparison.findings)]


def pair_lines(rows: Sequence[TableRow]) -> list[str]:
    """Return the table of one pair of arms."""
    first, second = rows[0].arms
    table = [(HEAD[0], first, second, *HEAD[1:], "flags")]
    for row in rows:
        unresolved = row.tested.unresolved if row.tested else 0
        open_items = f" ({unresolved} open)" if unresolved else ""
        table.append(
            (
                f"{row.label} {row.against}".rstrip(),
                metric_text(row.first_value, row.unit),
                metric_text(row.second_value, row.unit),
                row.effect + (f" {row.limits}" if row.limits != NONE else ""),
                p_text(row.p_holm).removeprefix("p ").removeprefix("= "),
                f"{row.n:,}{open_items}" if row.tested else NONE,
                row.shown_verdict if row.claimed else f"{row.shown_verdict} (no claim)",
                ", ".join(row.flags),
            )
        )
    return [f"{first} against {second}", *(f"  {line}" for line in aligned(table))]


def score_lines(scores: Sequence[Score]) -> list[str]:
    """Return the scores of arms that have nothing to be compared with."""
    table = [("run", "metric", "value [95%]", "n", "without a verdict")]
    for one in scores:
        opponent = f" against {one.opponent}" if one.opponent else ""
        limits = interval_text(one.low, one.high, one.unit, signed=False)
        value = f"{metric_text(one.value, one.unit)} {limits}"
        table.append((one.arm, one.label + opponent, value, f"{one.n:,}", str(one.unresolved)))
    return aligned(table)


def answer_lines(answers: Sequence[AnswerCounts]) -> list[str]:
    """Return what is wrong with the arms' answers, evaluation by evaluation."""
    table = [("answers of", "run", *ANSWERS_HEAD)]
    table += [(one.eval, one.arm, *one.cells) for one in answers]
    return ["", *aligned(table)] if answers else []


def answer_difference_lines(differences: Sequence[AnswerDifference]) -> list[str]:
    """Return what the arms' shares of faulty answers differ by."""
    table = [("answers of", "runs", "are", "difference [95%]", "questions")]
    table += [
        (one.eval, f"{one.first} against {one.second}", one.what, one.text, f"{one.questions:,}")
        for one in differences
    ]
    return ["", *aligned(table), "described, not tested"] if differences else []


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Return the findings, errors first; the evidence is in the report and in --json."""
    lines = [""] if findings else []
    for one in findings:
        arms = f" ({', '.join(one.arms)})" if one.arms else ""
        lines.append(f"{one.severity}: {one.title}{arms}")
        if one.severity != "note" and one.remedy:
            lines.append(f"  {one.remedy}")
    return lines
