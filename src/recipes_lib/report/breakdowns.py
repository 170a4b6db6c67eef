"""Win rates and grades by category and by answer length: description, never a test."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.table import scale_of, source_of
from recipes_lib.eval_log import Measure, Sample
from recipes_lib.statistics.intervals import Interval, mean_interval, wilson

MAX_CATEGORIES = 12
LENGTHS = ("under half", "half to 0.8", "0.8 to 1.25", "1.25 to 2", "over twice")
_EDGES = (0.5, 0.8, 1.25, 2.0)


@dataclass(frozen=True)
class Cell:
    """One arm in one group."""

    arm: str
    group: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    unresolved: int
    file: str


@dataclass(frozen=True)
class Breakdown:
    """One metric by category, or by how long the answer is beside its opponent's."""

    kind: str  # "category" or "length"
    metric: str
    title: str
    unit: str
    groups: tuple[str, ...]
    arms: tuple[str, ...]
    cells: tuple[Cell, ...]

    def cell(self, arm: str, group: str) -> Cell | None:
        """Return one arm in one group, or None where it has no item."""
        return next((cell for cell in self.cells if cell.arm == arm and cell.group == group), None)


def breakdowns(measurements: Measurements) -> list[Breakdown]:
    """Return every metric whose items have several categories, and win rates by length."""
    groups: dict[tuple[str, str | None], dict[str, list[Measure]]] = {}
    for name, arm in measurements.arms.items():
        for run in arm.runs:
            for measure in run.measures():
                if measure.samples and measure.suite != "lm_eval":
                    opponent = measurements.opponent_name(measure.opponent)
                    groups.setdefault((measure.name, opponent), {}).setdefault(name, []).append(
                        measure
                    )
    found = []
    for (_, opponent), arms in groups.items():
        one = next(iter(arms.values()))[0]
        title = f"{one.label} against {opponent}" if opponent else one.label
        categories = _ranked(
            item.category
            for measures in arms.values()
            for measure in measures
            for item in measure.samples
        )
        if len(categories) > 1:
            keep = set(categories[:MAX_CATEGORIES])
            names = [
                *categories[:MAX_CATEGORIES],
                *(["all others"] if len(categories) > MAX_CATEGORIES else []),
            ]
            found.append(_breakdown("category", title, one, names, arms, partial(_kept, keep=keep)))
        if one.metric == "win_rate" and any(len(item.lengths) == 2 for item in one.samples):
            found.append(_breakdown("length", title, one, list(LENGTHS), arms, length_group))
    return found


def _kept(item: Sample, *, keep: set[str]) -> str:
    return item.category if item.category in keep else "all others"


def _ranked(categories: Iterable[str]) -> list[str]:
    """Categories, the most frequent first; those equally frequent by name."""
    counts: dict[str, int] = {}
    for category in categories:
        counts[category] = counts.get(category, 0) + 1
    return sorted(counts, key=lambda name: (-counts[name], name))


def length_group(item: Sample) -> str:
    """Return the group of an item by the ratio of its answer's length to its opponent's; nothing
    where one is empty or unknown.

    Example:
        >>> length_group(Sample("q", 1, "c", 1.0, "win", lengths=(100, 100))), length_group(Sample("q", 1, "c", 1.0, "win", lengths=(0, 9)))
        ('0.8 to 1.25', '')
    """  # noqa: E501
    if len(item.lengths) != 2 or min(item.lengths) == 0:
        return ""
    ratio = item.lengths[0] / item.lengths[1]
    return LENGTHS[sum(ratio > edge for edge in _EDGES)]


def _breakdown(
    kind: str,
    title: str,
    one: Measure,
    groups: list[str],
    arms: dict[str, list[Measure]],
    group_of: Callable[[Sample], str],
) -> Breakdown:
    cells = []
    scale = scale_of(one.metric, one.unit) or (-math.inf, math.inf)
    for arm, measures in arms.items():
        by_group: dict[str, list[Sample]] = {}
        for measure in measures:
            for item in measure.samples:
                by_group.setdefault(group_of(item), []).append(item)
        cells += [
            _cell(arm, group, by_group[group], source_of(measures[0]), scale)
            for group in groups
            if group in by_group
        ]
    return Breakdown(kind, one.name, title, one.unit, tuple(groups), tuple(arms), tuple(cells))


def _cell(arm: str, group: str, items: list[Sample], file: str, scale: tuple[float, float]) -> Cell:
    known = [item for item in items if item.value is not None]
    interval = _interval(known).within(*scale)
    return Cell(
        arm,
        group,
        interval.estimate,
        interval.low,
        interval.high,
        len(items),
        len(items) - len(known),
        file,
    )


def _interval(items: list[Sample]) -> Interval:
    """Wilson where the values are 0 and 1, one per question; the bootstrap over questions
    otherwise; no limits where all values agree.

    Several seeds or turns of one question are one cluster: repeating a question does not make the
    interval narrower.
    """
    values = [item.value for item in items if item.value is not None]
    if values and set(values) <= {0.0, 1.0} and len({item.id for item in items}) == len(values):
        return wilson(int(sum(values)), len(values))
    interval = mean_interval(values, [item.id for item in items] if items else None, resamples=1000)
    if interval.method == "zero variance":
        return Interval(interval.estimate, None, None, interval.n, interval.method)
    return interval
