"""The table of a study: every arm's score with its interval, and every pair of arms on every metric
that both have, tested.

No sentence is written here (`claims` does that) and no file read (`measurements` did). A pair of
arms that was judged head to head is tested on those verdicts; otherwise the two arms' items are
paired by question and turn.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recipes_lib.compare.measurements import ArmMeasurements, Measurements
from recipes_lib.compare.wording import count
from recipes_lib.eval_log import Measure, Sample
from recipes_lib.statistics.corrections import holm
from recipes_lib.statistics.intervals import Interval, mean_interval, wilson
from recipes_lib.statistics.seeds import crossed_interval, question_means
from recipes_lib.statistics.unresolved import Tested, compare

TestVerdict = Literal["better", "worse", "no difference shown", "cannot be tested"]
ALPHA = 0.05
FEWEST_QUESTIONS = 6  # five questions that all agree give p = 0.0625
DIRECTION_UNKNOWN = "direction unknown, its files do not say whether more or less of it is better"
HALF = 0.5  # a win rate against the other arm itself that favours nobody
_SCALES = {
    "share": (0.0, 1.0),
    "grade": (1.0, 5.0),
    "grade_1_10": (1.0, 10.0),
}  # by the last word of a metric, else by its unit


@dataclass(frozen=True)
class Score:
    """One arm on one metric: the mean over its items and seeds with its interval, and the bounds
    that unresolved items leave.
    """

    arm: str
    metric: str
    label: str
    opponent: str | None
    unit: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    seeds: int
    unresolved: int
    lowest: float | None
    highest: float | None
    method: str
    higher_is_better: bool | None = True
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class TableRow:
    """One comparison: `difference` is first minus second in the metric's own direction, so positive
    favours the first arm only where `higher_is_better` (None: not known, so nothing is ranked).
    Head to head it is the first arm's win rate minus a half.

    `verdict` and `sentence` come from `claims`; `stopped` holds the titles of the findings that
    stop the claim, `because` the clause of the sentence that gives the reasons, so that a page can
    give them once.
    """

    metric: str
    label: str
    first: str
    second: str
    unit: str
    head_to_head: bool
    opponent: str | None
    higher_is_better: bool | None
    first_value: float | None
    second_value: float | None
    tested: Tested | None
    p_holm: float | None = None
    mde: float | None = None
    needed: int | None = None
    reason: str = ""
    verdict: TestVerdict = "cannot be tested"
    sentence: str = ""
    because: str = ""
    stopped: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    published_first: str | None = None
    published_second: str | None = None
    files: tuple[str, ...] = ()
    measures: tuple[Measure, ...] = field(default=(), repr=False)

    @property
    def difference(self) -> float | None:
        """The observed difference."""
        if self.tested is not None:
            return self.tested.effect
        if self.first_value is None or self.second_value is None:
            return None
        return self.first_value - self.second_value

    @property
    def n(self) -> int:
        """Items compared."""
        return self.tested.n if self.tested else 0

    @property
    def arms(self) -> tuple[str, str]:
        """Both arms."""
        return self.first, self.second

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values, without the items behind it."""
        names = [
            item.name
            for item in dataclasses.fields(self)
            if item.name not in ("measures", "tested", "because")
        ]
        tested = self.tested.to_dict() if self.tested else None
        return {name: json_value(getattr(self, name)) for name in names} | {
            "difference": json_value(self.difference),
            "tested": json_value(tested),
        }


def json_value(value: Any) -> Any:
    """Return a value that JSON has: lists for tuples, nothing for what is not finite."""
    if isinstance(value, dict):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scale_of(metric: str, unit: str) -> tuple[float, float] | None:
    """The ends of a metric's scale; a plain number has none."""
    return _SCALES.get(metric.rpartition("/")[2]) or _SCALES.get(unit)


def filling_of(metric: str, unit: str, values: NDArray[np.float64]) -> tuple[float, float]:
    """Return what unresolved items are filled with: the ends of the metric's scale, of a plain
    number those of the values seen.
    """
    known = values[~np.isnan(values)]
    seen = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    low, high = scale_of(metric, unit) or seen
    return min(low, seen[0]), max(high, seen[1])


def largest_possible(row: TableRow) -> float:
    """Return the largest difference that the metric's scale allows; of a plain number, any."""
    low, high = scale_of(row.metric, row.unit) or (0.0, math.inf)
    return HALF if row.head_to_head else high - low


def pairs_of(measurements: Measurements, base: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return the pairs of arms, the later one first; pairs with a base model come last."""
    names = list(measurements.arms)
    pairs = [(second, first) for first, second in itertools.combinations(names, 2)]
    json_value = [(second, first) if first in base else (first, second) for first, second in pairs]
    return sorted(json_value, key=lambda pair: any(name in base for name in pair))


def build_rows(measurements: Measurements, base: Sequence[str] = ()) -> list[TableRow]:
    """Return every comparison with its test, Holm's correction over all of them, and what each
    could have found.

    Args:
        base: names of the arms that are base models.
    """
    rows = [
        row
        for first, second in pairs_of(measurements, base)
        for row in _pair_rows(measurements, first, second)
    ]
    return corrected(rows)


def corrected(rows: Sequence[TableRow]) -> list[TableRow]:
    """Return the rows with Holm-adjusted p, and power at the level that the smallest p of the table
    is held to.
    """
    adjusted = holm([_p(row) for row in rows])
    family = max(1, sum(p is not None for p in adjusted))
    return [
        dataclasses.replace(
            row,
            p_holm=p,
            mde=row.tested.mde(ALPHA / family) if row.tested else None,
            needed=row.tested.questions_needed(ALPHA / family) if row.tested else None,
        )
        for row, p in zip(rows, adjusted, strict=True)
    ]


def _p(row: TableRow) -> float | None:
    """The p that enters the correction; where not one item differs the test was made and its p is
    1.
    """
    if row.tested is None or row.reason:
        return None
    return 1.0 if row.tested.p is None else row.tested.p


def with_honest_limits(tested: Tested, largest: float) -> Tested:
    """Return the comparison with limits that can be: none of an interval of no width (items that
    all agree say nothing about the next one), and no difference that is larger than the scale
    allows. Neither moves zero into the interval or out of it.
    """
    if tested.interval_method == "zero variance":
        return dataclasses.replace(tested, low=None, high=None)
    low, high = (
        None if limit is None else min(max(limit, -largest), largest)
        for limit in (tested.low, tested.high)
    )
    return dataclasses.replace(tested, low=low, high=high)


def _by_metric(
    arm: ArmMeasurements, measurements: Measurements
) -> dict[tuple[tuple[str, str, str], str | None], list[Measure]]:
    """The arm's measures by metric and opponent, one per run that has it."""
    found: dict[tuple[tuple[str, str, str], str | None], list[Measure]] = {}
    for run in arm.runs:
        for measure in run.measures():
            found.setdefault(
                (measure.key, measurements.opponent_name(measure.opponent)), []
            ).append(measure)
    return found


def _pair_rows(measurements: Measurements, first: str, second: str) -> Iterator[TableRow]:
    """All comparisons of two arms: head to head first, then metric by metric."""
    ours, theirs = (_by_metric(measurements.arms[name], measurements) for name in (first, second))
    direct = set()
    for (key, opponent), measures in ours.items():
        if opponent == second:
            direct.add(key)
            yield _head_to_head(
                first, second, *_judged_once(measures, measurements, (first, second)), flipped=False
            )
    for (key, opponent), measures in theirs.items():
        if opponent == first and key not in direct:
            direct.add(key)
            yield _head_to_head(
                first, second, *_judged_once(measures, measurements, (second, first)), flipped=True
            )
    for (key, opponent), mine in ours.items():
        other = theirs.get((key, opponent))
        through_an_arm = opponent in measurements.arms
        if other is None or (through_an_arm and (key in direct or opponent in (first, second))):
            continue
        trained = not any(measurements.arms[name].is_base for name in (first, second))
        yield _side_by_side(first, second, opponent, *_seeds_in_line(mine, other, trained))


def _table(measures: Sequence[Measure], keys: Sequence[tuple[str, int]]) -> NDArray[np.float64]:
    """Values by seed and item, NaN where there is none."""
    place = {key: number for number, key in enumerate(keys)}
    values = np.full((len(measures), len(keys)), np.nan)
    for row, measure in enumerate(measures):
        for item in measure.samples:
            column = place.get(item.key)
            if column is not None and item.value is not None:
                values[row, column] = item.value
    return values


def _keys(measures: Sequence[Measure]) -> dict[tuple[str, int], Sample]:
    return {item.key: item for measure in measures for item in measure.samples}


def _judged_once(
    measures: Sequence[Measure], measurements: Measurements, arms: tuple[str, str]
) -> tuple[Sequence[Measure], str]:
    """The measures in which no training stands twice, and what was left out: two seeds against one
    training are not two pairs of seeds.

    Args:
        arms: the arm whose answers were judged, and its opponent.
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
    return kept, (
        "" if len(kept) == len(measures) else f"{count(len(kept), 'seed')} of {len(measures)}"
    )


def _head_to_head(
    first: str, second: str, measures: Sequence[Measure], left_out: str, flipped: bool
) -> TableRow:
    """The first arm's answers judged against the second's, one measure per seed."""
    keys = list(_keys(measures))
    values = _table(measures, keys)
    values = 1 - values if flipped else values
    tested = with_honest_limits(
        compare(values, np.full((1, len(keys)), HALF), [key[0] for key in keys]), HALF
    )
    one = measures[0]
    rate = None if tested.effect is None else HALF + tested.effect
    return TableRow(
        metric=one.name,
        label=one.label,
        first=first,
        second=second,
        unit="share",
        head_to_head=True,
        opponent=None,
        higher_is_better=True,
        first_value=rate,
        second_value=None if rate is None else 1 - rate,
        tested=tested,
        reason=too_few(tested),
        flags=(left_out,) if left_out else (),
        files=_files(measures),
        measures=tuple(measures),
    )


def _side_by_side(
    first: str,
    second: str,
    opponent: str | None,
    mine: Sequence[Measure],
    other: Sequence[Measure],
    unpaired: str,
) -> TableRow:
    """The same items of both arms, paired; a turn that only one arm has is unresolved where the
    question is in both.
    """
    one = mine[0]
    unit = one.unit if {measure.unit for measure in (*mine, *other)} == {one.unit} else "number"
    my_keys, other_keys = _keys(mine), _keys(other)
    questions = {key[0] for key in my_keys} & {key[0] for key in other_keys}
    keys = [key for key in {**my_keys, **other_keys} if key[0] in questions]
    a, b = _table(mine, keys), _table(other, keys)
    scale = filling_of(one.metric, unit, np.concatenate([a.ravel(), b.ravel()]))
    lowest, highest = scale_of(one.metric, unit) or (0.0, math.inf)
    tested = (
        with_honest_limits(compare(a, b, [key[0] for key in keys], scale=scale), highest - lowest)
        if keys
        else None
    )
    both = ~(
        np.isnan(a).any(axis=0) | np.isnan(b).any(axis=0)
    )  # the values that the difference is of; `Score` has each arm's own
    values = [
        _mean(table[:, both]) if keys else _reported(measures)
        for table, measures in ((a, mine), (b, other))
    ]
    directions = {measure.higher_is_better for measure in (*mine, *other)}
    direction = directions.pop() if len(directions) == 1 else None
    reason = too_few(tested) if tested else _no_items(my_keys, other_keys)
    flags = []
    asked = max(len(my_keys), len(other_keys))
    if tested and tested.effect and tested.low is None:
        flags.append("every item differs by the same: no interval, so no claim")
    if keys and len(keys) < asked:
        flags.append(f"{len(keys)} common items of {asked}")
    if unpaired:
        flags.append(unpaired)
    return TableRow(
        metric=one.name,
        label=one.label,
        first=first,
        second=second,
        unit=unit,
        head_to_head=False,
        opponent=opponent,
        higher_is_better=direction,
        first_value=values[0],
        second_value=values[1],
        tested=tested,
        reason=reason or (DIRECTION_UNKNOWN if direction is None else ""),
        flags=tuple(flags),
        files=_files([*mine, *other]),
        measures=(*mine, *other),
    )


def _seeds_in_line(
    mine: Sequence[Measure], other: Sequence[Measure], trained: bool
) -> tuple[Sequence[Measure], Sequence[Measure], str]:
    """Two trained arms with different numbers of seeds are compared on as many as both have; the
    rest is named.

    One training repeated beside several would hide how much another of its seeds would have
    differed. A base has no seeds to differ.
    """
    if len(mine) == len(other) or (not trained and 1 in (len(mine), len(other))):
        return mine, other, ""
    fewer = min(len(mine), len(other))
    return mine[:fewer], other[:fewer], f"{count(fewer, 'seed')} of {len(mine)} and {len(other)}"


def _mean(table: NDArray[np.float64]) -> float | None:
    """Mean over all items that have a value."""
    known = table[~np.isnan(table)]
    return float(known.mean()) if known.size else None


def _reported(measures: Sequence[Measure]) -> float | None:
    """Mean of the values that the evaluations reported, where there are no items."""
    values = [measure.reported for measure in measures if measure.reported is not None]
    return sum(values) / len(values) if values else None


def _no_items(
    mine: Mapping[tuple[str, int], Sample], other: Mapping[tuple[str, int], Sample]
) -> str:
    if not mine or not other:
        return "only totals are known, not the items behind them"
    return "the two arms answered different questions"


def too_few(tested: Tested) -> str:
    """Return why a test cannot show anything, or nothing."""
    if tested.questions == 0:
        return "there is no item to compare"
    if tested.unresolved == tested.n:
        return "no item has a verdict"
    if tested.questions < FEWEST_QUESTIONS:
        return (
            f"{tested.questions} question{'s' if tested.questions > 1 else ''} cannot reach p <="
            f" {ALPHA:g}, whatever they say"
        )
    return ""


def _files(measures: Sequence[Measure]) -> tuple[str, ...]:
    """The result files behind a number, as paths inside the runs folder."""
    return tuple(dict.fromkeys(source_of(measure) for measure in measures))


def source_of(measure: Measure) -> str:
    """Return the result file of a measure: <run>/evals/<eval>/result.json."""
    return "/".join(measure.file.parts[-4:])


def build_scores(measurements: Measurements) -> list[Score]:
    """Return every arm's score on every metric, with intervals over questions and, where there are
    several, seeds.
    """
    return [
        _score(name, opponent, measures)
        for name, arm in measurements.arms.items()
        for (_, opponent), measures in _by_metric(arm, measurements).items()
    ]


def _score(arm: str, opponent: str | None, measures: Sequence[Measure]) -> Score:
    one = measures[0]
    keys = list(_keys(measures))
    table = _table(measures, keys)
    open_items = np.isnan(table).any(axis=0) if keys else np.zeros(0, dtype=bool)
    low, high = filling_of(one.metric, one.unit, table)
    interval = _score_interval(
        table[:, ~open_items],
        [key[0] for key, left in zip(keys, open_items, strict=True) if not left],
    )
    value = interval.estimate if keys else _reported(measures)
    filled = [
        float(np.where(np.isnan(table), end, table).mean()) if keys else None for end in (low, high)
    ]
    within = interval.within(*(scale_of(one.metric, one.unit) or (-math.inf, math.inf)))
    limits = [None, None] if interval.method == "zero variance" else [within.low, within.high]
    return Score(
        arm,
        one.name,
        one.label,
        opponent,
        one.unit,
        value,
        limits[0],
        limits[1],
        len(keys) or int(one.reported_n or 0),
        len(measures),
        int(open_items.sum()),
        filled[0],
        filled[1],
        interval.method if keys else "reported",
        one.higher_is_better,
        _files(measures),
    )


def _score_interval(table: NDArray[np.float64], questions: Sequence[str]) -> Interval:
    """Wilson for plain shares, the crossed interval for several seeds, the bootstrap over questions
    otherwise.
    """
    if table.shape[0] > 1:
        return crossed_interval(question_means(table, np.asarray(questions)))[0]
    values = table[0]
    if len(values) and np.isin(values, (0.0, 1.0)).all() and len(set(questions)) == len(values):
        return wilson(int(values.sum()), len(values))
    return mean_interval(values, np.asarray(questions) if len(values) else None)


def with_flags(row: TableRow, measurements: Measurements) -> TableRow:
    """Return the row with flags about how its numbers came to be."""
    flags = list(row.flags)
    for name in row.arms:
        arm = measurements.arms.get(name)
        if arm is not None and arm.imported:
            flags.append(f"{name} imported")
    for measure in row.measures:
        flags += _of_measure(measure, measurements)
    return dataclasses.replace(row, flags=tuple(dict.fromkeys(flags)))


def _of_measure(measure: Measure, measurements: Measurements) -> list[str]:
    """Flags of one measure: subset, judge, orders, few-shot."""
    run = next(
        (
            run
            for arm in measurements.arms.values()
            for run in arm.runs
            if run.folder == measure.file.parents[2]
        ),
        None,
    )
    found = (
        next((result for result in run.evals if result.file == measure.file), None) if run else None
    )
    if found is None:
        return []
    result, flags = found.result, []
    if result.get("subset"):
        flags.append(f"n = {measure.reported_n}, a subset" if measure.reported_n else "a subset")
    judge = result.get("judge") or {}
    if judge.get("weak"):
        flags.append("weak judge")
    flags += [str(flag) for flag in result.get("flags") or ()]
    for row in result.get("tasks") or ():
        if (
            row["task"] == measure.task
            and row.get("num_fewshot") is not None
            and measure.label.endswith(_shown_metric(row))
        ):
            flags.append(f"{row['num_fewshot']}-shot")
    return list(dict.fromkeys(flags))


def _shown_metric(row: dict[str, str]) -> str:
    return row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
