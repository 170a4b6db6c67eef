"""Rows of arms that were asked the same items: the effect is the difference of their values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.row import (
    PairedItems,
    TableRow,
    fewest_draws,
    files_of,
    filling_of,
    measures_of,
    reported,
    scale_of,
    too_few,
    values_of,
    with_draws,
    with_human,
)
from recipes_lib.compare.wording import count
from recipes_lib.eval_log import Measure

DIRECTION_UNKNOWN = "direction unknown, its files do not say whether more or less of it is better"


def side_by_side_rows(measurements: Measurements, first: str, second: str) -> Iterator[TableRow]:
    """Yield the comparisons of the same items of both arms, paired; those that went through one of
    the two, or stand head to head, are left out.
    """
    ours, theirs = (measures_of(measurements, name) for name in (first, second))
    direct = {key for key, opponent in ours if opponent == second}
    direct |= {key for key, opponent in theirs if opponent == first}
    trained = not any(measurements.arms[name].is_base for name in (first, second))
    both = {(key[0], key[2]) for key, _ in ours.keys() & theirs.keys()}  # eval and metric
    for (key, opponent), mine in ours.items():
        other = theirs.get((key, opponent))
        through_an_arm = opponent in measurements.arms
        if (key[0], mine[0].instead_of) in both:
            continue  # the same question again
        if other and not (through_an_arm and (key in direct or opponent in (first, second))):
            yield _row((first, second), opponent, mine, other, trained)


def _row(
    arms: tuple[str, str],
    opponent: str | None,
    mine: Sequence[Measure],
    other: Sequence[Measure],
    trained: bool,
) -> TableRow:
    """One comparison; a turn that only one arm has is unresolved where the question is in both."""
    flags = []
    if len(mine) != len(other) and (trained or 1 not in (len(mine), len(other))):
        # One training repeated beside several would hide how much another of its seeds would have
        # differed. A base has no seeds to differ.
        fewer = min(len(mine), len(other))
        flags.append(f"{count(fewer, 'seed')} of {len(mine)} and {len(other)}")
        mine, other = mine[:fewer], other[:fewer]
    draws = fewest_draws(mine), fewest_draws(other)
    if draws[0] != draws[1]:
        kept = count(min(draws), "answer")
        flags.append(f"{kept} per question of {draws[0]} and {draws[1]}")
        mine, other = (with_draws(arm, min(draws)) for arm in (mine, other))
    one, measures = mine[0], (*mine, *other)
    unit = one.unit if {measure.unit for measure in measures} == {one.unit} else "number"
    asked = [{item.key for measure in arm for item in measure.samples} for arm in (mine, other)]
    questions = {key[0] for key in asked[0]} & {key[0] for key in asked[1]}
    (a, items), (b, _) = (values_of(arm, measures, questions) for arm in (mine, other))
    paired, tested, reason = None, None, "only totals are known, not the items behind them"
    if items:
        low, high = scale_of(one.metric, unit) or (0.0, math.inf)
        scale = filling_of(one.metric, unit, np.concatenate([a.ravel(), b.ravel()]))
        paired = PairedItems(a, b, items, scale, high - low)
        tested = paired.tested()
        reason = too_few(tested)
    elif all(asked):
        reason = "the two arms answered different questions"
    # The values that the difference is of; `Score` has each arm's own.
    values = paired.means(tested) if paired and tested else (reported(mine), reported(other))
    if 0 < len(items) < max(map(len, asked)):
        flags.insert(0, f"{len(items)} common items of {max(map(len, asked))}")
    if tested and tested.effect and tested.low is None:
        flags.insert(0, "every item differs by the same: no interval, so no claim")
    directions = {measure.higher_is_better for measure in measures}
    direction = directions.pop() if len(directions) == 1 else None
    row = TableRow(
        metric=one.name,
        label=one.label,
        first=arms[0],
        second=arms[1],
        unit=unit,
        opponent=opponent,
        higher_is_better=direction,
        first_value=values[0],
        second_value=values[1],
        tested=tested,
        reason=reason or (DIRECTION_UNKNOWN if direction is None else ""),
        flags=tuple(flags),
        files=files_of(measures),
        measures=measures,
        paired=paired,
    )
    human = (values_of(arm, measures, questions, human=True)[0] for arm in (mine, other))
    return with_human(row, *human)
