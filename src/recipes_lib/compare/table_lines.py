"""A comparison for the terminal: aligned tables, one line per comparison, findings with their
remedy.
"""

from __future__ import annotations

from collections.abc import Sequence

from recipes_lib.compare.findings import Finding
from recipes_lib.compare.table import Score, TableRow
from recipes_lib.compare.wording import NONE, difference_text, interval_text, metric_text, p_text
from recipes_lib.core.terminal import aligned

HEAD = ("metric", "effect [95%]", "p (Holm)", "n", "verdict")


def pair_lines(rows: Sequence[TableRow]) -> list[str]:
    """Return the table of one pair of arms."""
    first, second = rows[0].arms
    table = [(HEAD[0], first, second, *HEAD[1:], "flags")]
    for row in rows:
        opponent = (
            " head to head"
            if row.head_to_head
            else f" against {row.opponent}"
            if row.opponent
            else ""
        )
        values = (metric_text(row.first_value, row.unit), metric_text(row.second_value, row.unit))
        open_items = (
            f" ({row.tested.unresolved} open)" if row.tested and row.tested.unresolved else ""
        )
        verdict = (
            f"{row.verdict} (no claim)"
            if row.stopped and row.verdict != "cannot be tested"
            else row.verdict
        )
        n = f"{row.n:,}{open_items}" if row.tested else NONE
        limits = effect_interval(row)
        effect = effect_value(row) + (f" {limits}" if limits != NONE else "")
        table.append(
            (
                row.label + opponent,
                *values,
                effect,
                p_text(row.p_holm).removeprefix("p ").removeprefix("= "),
                n,
                verdict,
                ", ".join(row.flags),
            )
        )
    return [f"{first} against {second}", *(f"  {line}" for line in aligned(table))]


def effect_value(row: TableRow) -> str:
    """Return a row's effect: a win rate head to head, else the difference."""
    text = metric_text if row.head_to_head else difference_text
    return text(row.effect[0], row.unit)


def effect_interval(row: TableRow) -> str:
    """Return the interval of a row's effect."""
    return interval_text(*row.effect[1:], row.unit, signed=not row.head_to_head)


def score_lines(scores: Sequence[Score]) -> list[str]:
    """Return the scores of arms that have nothing to be compared with."""
    table = [("run", "metric", "value [95%]", "n", "without a verdict")]
    for score in scores:
        opponent = f" against {score.opponent}" if score.opponent else ""
        limits = interval_text(score.low, score.high, score.unit, signed=False)
        value = f"{metric_text(score.value, score.unit)} {limits}"
        table.append(
            (score.arm, score.label + opponent, value, f"{score.n:,}", str(score.unresolved))
        )
    return aligned(table)


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Return the findings, errors first; the evidence is in the report and in --json."""
    lines = [""] if findings else []
    for finding in findings:
        lines.append(
            f"{finding.severity}: {finding.title}"
            + (f" ({', '.join(finding.arms)})" if finding.arms else "")
        )
        if finding.severity != "note" and finding.remedy:
            lines.append(f"  {finding.remedy}")
    return lines
