"""A conclusion as lines: what the terminal prints."""

from recipes_lib.analysis.claims import Claim, Conclusion
from recipes_lib.analysis.row_text import confidence_text, effect_text, limits_text, where_text
from recipes_lib.analysis.table import TestedTable
from recipes_lib.analysis.text import NONE, interval_text, metric_text, p_text
from recipes_lib.core.terminal import aligned, count, printable
from recipes_lib.stats import OTHER_SHARE, PRIMARY_SHARE


def conclusion_lines(conclusion: Conclusion) -> list[str]:
    """Return the answer, what cannot be said, the table by pairs of arms, and the findings."""
    lines = conclusion.answer if conclusion.claims else aligned(score_rows(conclusion))
    if conclusion.cannot_say:
        lines += ["", "What cannot be said:"]
        lines += [f"- {line}" for line in conclusion.cannot_say]
    for (first, second), claims in conclusion.pairs.items():
        lines += ["", f"{first} against {second}"]
        lines += [f"  {line}".rstrip() for line in aligned(pair_rows(claims))]
    if conclusion.claims and not conclusion.descriptive:
        lines += ["", table_of_tests(conclusion.table)]
    if conclusion.findings:
        lines.append("")
    for finding in conclusion.findings:
        lines.append(f"{finding.severity}: {finding.title}")
        if finding.severity != "note" and finding.remedy:
            lines.append(f"  {finding.remedy}")  # --json has the evidence
    # a name with a new line could else write a sentence of its own
    return [printable(line.replace("\n", " ")) for line in lines]


def table_of_tests(table: TestedTable) -> str:
    """Return how many tests are corrected together, and at which level."""
    primaries = sum(row.is_counted and row.primary for row in table.rows)
    others = table.tests - primaries
    level = f"{100 * table.alpha:g}%"
    if table.tests < 2:
        return f"{count(table.tests, 'test')}, at {level}."
    if not primaries or not others:
        return f"{table.tests} tests, corrected together (Holm), at {level}."
    return (
        f"{table.tests} tests, corrected together (Holm):"
        f" {primaries} of the primary metric at {100 * table.alpha * PRIMARY_SHARE:g}%,"
        f" {count(others, 'other')} at {100 * table.alpha * OTHER_SHARE:g}%."
    )


def effect_title(alpha: float) -> str:
    """Return the head of a column of effects: an interval speaks of its own row, p is corrected."""
    return f"effect [{confidence_text(alpha)}, not corrected]"


def pair_rows(claims: list[Claim]) -> list[tuple[str, ...]]:
    """Return the cells of the table of one pair of arms, its head first."""
    first, second = claims[0].row.arms
    effect = effect_title(claims[0].row.alpha)
    head = ("metric", first, second, effect, "p (Holm)", "n", "verdict", "")
    table: list[tuple[str, ...]] = [head]
    for claim in claims:
        row = claim.row
        metric = where_text(row)
        if row.primary:
            metric += " (primary)"
        items = NONE
        if row.test:
            items = f"{row.n:,}"
            if row.test.unresolved:
                items += f" ({row.test.unresolved} open)"
        p = NONE
        if row.is_counted:
            p = p_text(row.p).removeprefix("p ").removeprefix("= ")
        table.append(
            (
                metric,
                metric_text(row.first_value, row.unit),
                metric_text(row.second_value, row.unit),
                f"{effect_text(row)} {limits_text(row)}".strip(),
                p,
                items,
                claim.says,
                ", ".join(filter(None, (*row.flags, row.why_not))),
            )
        )
    return table


def score_rows(conclusion: Conclusion) -> list[tuple[str, ...]]:
    """Return the cells of the scores of arms that have nothing to be compared with, head first."""
    table: list[tuple[str, ...]] = [("run", "metric", "value [95%]", "n", "without a verdict")]
    for score in conclusion.table.scores:
        metric = score.label
        if score.opponent:
            metric += f" against {score.opponent}"
        limits = interval_text(score.interval, score.unit, signed=False)
        value = f"{metric_text(score.value, score.unit)} {limits}".removesuffix(f" {NONE}")
        table.append((score.arm, metric, value, f"{score.n:,}", str(score.unresolved)))
    return table
