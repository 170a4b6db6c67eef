"""One comparison of two arms, and how measures become its numbers.

A kind of rows is a function that yields them (`table.ROW_KINDS`); where its effect is no difference
of two values it has a subclass of `TableRow` that says how the effect is shown.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from recipes_lib.compare.measurements import Measurements, same_questions
from recipes_lib.compare.wording import NONE, count, difference_text, interval_text, metric_text
from recipes_lib.eval_log import Measure
from recipes_lib.statistics.labels import (
    FEWEST_LABELS,
    labelled_questions,
    num_labels,
    random_choice_p,
    rectified,
)
from recipes_lib.statistics.paired import Tested
from recipes_lib.statistics.unresolved import compare

TestVerdict = Literal["better", "worse", "no difference shown", "cannot be tested", "not tested"]
# What a margin adds: the first arm is not worse, not better, or neither.
Within = Literal["", "not worse", "not better", "equivalent"]
ItemValues: TypeAlias = NDArray[np.float64]  # by seed and item, NaN where there is none
Items = Sequence[tuple[str, int]]  # question and turn
ALPHA = 0.05
HALF = 0.5  # a win rate against the other arm itself that favours nobody
NO_CHANCE = 0.001
NO_RANDOM_CHOICE = (
    "the answers that people labelled are no random choice, the judge thinks otherwise of them than"
    f" of the rest (p < {NO_CHANCE:g})"
)
FEWEST_QUESTIONS = 6  # five questions that all agree give p = 0.0625
# By the last word of a metric, else by its unit.
_SCALES = {"share": (0.0, 1.0), "grade": (1.0, 5.0), "grade_1_10": (1.0, 10.0)}
_NOT_WRITTEN = ("measures", "paired", "tested", "because")


@dataclass(frozen=True)
class PairedItems:
    """What the test of a row is of: two arms on the same items, by seed and item.

    Args:
        second: one row stands beside every seed of the first.
        scale: smallest and largest possible value.
        largest: the largest possible difference.
        versus: whether the values are outcomes against the second arm itself, which then stands
            there as a half.
        human: what people said of the items of each arm that a judge gave values; empty where that
            is not used.
    """

    first: ItemValues
    second: ItemValues
    items: Items
    scale: tuple[float, float]
    largest: float
    versus: bool = False
    human: tuple[ItemValues, ...] = ()

    @property
    def tested_values(self) -> tuple[ItemValues, ItemValues]:
        """The values of both arms, corrected by what people said."""
        first, second = self.first, self.second
        if self.human:
            first = rectified(first, self.human[0], self.questions)
        if self.human and not self.versus:
            second = rectified(second, self.human[1], self.questions)
        return first, second

    @cached_property
    def questions(self) -> NDArray[np.str_]:
        """The question of each item."""
        return np.array([key[0] for key in self.items])

    def tested(self) -> Tested:
        """Return the test, with limits that can be: none of an interval of no width (items that all
        agree say nothing about the next one), and no difference above the largest possible. Neither
        moves zero into the interval or out of it.
        """
        tested = compare(*self.tested_values, self.questions, scale=self.scale)
        if tested.spread and (drawn := self._drawn()):
            spread = replace(tested.spread, draws=drawn[0], drawn=drawn[1])
            tested = replace(tested, spread=spread)
        if tested.interval_method == "zero variance":
            return replace(tested, low=None, high=None)
        low, high = (
            None if limit is None else min(max(limit, -self.largest), self.largest)
            for limit in (tested.low, tested.high)
        )
        return replace(tested, low=low, high=high)

    def means(self, tested: Tested) -> tuple[float | None, float | None]:
        """Return the mean value of each arm over the items that were tested without open ones."""
        if self.versus:
            rate = None if tested.effect is None else HALF + tested.effect
            return rate, None if rate is None else 1 - rate
        first, second = self.tested_values
        known = ~(np.isnan(first).any(axis=0) | np.isnan(second).any(axis=0))
        if not known.any():
            return None, None
        return float(first[:, known].mean()), float(second[:, known].mean())

    def _drawn(self) -> tuple[int, float] | None:
        """Answers per question, and what of the effect's variance is new in each of them; None
        where each question has one.
        """
        codes = np.unique(np.array(self.items), axis=0, return_inverse=True)[1].reshape(-1)
        count = int(codes.max()) + 1 if len(codes) else 0
        if len(codes) < 2 * count:  # a few questions that are asked again are no draws
            return None
        first, second = self.tested_values
        variance, table = 0.0, first - second
        for values in table:
            known = ~np.isnan(values)
            sizes, sums, squares = (
                np.bincount(codes[known], weights=values[known] ** power, minlength=count)
                for power in (0, 1, 2)
            )
            several = sizes > 1
            n, total, square = sizes[several], sums[several], squares[several]
            variance += float((n / (n - 1) * (square - total**2 / n)).sum())
        return round(len(codes) / count), variance / table.size**2


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One comparison: `difference` is first minus second in the metric's own direction, so positive
    favours the first arm only where `higher_is_better` (None: not known, so nothing is ranked).

    `level_share` is the part of its level that this one of all looks at it has. `reason` says why a
    comparison cannot be tested, `aside` why it is only shown. `verdict` and `sentence` come from
    `claims`; `stopped` holds the titles of the findings that stop the claim, `because` the clause
    of the sentence that gives the reasons, so that a page can give them once.
    """

    metric: str
    label: str
    first: str
    second: str
    unit: str
    head_to_head: bool = False
    opponent: str | None = None
    higher_is_better: bool | None = True
    first_value: float | None
    second_value: float | None
    p_holm: float | None = None
    mde: float | None = None
    needed: int | None = None
    primary: bool = False
    level_share: float = 1.0
    margin: float | None = None
    p_not_worse: float | None = None
    p_not_better: float | None = None
    within: Within = ""
    reason: str = ""
    aside: str = ""
    verdict: TestVerdict = "cannot be tested"
    sentence: str = ""
    because: str = ""
    stopped: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    labels: int = 0  # human labels that corrected the judge, who alone would have said:
    judge_alone: str = ""
    published_first: str | None = None
    published_second: str | None = None
    files: tuple[str, ...] = ()
    tested: Tested | None = None
    measures: tuple[Measure, ...] = field(default=(), repr=False)
    paired: PairedItems | None = field(default=None, repr=False, compare=False)

    @property
    def arms(self) -> tuple[str, str]:
        """Both arms."""
        return self.first, self.second

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
    def claimed(self) -> bool:
        """Whether its test stands: it could be made, and no finding stops it."""
        return not self.stopped or self.verdict == "cannot be tested"

    # How the effect is said. A kind of rows whose effect is another one overrides these.

    sentences: ClassVar[Mapping[str, str]] = {}  # in place of those in `claims.SENTENCES`
    item: ClassVar[str] = "question"  # what is counted as n
    better_words: ClassVar[tuple[str, str]] = ("better", "worse")
    signed: ClassVar[bool] = True  # its limits
    of_results: ClassVar[bool] = True  # not of what the training took, which more keys change

    @property
    def verdict_words(self) -> str:
        """The verdict as it is shown."""
        better, worse = self.better_words
        return {"better": better, "worse": worse}.get(self.verdict, self.verdict)

    def size(self, effect: float) -> str:
        """Return the size of a difference as text, without a sign."""
        return difference_text(effect, self.unit).lstrip("+")

    @property
    def against(self) -> str:
        """What stands behind the metric's label: its opponent."""
        return f"against {self.opponent}" if self.opponent else ""

    @property
    def where(self) -> str:
        """The metric, in a sentence."""
        return f"{self.label} {self.against}".rstrip()

    @property
    def largest(self) -> float:
        """The largest difference that the metric's scale allows; of a plain number, any."""
        low, high = scale_of(self.metric, self.unit) or (0.0, math.inf)
        return high - low

    def shown(self, effect: float | None) -> float | None:
        """Return a tested effect, or one of its limits, as it is shown."""
        return effect

    @property
    def effect(self) -> str:
        """The effect as text."""
        return difference_text(self.difference, self.unit)

    @property
    def limits(self) -> str:
        """Its interval as text."""
        low, high = (self.tested.low, self.tested.high) if self.tested else (None, None)
        return interval_text(self.shown(low), self.shown(high), self.unit, self.signed)

    @property
    def margin_text(self) -> str:
        """Its margin as text."""
        return "" if self.margin is None else self.size(self.margin)

    @property
    def shown_verdict(self) -> str:
        """The verdict, and what the margin adds to it."""
        within = f"; {self.within} within {self.margin_text}" if self.within else ""
        return f"{self.verdict_words}{within}"

    @property
    def words(self) -> str:
        """What stands before the effect in a sentence."""
        first, second = (
            metric_text(value, self.unit) for value in (self.first_value, self.second_value)
        )
        return f"{first} against {second}, difference"

    def to_dict(self) -> dict[str, object]:
        """Return the row as plain values, without the items behind it."""
        left_out = _NOT_WRITTEN if self.labels else (*_NOT_WRITTEN, "labels", "judge_alone")
        names = [one.name for one in dataclasses.fields(self) if one.name not in left_out]
        return {name: json_value(getattr(self, name)) for name in (*names, "difference", "tested")}


def json_value(value: object) -> object:
    """Return a value as JSON has it: nothing for what is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scale_of(metric: str, unit: str) -> tuple[float, float] | None:
    """Return the ends of a metric's scale; a plain number has none."""
    return _SCALES.get(metric.rpartition("/")[2]) or _SCALES.get(unit)


def filling_of(metric: str, unit: str, values: ItemValues) -> tuple[float, float]:
    """Return what unresolved items are filled with: the ends of the metric's scale, of a plain
    number those of the values seen.
    """
    known = values[~np.isnan(values)]
    seen = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    low, high = scale_of(metric, unit) or seen
    return min(low, seen[0]), max(high, seen[1])


def measures_of(
    measurements: Measurements, arm: str
) -> dict[tuple[tuple[str, str, str], str | None], list[Measure]]:
    """Return an arm's measures by metric and opponent, one per run that has it; of runs with
    different numbers of answers per question the answers that all have.
    """
    found: dict[tuple[tuple[str, str, str], str | None], list[Measure]] = {}
    for run in measurements.arms[arm].runs:
        for measure in run.measures():
            key = (measure.key, measurements.opponent_name(measure.opponent))
            found.setdefault(key, []).append(measure)
    return {key: with_draws(mine, fewest_draws(mine)) for key, mine in found.items()}


def fewest_draws(measures: Sequence[Measure]) -> int:
    """Return how many answers per question all of these measures have."""
    return min(
        (max(item.draw for item in one.samples) for one in measures if one.samples), default=1
    )


def with_draws(measures: Sequence[Measure], draws: int) -> list[Measure]:
    """Return the measures with so many answers per question: an answer that another arm was never
    asked for is no missing verdict of that arm.
    """
    return [
        replace(one, samples=tuple(item for item in one.samples if item.draw <= draws))
        if any(item.draw > draws for item in one.samples)
        else one
        for one in measures
    ]


def values_of(
    measures: Sequence[Measure],
    items_of: Sequence[Measure] | None = None,
    questions: Container[str] | None = None,
    human: bool = False,
) -> tuple[ItemValues, Items]:
    """Return the values of measures, and the keys of the items: questions of one text have one id.

    Args:
        items_of: the measures whose items are asked for; None for the same ones.
        questions: the only ones that are asked for; None for all.
        human: what people said instead of the judge.
    """
    place: dict[tuple[str, int, int], int] = {}
    items_of = measures if items_of is None else items_of
    for item in (item for measure in items_of for item in measure.samples):
        if questions is None or item.id in questions:
            place.setdefault(item.key, len(place))
    values = np.full((len(measures), len(place)), np.nan)
    for row, measure in enumerate(measures):
        for item in measure.samples:
            value = item.human if human else item.value
            if value is not None and item.key in place:
                values[row, place[item.key]] = value
    group = same_questions(items_of)
    return values, [(group.get(key[0], key[0]), key[1]) for key in place]


def corrected_values(measures: Sequence[Measure]) -> ItemValues | None:
    """Return the values of an arm's trainings, corrected by what people said; None where a training
    has too few labels, or they are no random choice.
    """
    table, items = values_of(measures)
    human, _ = values_of(measures, human=True)
    asked = np.array([key[0] for key in items])
    if labelled_questions(table, human, asked).min() < FEWEST_LABELS:
        return None
    if random_choice_p(table, human, asked) < NO_CHANCE:
        return None
    return rectified(table, human, asked)


def with_human(row: TableRow, *human: ItemValues) -> TableRow:
    """Return the row tested with the judge's values corrected by what people said, or flagged where
    a training has too few labels for that.
    """
    if row.paired is None:
        return row
    sides = list(zip((row.paired.first, row.paired.second), human, strict=False))
    asked, total = row.paired.questions, sum(num_labels(*side) for side in sides)
    if not total:
        return row
    fewest = min(int(labelled_questions(*side, asked).min()) for side in sides)
    if fewest < FEWEST_LABELS:
        told = f"{count(total, 'human label')} not used: of {count(fewest, 'question')} in one"
        return replace(row, flags=(*row.flags, f"{told} training, fewer than {FEWEST_LABELS}"))
    if min(random_choice_p(*side, asked) for side in sides) < NO_CHANCE:
        return replace(row, reason=NO_RANDOM_CHOICE)
    paired = replace(row.paired, human=human)
    tested = paired.tested()
    first, second = paired.means(tested)
    return replace(
        row,
        first_value=first,
        second_value=second,
        tested=tested,
        paired=paired,
        labels=total,
        judge_alone=f"{row.effect} {row.limits}".removesuffix(f" {NONE}"),
        flags=(*row.flags, f"{total:,} human labels, taken to be a random choice"),
    )


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


def reported(measures: Sequence[Measure]) -> float | None:
    """Return the mean of the values that evaluations reported, where there are no items."""
    values = [measure.reported for measure in measures if measure.reported is not None]
    return sum(values) / len(values) if values else None


def files_of(measures: Sequence[Measure]) -> tuple[str, ...]:
    """Return the result files behind a number, as paths inside the runs folder."""
    return tuple(dict.fromkeys(map(source_of, measures)))


def source_of(measure: Measure) -> str:
    """Return the result file of a measure: <run>/evals/<eval>/result.json."""
    return "/".join(measure.file.parts[-4:])
