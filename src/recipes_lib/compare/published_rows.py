"""Published values as a comparison shows them: beside our rows, and in rows of their own where only
they can compare two arms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.published import Published, PublishedNumber
from recipes_lib.compare.table import Score, TableRow
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
    filled = [
        dataclasses.replace(
            row,
            published_first=_shown(published, row.first, row),
            published_second=_shown(published, row.second, row),
        )
        for row in rows
    ]
    return [*filled, *_alone(rows, scores, measurements, published)]


def _shown(published: Published, arm: str, row: TableRow) -> str | None:
    """An arm's published value beside a row: win rates against the other arm itself were not
    published.
    """
    number = None if row.head_to_head else published.beside(arm, row.metric)
    return None if number is None else number_text(number, row.unit)


def number_text(number: PublishedNumber, unit: str) -> str:
    """Return a published number in our unit, with its interval and n where they are known.

    Example:
        >>> number_text(PublishedNumber("r8", "t", "win", "win %", 85.0, "85.00", n=800, beside="a/win_rate", factor=0.01), "share")
        '85.0% (n 800)'
    """  # noqa: E501
    limits = number.our_interval
    between = f" [{metric_text(limits[0], unit)}, {metric_text(limits[1], unit)}]" if limits else ""
    return f"{metric_text(number.ours, unit)}{between}" + (f" (n {number.n})" if number.n else "")


def _alone(
    rows: Sequence[TableRow],
    scores: Sequence[Score],
    measurements: Measurements,
    published: Published,
) -> list[TableRow]:
    """Comparisons that only published numbers can make: of an arm without a run, or of two imported
    arms that one evaluation lacks.
    """
    there = {(frozenset(row.arms), row.metric) for row in rows}
    names = list(measurements.arms)
    foreign = {name for name, arm in measurements.arms.items() if arm.imported or not arm.runs}
    alone = {name for name in names if not measurements.arms[name].runs}
    pairs = [(first, second) for position, first in enumerate(names) for second in names[:position]]
    pairs = [pair for pair in pairs if set(pair) & alone or set(pair) <= foreign]
    found = [
        _row(first, second, metric, scores, published)
        for first, second in pairs
        for metric in _metrics(published, first, second, scores)
        if (frozenset((first, second)), metric) not in there
    ]
    return [row for row in found if row is not None]


def _metrics(published: Published, first: str, second: str, scores: Sequence[Score]) -> list[str]:
    """Metrics that both have, as a published number or a score of ours."""
    have = [
        [
            *(number.beside for number in published.of(arm) if number.beside),
            *(score.metric for score in scores if score.arm == arm),
        ]
        for arm in (first, second)
    ]
    return [name for name in dict.fromkeys(have[0]) if name in have[1]]


def _row(
    first: str, second: str, metric: str, scores: Sequence[Score], published: Published
) -> TableRow | None:
    """One comparison that is shown and not tested: like with like, so published values where both
    arms have one.
    """
    known = next((score for score in scores if score.metric == metric), None)
    numbers = [published.beside(arm, metric) for arm in (first, second)]
    told = next((number for number in numbers if number is not None), None)
    if told is None:
        return None
    unit = known.unit if known else "grade" if metric.endswith("grade") else "share"
    values, texts = [], []
    for arm, number in zip((first, second), numbers, strict=True):
        ours = next(
            (score.value for score in scores if score.arm == arm and score.metric == metric), None
        )
        values.append(number.ours if number and (None not in numbers or ours is None) else ours)
        texts.append(number_text(number, unit) if number else None)
    return TableRow(
        metric=metric,
        label=known.label if known else told.label,
        first=first,
        second=second,
        unit=unit,
        head_to_head=False,
        opponent=known.opponent if known else None,
        higher_is_better=True,
        first_value=values[0],
        second_value=values[1],
        tested=None,
        reason=PUBLISHED_ALONE,
        flags=("published numbers alone",),
        published_first=texts[0],
        published_second=texts[1],
        files=(published.path.name,),
    )
