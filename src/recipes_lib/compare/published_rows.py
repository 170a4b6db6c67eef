"""Published values as a comparison shows them: beside our rows, and in rows of their own where only
they can compare two arms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.published import Published, PublishedNumber
from recipes_lib.compare.row import TableRow
from recipes_lib.compare.table import Score
from recipes_lib.compare.wording import metric_text

PUBLISHED_ALONE = "a published number without the items behind it can be tested against nothing"


def with_published(
    rows: Sequence[TableRow],
    scores: Sequence[Score],
    measurements: Measurements,
    published: Published,
) -> list[TableRow]:
    """Return the rows with published values beside them, and a row for each pair of arms of which
    one has published numbers alone.
    """

    def shown(arm: str, row: TableRow) -> str | None:
        # Win rates against the other arm itself were not published.
        number = None if row.head_to_head else published.beside(arm, row.metric)
        return None if number is None else number_text(number, row.unit)

    filled = [
        replace(row, published_first=shown(row.first, row), published_second=shown(row.second, row))
        for row in rows
    ]
    return [*filled, *_alone(rows, scores, measurements, published)]


def number_text(number: PublishedNumber, unit: str) -> str:
    """Return a published number in our unit, with its interval and n where they are known.

    Example:
        >>> number = PublishedNumber(
        ...     "r8", "t", "win", "win %", 85.0, "85.00", n=800, beside="a/win_rate", factor=0.01
        ... )
        >>> number_text(number, "share")
        '85.0% (n 800)'
    """
    limits = number.our_interval
    between = f" [{metric_text(limits[0], unit)}, {metric_text(limits[1], unit)}]" if limits else ""
    return f"{metric_text(number.ours, unit)}{between}" + (f" (n {number.n})" if number.n else "")


def _alone(
    rows: Sequence[TableRow],
    scores: Sequence[Score],
    measurements: Measurements,
    published: Published,
) -> Iterator[TableRow]:
    """Comparisons that only published numbers can make: of an arm without a run, or of two imported
    arms that one evaluation lacks. They are shown and not tested.
    """
    there = {(frozenset(row.arms), row.metric) for row in rows}
    alone = {name for name, arm in measurements.arms.items() if not arm.runs}
    foreign = alone
    for position, first in enumerate(measurements.arms):
        for second in list(measurements.arms)[:position]:
            pair = {first, second}
            for metric in _metrics(published, first, scores):
                known = metric in _metrics(published, second, scores)
                numbers = [published.beside(arm, metric) for arm in (first, second)]
                new = (frozenset(pair), metric) not in there and any(numbers)
                if (pair & alone or pair <= foreign) and known and new:
                    yield _row((first, second), metric, numbers, scores, published)


def _metrics(published: Published, arm: str, scores: Sequence[Score]) -> list[str]:
    """Metrics that an arm has, as a published number or a score of ours."""
    told = [number.beside for number in published.of(arm) if number.beside]
    return list(dict.fromkeys([*told, *(score.metric for score in scores if score.arm == arm)]))


def _row(
    arms: tuple[str, str],
    metric: str,
    numbers: Sequence[PublishedNumber | None],
    scores: Sequence[Score],
    published: Published,
) -> TableRow:
    """One comparison: like with like, so published values where both arms have one."""
    known = next((score for score in scores if score.metric == metric), None)
    unit = known.unit if known else "grade" if metric.endswith("grade") else "share"
    ours = {score.arm: score.value for score in reversed(scores) if score.metric == metric}
    values = [
        number.ours if number and (None not in numbers or ours.get(arm) is None) else ours.get(arm)
        for arm, number in zip(arms, numbers, strict=True)
    ]
    texts = [number_text(number, unit) if number else None for number in numbers]
    return TableRow(
        metric=metric,
        label=known.label if known else next(filter(None, numbers)).label,
        first=arms[0],
        second=arms[1],
        unit=unit,
        opponent=known.opponent if known else None,
        first_value=values[0],
        second_value=values[1],
        reason=PUBLISHED_ALONE,
        flags=("published numbers alone",),
        published_first=texts[0],
        published_second=texts[1],
        files=(published.path.name,),
    )
