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
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.wording import count
from recipes_lib.eval_log import EvalLog, Measure
from recipes_lib.statistics.intervals import Interval, mean_interval, wilson
from recipes_lib.statistics.paired import holm
from recipes_lib.statistics.seeds import crossed_interval, question_means
from recipes_lib.statistics.unresolved import Tested, compare

TestVerdict = Literal["better", "worse", "no difference shown", "cannot be tested"]
ALPHA = 0.05
FEWEST_QUESTIONS = 6  # five questions that all agree give p = 0.0625
DIRECTION_UNKNOWN = "direction unknown, its files do not say whether more or less of it is better"
_NOT_WRITTEN = ("measures", "tested", "because")
HALF = 0.5  # a win rate against the other arm itself that favours nobody
# By the last word of a metric, else by its unit.
_SCALES = {"share": (0.0, 1.0), "grade": (1.0, 5.0), "grade_1_10": (1.0, 10.0)}


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
    def effect(self) -> tuple[float | None, float | None, float | None]:
        """What is shown of the effect, with its limits: head to head the first arm's win rate, else
        the difference.
        """
        shift = HALF if self.head_to_head else 0.0
        low, high = (self.tested.low, self.tested.high) if self.tested else (None, None)
        return (
            self.first_value if self.head_to_head else self.difference,
            None if low is None else low + shift,
            None if high is None else high + shift,
        )

    @property
    def largest(self) -> float:
        """The largest difference that the metric's scale allows; of a plain number, any."""
        low, high = scale_of(self.metric, self.unit) or (0.0, math.inf)
        return HALF if self.head_to_head else high - low

    @property
    def arms(self) -> tuple[str, str]:
        """Both arms."""
        return self.first, self.second

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values, without the items behind it."""
        names = [item.name for item in dataclasses.fields(self)]
        values = {name: getattr(self, name) for name in names if name not in _NOT_WRITTEN}
        tested = self.tested.to_dict() if self.tested else None
        return json_object(values | {"difference": self.difference, "tested": tested})


def json_object(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by name as JSON has them."""
    return {name: json_value(value) for name, value in values.items()}


def json_value(value: Any) -> Any:
    """Return a value that JSON has: lists for tuples, nothing for what is not finite."""
    if isinstance(value, dict):
        return json_object(value)
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


def pairs_of(measurements: Measurements, base: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return the pairs of arms, the later one first; pairs with a base model come last."""
    pairs = [
        (first, second) if second in base else (second, first)
        for first, second in itertools.combinations(measurements.arms, 2)
    ]
    return sorted(pairs, key=lambda pair: any(name in base for name in pair))


def build_rows(measurements: Measurements, base: Sequence[str] = ()) -> list[TableRow]:
    """Return every comparison with its test, Holm's correction over all of them, and what each
    could have found.

    Args:
        base: names of the arms that are base models.
    """
    return corrected(
        [
            row
            for pair in pairs_of(measurements, base)
            for rows_of in ROW_KINDS
            for row in rows_of(measurements, *pair)
        ]
    )


def corrected(rows: Sequence[TableRow]) -> list[TableRow]:
    """Return the rows with Holm-adjusted p, and power at the level that the smallest p of the table
    is held to.
    """
    adjusted = holm([_p(row) for row in rows])
    level = ALPHA / max(1, sum(p is not None for p in adjusted))
    return [
        replace(
            row,
            p_holm=p,
            mde=row.tested.mde(level) if row.tested else None,
            needed=row.tested.questions_needed(level) if row.tested else None,
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


# ---- Kinds of rows ----


def head_to_head_rows(measurements: Measurements, first: str, second: str) -> Iterator[TableRow]:
    """Yield the comparisons in which one arm's answers were judged against the other's, a measure
    per seed.
    """
    seen = set()
    for arms in ((first, second), (second, first)):
        for (key, opponent), measures in _by_metric(measurements, arms[0]).items():
            if opponent != arms[1] or key in seen:
                continue
            seen.add(key)
            kept = _judged_once(measures, measurements, arms)
            values, keys = _values(kept)
            values = values if arms[0] == first else 1 - values
            tested = _tested(values, np.full((1, len(keys)), HALF), keys, "share", HALF)
            rate = None if tested.effect is None else HALF + tested.effect
            seeds = f"{count(len(kept), 'seed')} of {len(measures)}"
            yield TableRow(
                metric=kept[0].name,
                label=kept[0].label,
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
                flags=(seeds,) if len(kept) < len(measures) else (),
                files=_files(kept),
                measures=tuple(kept),
            )


def paired_rows(measurements: Measurements, first: str, second: str) -> Iterator[TableRow]:
    """Yield the comparisons of the same items of both arms, paired; a turn that only one arm has is
    unresolved where the question is in both.
    """
    ours, theirs = (_by_metric(measurements, name) for name in (first, second))
    direct = {key for key, opponent in ours if opponent == second}
    direct |= {key for key, opponent in theirs if opponent == first}
    trained = not any(measurements.arms[name].is_base for name in (first, second))
    for (key, opponent), mine in ours.items():
        other = theirs.get((key, opponent))
        through_an_arm = opponent in measurements.arms
        if other and not (through_an_arm and (key in direct or opponent in (first, second))):
            yield _paired_row(first, second, opponent, mine, other, trained)


ROW_KINDS = (head_to_head_rows, paired_rows)


def _paired_row(
    first: str,
    second: str,
    opponent: str | None,
    mine: Sequence[Measure],
    other: Sequence[Measure],
    trained: bool,
) -> TableRow:
    unpaired = ""
    if len(mine) != len(other) and (trained or 1 not in (len(mine), len(other))):
        # One training repeated beside several would hide how much another of its seeds would have
        # differed. A base has no seeds to differ.
        fewer = min(len(mine), len(other))
        unpaired = f"{count(fewer, 'seed')} of {len(mine)} and {len(other)}"
        mine, other = mine[:fewer], other[:fewer]
    one, measures = mine[0], (*mine, *other)
    unit = one.unit if {measure.unit for measure in measures} == {one.unit} else "number"
    asked = [{item.key for measure in arm for item in measure.samples} for arm in (mine, other)]
    questions = {key[0] for key in asked[0]} & {key[0] for key in asked[1]}
    (a, keys), (b, _) = (_values(arm, measures, questions) for arm in (mine, other))
    low, high = scale_of(one.metric, unit) or (0.0, math.inf)
    tested = _tested(a, b, keys, one.metric, high - low, unit) if keys else None
    # The values that the difference is of; `Score` has each arm's own.
    both = ~(np.isnan(a).any(axis=0) | np.isnan(b).any(axis=0))
    values = [
        _mean(table[:, both]) if keys else _reported(arm) for table, arm in ((a, mine), (b, other))
    ]
    if tested:
        reason = too_few(tested)
    elif all(asked):
        reason = "the two arms answered different questions"
    else:
        reason = "only totals are known, not the items behind them"
    directions = {measure.higher_is_better for measure in measures}
    direction = directions.pop() if len(directions) == 1 else None
    most = max(map(len, asked))
    flags = {
        "every item differs by the same: no interval, so no claim": bool(
            tested and tested.effect and tested.low is None
        ),
        f"{len(keys)} common items of {most}": 0 < len(keys) < most,
        unpaired: bool(unpaired),
    }
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
        flags=tuple(flag for flag, holds in flags.items() if holds),
        files=_files(measures),
        measures=measures,
    )


def _by_metric(
    measurements: Measurements, arm: str
) -> dict[tuple[tuple[str, str, str], str | None], list[Measure]]:
    """The arm's measures by metric and opponent, one per run that has it."""
    found: dict[tuple[tuple[str, str, str], str | None], list[Measure]] = {}
    for run in measurements.arms[arm].runs:
        for measure in run.measures():
            key = (measure.key, measurements.opponent_name(measure.opponent))
            found.setdefault(key, []).append(measure)
    return found


def _values(
    measures: Sequence[Measure],
    beside: Sequence[Measure] = (),
    questions: Container[str] | None = None,
) -> tuple[NDArray[np.float64], list[tuple[str, int]]]:
    """Values by seed and item, NaN where there is none, and the keys of the items.

    Args:
        beside: all measures whose items are asked for; None for those of `measures`.
        questions: the only ones that are asked for.
    """
    items = (item for measure in beside or measures for item in measure.samples)
    place: dict[tuple[str, int], int] = {}
    for item in items:
        if questions is None or item.id in questions:
            place.setdefault(item.key, len(place))
    values = np.full((len(measures), len(place)), np.nan)
    for row, measure in enumerate(measures):
        for item in measure.samples:
            if item.value is not None and item.key in place:
                values[row, place[item.key]] = item.value
    return values, list(place)


def _tested(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    keys: Sequence[tuple[str, int]],
    metric: str,
    largest: float,
    unit: str = "share",
) -> Tested:
    """The test, with limits that can be: none of an interval of no width (items that all agree say
    nothing about the next one), and no difference that is larger than the scale allows. Neither
    moves zero into the interval or out of it.
    """
    scale = filling_of(metric, unit, np.concatenate([a.ravel(), b.ravel()]))
    tested = compare(a, b, [key[0] for key in keys], scale=scale)
    if tested.interval_method == "zero variance":
        return replace(tested, low=None, high=None)
    low, high = (
        None if limit is None else min(max(limit, -largest), largest)
        for limit in (tested.low, tested.high)
    )
    return replace(tested, low=low, high=high)


def _judged_once(
    measures: Sequence[Measure], measurements: Measurements, arms: tuple[str, str]
) -> list[Measure]:
    """The measures in which no training stands twice: two seeds against one training are not two
    pairs of seeds.

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
    return kept


def _mean(table: NDArray[np.float64]) -> float | None:
    """Mean over all items that have a value."""
    known = table[~np.isnan(table)]
    return float(known.mean()) if known.size else None


def _reported(measures: Sequence[Measure]) -> float | None:
    """Mean of the values that the evaluations reported, where there are no items."""
    values = [measure.reported for measure in measures if measure.reported is not None]
    return sum(values) / len(values) if values else None


def too_few(tested: Tested) -> str:
    """Return why a test cannot show anything, or nothing."""
    if tested.questions == 0:
        return "there is no item to compare"
    if tested.unresolved == tested.n:
        return "no item has a verdict"
    if tested.questions < FEWEST_QUESTIONS:
        return (
            f"{count(tested.questions, 'question')} cannot reach p <= {ALPHA:g}, whatever they say"
        )
    return ""


def _files(measures: Sequence[Measure]) -> tuple[str, ...]:
    """The result files behind a number, as paths inside the runs folder."""
    return tuple(dict.fromkeys(source_of(measure) for measure in measures))


def source_of(measure: Measure) -> str:
    """Return the result file of a measure: <run>/evals/<eval>/result.json."""
    return "/".join(measure.file.parts[-4:])


# ---- Scores ----


def build_scores(measurements: Measurements) -> list[Score]:
    """Return every arm's score on every metric, with intervals over questions and, where there are
    several, seeds.
    """
    return [
        _score(name, opponent, measures)
        for name in measurements.arms
        for (_, opponent), measures in _by_metric(measurements, name).items()
    ]


def _score(arm: str, opponent: str | None, measures: Sequence[Measure]) -> Score:
    one = measures[0]
    table, keys = _values(measures)
    known = ~np.isnan(table).any(axis=0)
    interval = _score_interval(
        table[:, known], [key[0] for key, there in zip(keys, known, strict=True) if there]
    ).within(*(scale_of(one.metric, one.unit) or (-math.inf, math.inf)))
    lowest, highest = (
        float(np.where(np.isnan(table), end, table).mean()) if keys else None
        for end in filling_of(one.metric, one.unit, table)
    )
    flat = interval.method == "zero variance"
    return Score(
        arm,
        one.name,
        one.label,
        opponent,
        one.unit,
        interval.estimate if keys else _reported(measures),
        None if flat else interval.low,
        None if flat else interval.high,
        len(keys) or int(one.reported_n or 0),
        len(measures),
        int((~known).sum()),
        lowest,
        highest,
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


# ---- Flags ----


def with_flags(row: TableRow, measurements: Measurements) -> TableRow:
    """Return the row with flags about how its numbers came to be."""
    flags = list(row.flags)
    arms = [measurements.arms[name] for name in row.arms if name in measurements.arms]
    flags += [f"{arm.name} imported" for arm in arms if arm.imported]
    logs = {log.file: log for arm in measurements.arms.values() for log in arm.logs}
    for measure in row.measures:
        if measure.file in logs:
            flags += _flags_of(measure, logs[measure.file])
    return replace(row, flags=tuple(dict.fromkeys(flags)))


def _flags_of(measure: Measure, log: EvalLog) -> Iterator[str]:
    """Flags of one measure: subset, judge, orders, few-shot."""
    if log.result.get("subset"):
        yield f"n = {measure.reported_n}, a subset" if measure.reported_n else "a subset"
    if (log.result.get("judge") or {}).get("weak"):
        yield "weak judge"
    yield from map(str, log.result.get("flags") or ())
    for task in log.result.get("tasks") or ():
        chosen = "" if task["filter"] == "none" else f", {task['filter']}"
        mine = task["task"] == measure.task and measure.label.endswith(task["metric"] + chosen)
        if mine and task.get("num_fewshot") is not None:
            yield f"{task['num_fewshot']}-shot"
