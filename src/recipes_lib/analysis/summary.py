"""A conclusion as lines of text: what the terminal shows, and report.md."""

from __future__ import annotations

from recipes_lib.analysis.claims import Claim, Conclusion, effect_text, limits_text, where_text
from recipes_lib.analysis.text import NONE, interval_text, metric_text, p_text
from recipes_lib.core.terminal import aligned, printable


def conclusion_lines(conclusion: Conclusion) -> list[str]:
    """Return the answer, what cannot be said, the table by pairs of arms, and the findings."""
    lines = [printable(sentence) for sentence in conclusion.answer]
    if not conclusion.claims:
        lines = score_lines(conclusion)
    if conclusion.cannot_say:
        lines += ["", "What cannot be said:"]
        lines += [f"- {printable(line)}" for line in conclusion.cannot_say]
    for (first, second), claims in conclusion.pairs.items():
        lines += ["", f"{first} against {second}", *pair_lines(claims)]
    lines += [""] if conclusion.findings else []  # their evidence is in the report and in --json
    for finding in conclusion.findings:
        lines.append(f"{finding.severity}: {printable(finding.title)}")
        if finding.severity != "note" and finding.remedy:
            lines.append(f"  {printable(finding.remedy)}")
    return lines


def pair_lines(claims: list[Claim]) -> list[str]:
    """Return the table of one pair of arms."""
    first, second = claims[0].row.arms
    table = [("metric", first, second, "effect [95%]", "p (Holm)", "n", "verdict", "")]
    for claim in claims:
        row = claim.row
        unresolved = f" ({row.test.unresolved} open)" if row.test and row.test.unresolved else ""
        p = p_text(row.p).removeprefix("p ").removeprefix("= ") if row.is_tested else NONE
        table.append(
            (
                where_text(row) + " (primary)" * row.primary,
                metric_text(row.first_value, row.unit),
                metric_text(row.second_value, row.unit),
                f"{effect_text(row)} {limits_text(row)}".strip(),
                p,
                f"{row.n:,}{unresolved}" if row.test else NONE,
                claim.says,
                ", ".join(row.flags),
            )
        )
    return [f"  {line}".rstrip() for line in aligned(table)]


def score_lines(conclusion: Conclusion) -> list[str]:
    """Return the scores of arms that have nothing to be compared with."""
    table = [("run", "metric", "value [95%]", "n", "without a verdict")]
    for score in conclusion.table.scores:
        opponent = f" against {score.opponent}" if score.opponent else ""
        limits = interval_text(score.interval, score.unit, signed=False)
        value = f"{metric_text(score.value, score.unit)} {limits}".removesuffix(f" {NONE}")
        table.append(
            (score.arm, score.label + opponent, value, f"{score.n:,}", str(score.unresolved))
        )
    return aligned(table)


def report_markdown(conclusion: Conclusion) -> str:
    """Return report.md: the question, the answer, and the table as it stands in the terminal."""
    body = "\n".join(f"    {line}".rstrip() for line in conclusion_lines(conclusion))
    return f"# {' '.join(printable(conclusion.question).split())}\n\n{body}\n"
