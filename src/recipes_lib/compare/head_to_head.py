"""Rows of arms whose answers were judged against each other's: the effect is a win rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.row import (
    HALF,
    PairedItems,
    TableRow,
    files_of,
    measures_of,
    source_of,
    too_few,
    values_of,
    with_human,
)
from recipes_lib.compare.wording import count, metric_text
from recipes_lib.eval_log import Measure


@dataclass(frozen=True, kw_only=True)
class HeadToHeadRow(TableRow):
    """A comparison whose tested difference is the first arm's win rate minus a half."""

    signed: ClassVar[bool] = False
    unit: str = "share"
    head_to_head: bool = True

    @property
    def against(self) -> str:
        """What stands behind the metric's label."""
        return "head to head"

    @property
    def where(self) -> str:
        """The metric, in a sentence."""
        return f"{self.label}, head to head"

    @property
    def largest(self) -> float:
        """The largest difference from a half."""
        return HALF

    def shown(self, effect: float | None) -> float | None:
        """Return a difference from a half as a win rate."""
        return None if effect is None else HALF + effect

    @property
    def effect(self) -> str:
        """The win rate as text."""
        return metric_text(self.first_value, self.unit)

    @property
    def words(self) -> str:
        """What stands before the effect in a sentence."""
        return "win rate"


def head_to_head_rows(measurements: Measurements, first: str, second: str) -> Iterator[TableRow]:
    """Yield the comparisons in which one arm's answers were judged against the other's."""
    seen = set()
    for arms in ((first, second), (second, first)):
        for (key, opponent), measures in measures_of(measurements, arms[0]).items():
            if opponent != arms[1] or key in seen:
                continue
            seen.add(key)
            kept = _judged_once(measures, measurements, arms)
            values, items = values_of(kept)
            human, _ = values_of(kept, human=True)
            if arms[0] != first:
                values, human = 1 - values, 1 - human
            half = np.full((1, len(items)), HALF)
            paired = PairedItems(values, half, items, (0.0, 1.0), HALF, versus=True)
            tested = paired.tested()
            rate, rest = paired.means(tested)
            seeds = f"{count(len(kept), 'seed')} of {len(measures)}"
            row = HeadToHeadRow(
                metric=kept[0].name,
                label=kept[0].label,
                first=first,
                second=second,
                first_value=rate,
                second_value=rest,
                tested=tested,
                reason=too_few(tested),
                flags=(seeds,) if len(kept) < len(measures) else (),
                files=files_of(kept),
                measures=tuple(kept),
                paired=paired,
            )
            yield with_human(row, human)


def _judged_once(
    measures: Sequence[Measure], measurements: Measurements, arms: tuple[str, str]
) -> list[Measure]:
    """The measures in which no training stands twice: two seeds against one training are not two
    pairs of seeds. `arms` are the arm whose answers were judged, and its opponent.
    """
    kept: list[Measure] = []
    seen: set[tuple[int, str]] = set()
    for measure in measures:
        runs = (source_of(measure).split("/", 1)[0], str(measure.opponent))
        trained = {
            (side, run)
            for side, (run, arm) in enumerate(zip(runs, arms, strict=True))
            if not measurements.arms[arm].is_base
        }
        if not trained & seen:
            seen |= trained
            kept.append(measure)
    return kept
