"""Win rates and grades by category and by answer length: description, never a test."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.row import scale_of, source_of
from recipes_lib.eval_log import Measure, Sample
from recipes_lib.report.numbers import Number
from recipes_lib.statistics.intervals import Interval, mean_interval, wilson

MAX_CATEGORIES = 12
LENGTHS = ("under half", "half to 0.8", "0.8 to 1.25", "1.25 to 2", "over twice")
_EDGES = (0.5, 0.8, 1.25, 2.0)
_OTHERS = "all others"


@dataclass(frozen=True)
class Breakdown:
    """One metric by category, or by how long the answer is beside its opponent's; one number for
    each arm and group that has an item.
    """

    kind: str  # "category" or "length"
    title: str
    unit: str
    groups: tuple[str, ...]
    arms: tuple[str, ...]
    cells: tuple[Number, ...]


def breakdowns(measurements: Measurements) -> list[Breakdown]:
    """Return every metric whose items have several categories, and win rates by length."""
    by_metric: dict[tuple[str, str | None], dict[str, list[Measure]]] = {}
    for name, arm in measurements.arms.items():
        for measure in (measure for run in arm.runs for measure in run.measures()):
            if measure.samples and measure.suite != "lm_eval":
                key = (measure.name, measurements.opponent_name(measure.opponent))
                by_metric.setdefault(key, {}).setdefault(name, []).append(measure)
    found = []
    for (_, opponent), arms in by_metric.items():
        one = next(iter(arms.values()))[0]
        title = f"{one.label} against {opponent}" if opponent else one.label
        counts = Counter(
            item.category
            for measures in arms.values()
            for measure in measures
            for item in measure.samples
        )
        categories = sorted(counts, key=lambda name: (-counts[name], name))
        if len(categories) > 1:
            names = categories[:MAX_CATEGORIES]
            groups = names if names == categories else [*names, _OTHERS]
            found.append(_breakdown("category", title, groups, arms, partial(_kept, names=names)))
        if one.metric == "win_rate" and any(len(item.lengths) == 2 for item in one.samples):
            found.append(_breakdown("length", title, LENGTHS, arms, length_group))
    return found


def _kept(item: Sample, names: list[str]) -> str:
    return item.category if item.category in names else _OTHERS


def length_group(item: Sample) -> str:
    """Return the group of an item by the ratio of its answer's length to its opponent's; nothing
    where one is empty or unknown.

    Example:
        >>> one = Sample("q", 1, "c", 1.0, "win", lengths=(100, 100))
        >>> length_group(one), length_group(Sample("q", 1, "c", 1.0, "win", lengths=(0, 9)))
        ('0.8 to 1.25', '')
    """
    if len(item.lengths) != 2 or min(item.lengths) == 0:
        return ""
    ratio = item.lengths[0] / item.lengths[1]
    return LENGTHS[sum(ratio > edge for edge in _EDGES)]


def _breakdown(
    kind: str,
    title: str,
    groups: list[str] | tuple[str, ...],
    arms: dict[str, list[Measure]],
    group_of: Callable[[Sample], str],
) -> Breakdown:
    one = next(iter(arms.values()))[0]
    scale = scale_of(one.metric, one.unit) or (-math.inf, math.inf)
    cells = []
    for arm, measures in arms.items():
        by_group: dict[str, list[Sample]] = {}
        for item in (item for measure in measures for item in measure.samples):
            by_group.setdefault(group_of(item), []).append(item)
        for group in (group for group in groups if group in by_group):
            known = [item for item in by_group[group] if item.value is not None]
            interval = _interval(known).within(*scale)
            cells.append(
                Number(
                    kind=f"by {kind}",
                    metric=one.name,
                    arm=arm,
                    group=group,
                    unit=one.unit,
                    value=interval.estimate,
                    low=interval.low,
                    high=interval.high,
                    n=len(by_group[group]),
                    unresolved=len(by_group[group]) - len(known),
                    file=source_of(measures[0]),
                )
            )
    return Breakdown(kind, title, one.unit, tuple(groups), tuple(arms), tuple(cells))


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
