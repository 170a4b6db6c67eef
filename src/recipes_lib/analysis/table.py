"""The tested table: every two arms on every metric that both have, and every arm's own scores.

A row is the paired difference of two arms on the same questions. Head to head it is the first arm's
win rate against one half. What cannot be tested says why. No sentence is written here.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from recipes_lib.analysis.aims import Aims, is_named, metric_parts
from recipes_lib.analysis.corrections import alpha_of, correct, refuse_few_of_many
from recipes_lib.analysis.pairs import Measured, identity_of, left_out, pair_trainings, trainings_of
from recipes_lib.analysis.runs import ArmRuns, Arms, question_of
from recipes_lib.analysis.table_row import TableRow
from recipes_lib.core.terminal import count
from recipes_lib.evals.log import Metric, Sample
from recipes_lib.evals.suites import UNIT_SCALES
from recipes_lib.stats import ALPHA, Limits, compare, mean_interval

FEWEST_QUESTIONS = 6  # five that all agree have p = 0.06
FEWEST_LOSSES = 50  # below, a long tail may lie outside of the sample
_ENDS = {  # of a unit's scale, where no question tells arms apart
    "share": {0.0: "nothing right", 1.0: "everything right"},
    "grade": {1.0: "the lowest grades", 5.0: "the highest grades"},
}
_Key = tuple[tuple[str, str, str], str | None]  # eval, task, metric; opponent
_Item = tuple[str, int]  # question, turn
_Values: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One arm on one metric: the mean with its interval; `unresolved` items have no verdict."""

    arm: str
    metric: str
    label: str
    opponent: str | None
    unit: str
    value: float | None
    interval: Limits | None
    n: int
    unresolved: int
    trainings: int
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class TestedTable:
    """All rows, by pair of arms and with the primary one first, and all scores."""

    rows: tuple[TableRow, ...]
    scores: tuple[Score, ...]
    alpha: float = ALPHA  # of all tests together

    @property
    def tests(self) -> int:
        """How many tests are corrected together."""
        return sum(row.is_counted for row in self.rows)


def build_table(arms: Arms, aims: Aims, is_stopped: Callable[[TableRow], bool]) -> TestedTable:
    """Return the tested table; without aims all metrics are alike.

    Rows that `is_stopped` names can have no verdict, and the others do not pay for their tests.
    """
    measured: dict[str, dict[_Key, Measured]] = {}  # by arm
    for arm in arms:
        measured[arm.name] = defaultdict(list)
        for run in arm.runs:
            for metric in run.metrics:
                key = (metric.key, arms.opponent(metric.opponent))
                measured[arm.name][key].append((run, metric))
    # The later arm of a pair comes first; pairs with a base model come last.
    pairs = list(itertools.combinations(sorted(arms, key=lambda arm: not arm.is_base), 2))
    pairs.sort(key=lambda pair: pair[0].is_base)
    rows: list[TableRow] = []
    for earlier, later in pairs:
        rows += _rows(later, earlier, measured, aims)
    for row in rows:
        row.is_stopped = is_stopped(row)
    _set_asides(rows, arms, aims)  # first: what is set aside has no margin and is not primary
    _set_margins(rows, aims)
    _set_primary(rows, aims)
    refuse_few_of_many(rows)
    correct(rows, aims)
    pair_order = list(dict.fromkeys(row.arms for row in rows))
    rows.sort(key=lambda row: (pair_order.index(row.arms), not row.primary, bool(row.aside)))
    scores = []
    for arm in arms:
        for (_, opponent), results in measured[arm.name].items():
            scores.append(_score(arm, opponent, results))
    return TestedTable(tuple(rows), tuple(scores), alpha_of(aims))


def _rows(
    first: ArmRuns, second: ArmRuns, measured: Mapping[str, dict[_Key, Measured]], aims: Aims
) -> list[TableRow]:
    """The rows of two arms: first what was judged head to head, then what both have."""
    of_first = measured[first.name]
    of_second = measured[second.name]
    rows = []
    head_to_head = set()
    for (key, opponent), results in of_first.items():
        if opponent == second.name:
            head_to_head.add(key)
            rows.append(_head_to_head(first, second, results, turned=False))
    for (key, opponent), results in of_second.items():
        if opponent == first.name and key not in head_to_head:
            head_to_head.add(key)
            rows.append(_head_to_head(first, second, results, turned=True))
    common_keys = of_first.keys() & of_second.keys()
    common_metrics = {(eval, metric) for (eval, _, metric), _ in common_keys}
    named_parts = {part for word in aims.named for part in metric_parts(word)}
    for (key, opponent), results in of_first.items():
        other_results = of_second.get((key, opponent))
        if other_results is None:
            continue
        eval, _, metric = key
        is_replaced = (eval, results[0][1].instead_of) in common_metrics
        if is_replaced and metric not in named_parts:
            continue
        # Between two arms that were judged head to head, a detour over a third arm says less.
        was_judged_directly = key in head_to_head or opponent in (first.name, second.name)
        if was_judged_directly and opponent in measured:
            continue
        rows.append(_side_by_side(first, second, opponent, results, other_results))
    return rows


def _row(
    first: ArmRuns,
    second: ArmRuns,
    metrics: Sequence[Metric],
    trainings: tuple[int, int],
    opponent: str | None,
) -> TableRow:
    """A row with what its metrics say."""
    metric = metrics[0]
    has_one_unit = len({metric.unit for metric in metrics}) == 1
    has_one_direction = len({metric.higher_is_better for metric in metrics}) == 1
    return TableRow(
        metric=metric.name,
        label=metric.label,
        eval=metric.eval,
        suite=metric.suite,
        first=first.name,
        second=second.name,
        unit=metric.unit if has_one_unit else "number",
        higher_is_better=metric.higher_is_better if has_one_direction else None,
        opponent=opponent,
        trainings=(0 if first.is_base else trainings[0], 0 if second.is_base else trainings[1]),
        files=_files(metrics),
    )


def _side_by_side(
    first: ArmRuns,
    second: ArmRuns,
    opponent: str | None,
    first_runs: Measured,
    second_runs: Measured,
) -> TableRow:
    """Both arms on the same items; what only one of them has counts as without a verdict."""
    pairs, flags = pair_trainings(first, second, first_runs, second_runs)
    if not pairs:
        row = _row(first, second, [metric for _, metric in first_runs], (0, 0), opponent)
        row.why_not = f"no two of their trainings met the same training of {opponent}"
        row.flags = tuple(flags)
        return row
    first_metrics = [metric for pair in pairs for metric in pair.first_metrics]
    second_metrics = [metric for pair in pairs for metric in pair.second_metrics]
    metrics = first_metrics + second_metrics
    trainings = (
        len({identity_of(pair.first) for pair in pairs}),
        len({identity_of(pair.second) for pair in pairs}),
    )
    row = _row(first, second, metrics, trainings, opponent)
    first_samples = _samples(first_metrics)
    second_samples = _samples(second_metrics)
    first_questions = {sample.id for sample in first_samples}
    second_questions = {sample.id for sample in second_samples}
    common = first_questions & second_questions
    kept = common
    # of another program a row that is missing may be a loss that somebody deleted
    if common and all(run.foreign for pair in pairs for run in (pair.first, pair.second)):
        kept = first_questions | second_questions
    first_samples = [sample for sample in first_samples if sample.id in kept]
    second_samples = [sample for sample in second_samples if sample.id in kept]
    asked = max(metric.asked for metric in metrics)
    items = _items(first_samples + second_samples, asked)
    row.n = len(items)
    if not items:
        row.first_value = _mean_reported(first_metrics)
        row.second_value = _mean_reported(second_metrics)
        row.why_not = "only totals are known, not the items behind them"
        if first_questions and second_questions:
            row.why_not = "the two arms answered different questions"
        return row
    most = max(len(first_questions), len(second_questions), len(kept), asked)
    if len(common) < most:
        flags.append(f"{count(len(common), 'common question')} of {most}")
    row.flags = tuple(flags)
    row.first_length = _median_length([sample.answer for sample in first_samples])
    row.second_length = _median_length([sample.answer for sample in second_samples])
    values = _values_by_training([pair.first_metrics for pair in pairs], items)
    other_values = _values_by_training([pair.second_metrics for pair in pairs], items)
    is_resolved = ~(np.isnan(values) | np.isnan(other_values)).any(axis=0)
    scale = _scale(row.unit, np.concatenate([values, other_values]))
    if scale is None and not is_resolved.all():
        row.why_not = f"{count(int((~is_resolved).sum()), 'row')} without a value"
        return row
    row.test = compare(values, other_values, _questions(metrics, items), scale)
    row.by_seed = _by_seed(values - other_values)
    row.first_value = _mean(values[:, is_resolved])
    row.second_value = _mean(other_values[:, is_resolved])
    row.why_not = _why_not(row)
    return row


def _head_to_head(first: ArmRuns, second: ArmRuns, measured: Measured, turned: bool) -> TableRow:
    """The first arm's win rate against the second. `turned` where the second one was the target."""
    target = second if turned else first
    rival = first if turned else second
    metrics: list[Metric] = []
    skipped: list[str] = []
    trained: set[tuple[str, str]] = set()
    for run, metric in measured:
        # Each training counts once: two seeds that met one training are not two pairs.
        pair = set()
        if not target.is_base:
            pair.add((target.name, run.name))
        if not rival.is_base:
            pair.add((rival.name, str(metric.opponent)))
        if pair & trained:
            skipped.append(f"{run.name} against {metric.opponent}")
            continue
        trained |= pair
        metrics.append(metric)
    row = _row(first, second, metrics, (len(metrics), len(metrics)), opponent=second.name)
    row.head_to_head = True
    row.higher_is_better = True
    row.flags = left_out(skipped)
    samples = _samples(metrics)
    items = _items(samples)
    row.n = len(items)
    answers_length = _median_length([sample.answer for sample in samples])
    rivals_length = _median_length([sample.opponent for sample in samples])
    row.first_length = rivals_length if turned else answers_length
    row.second_length = answers_length if turned else rivals_length
    values = _values(metrics, items)
    if turned:
        values = 1 - values
    row.test = compare(values, np.full((1, len(items)), 0.5), _questions(metrics, items))
    row.by_seed = _by_seed(values - 0.5)
    row.first_value = _mean(values[:, ~np.isnan(values).any(axis=0)])
    if row.first_value is not None:
        row.second_value = 1 - row.first_value
    row.why_not = _why_not(row)
    return row


def _by_seed(differences: _Values) -> tuple[float, ...]:
    """The mean of each training over the items that have a verdict in all of them."""
    resolved = differences[:, ~np.isnan(differences).any(axis=0)]
    return tuple(map(float, resolved.mean(axis=1))) if resolved.size else ()


def _median_length(answers: Sequence[str | None]) -> float | None:
    """The median number of characters of answers; None where no text is known."""
    lengths = [len(answer) for answer in answers if answer is not None]
    return float(median(lengths)) if lengths else None


def _samples(metrics: Sequence[Metric]) -> list[Sample]:
    return [sample for metric in metrics for sample in metric.samples]


def _items(samples: Sequence[Sample], asked: int = 0) -> list[_Item]:
    """The items of samples, and one for each question that was asked and has no row any more."""
    items = list(dict.fromkeys(sample.key for sample in samples))
    num_lost = asked - len({id for id, _ in items}) if items else 0
    return items + [(f"lost row {number}", 1) for number in range(num_lost)]


def _values(metrics: Sequence[Metric], items: Sequence[_Item]) -> _Values:
    """The values of metrics by item; NaN where there is none."""
    columns = {item: column for column, item in enumerate(items)}
    values = np.full((len(metrics), len(items)), np.nan)
    for row, metric in enumerate(metrics):
        for sample in metric.samples:
            column = columns.get(sample.key)
            if column is not None and sample.value is not None:
                values[row, column] = sample.value
    return values


def _values_by_training(trainings: Sequence[Sequence[Metric]], items: Sequence[_Item]) -> _Values:
    """The values of each training by item: the mean over the opponent's runs that it met."""
    return np.stack([_values(metrics, items).mean(axis=0) for metrics in trainings])


def _questions(metrics: Sequence[Metric], items: Sequence[_Item]) -> list[str]:
    """The question of each item: ids of one text are one."""
    question_of_id = question_of(_samples(metrics))
    return [question_of_id.get(id, id) for id, _ in items]


def _why_not(row: TableRow) -> str:
    """Why a test cannot carry a verdict, or nothing."""
    test = row.test
    if test is None or row.n == 0:
        return "there is no item to compare"
    questions = test.resolved.questions
    if test.unresolved == row.n:
        return "no item has a verdict"
    if row.higher_is_better is None:
        return "its files do not say, or not alike, whether higher or lower is better"
    if questions < FEWEST_QUESTIONS:
        verb = "is" if questions == 1 else "are"
        return f"{count(questions, 'question')} {verb} too few to reach p <= {ALPHA:g}"
    if np.isinf(test.resolved.reach) and questions < FEWEST_LOSSES:
        rows = count(questions, "different row")
        return f"{rows} of {row.n:,} are fewer than the {FEWEST_LOSSES} that losses need"
    if test.resolved.tail_against:
        return "a few rows differ far more than the others, in the other direction"
    end = _ENDS.get(row.unit, {}).get(row.first_value or 0.0)
    if end and row.first_value == row.second_value and not test.unresolved:
        return f"both arms have {end}, so the questions cannot tell them apart"
    return ""


def _scale(unit: str, values: _Values) -> Limits | None:
    """The ends of a metric's scale; the weighted items of a group of tasks may lie beyond one."""
    scale = UNIT_SCALES.get(unit)
    known_values = values[~np.isnan(values)]
    if scale is None or not known_values.size:
        return scale
    return min(scale[0], float(known_values.min())), max(scale[1], float(known_values.max()))


def _mean(values: _Values) -> float | None:
    return float(values.mean()) if values.size else None


def _mean_reported(metrics: Sequence[Metric]) -> float | None:
    return _mean(np.array([metric.value for metric in metrics if metric.value is not None]))


def _files(metrics: Iterable[Metric]) -> tuple[str, ...]:
    return tuple(dict.fromkeys("/".join(metric.file.parts[-4:]) for metric in metrics))


def _set_asides(rows: Sequence[TableRow], arms: Arms, aims: Aims) -> None:
    """Set aside the tasks of a group that is tested as one mean, but for those that are named."""
    metrics = {metric.name: metric for _, run in arms.runs for metric in run.metrics}
    group_of: dict[tuple[tuple[str, str], str, str], str] = {}  # by arms, eval and task
    for row in rows:
        if row.is_tested:
            metric = metrics[row.metric]
            for part in metric.parts:
                group_of.setdefault((row.arms, row.eval, part), metric.task)
    named = [metric_parts(word) for word in aims.named]
    for row in rows:
        task = metrics[row.metric].task
        group = group_of.get((row.arms, row.eval, task))
        is_named_alone = any(task in parts for parts in named)
        if group and not is_named_alone:
            row.aside = f"it is part of {group}, which is tested as one mean"


def _set_margins(rows: Sequence[TableRow], aims: Aims) -> None:
    """Set the margins of rows, and say where a margin cannot be one of its metric."""
    for row in rows:
        margin = aims.margin_of(row.metric)
        if margin is None or row.aside:
            continue
        wrong = margin.fits(row.metric, row.unit)
        if wrong:
            row.flags = (*row.flags, f"no margin: {wrong}")
        elif row.head_to_head:
            row.margin = margin.size / 2  # a difference of x between two rates: x / 2 from one half
        else:
            row.margin = margin.size


def _set_primary(rows: Sequence[TableRow], aims: Aims) -> None:
    """Mark one primary row of each two arms: the first that has a test; head to head is first."""
    if not aims.primary:
        return
    marked: set[tuple[str, str]] = set()
    for row in sorted(rows, key=lambda row: not row.is_tested):  # tested ones first
        is_about_primary = is_named(aims.primary, row.metric) and not row.aside
        if is_about_primary and row.arms not in marked:
            row.primary = True
            marked.add(row.arms)


def _score(arm: ArmRuns, opponent: str | None, measured: Measured) -> Score:
    metrics = [metric for _, metric in measured]
    trainings = [list(training.by_opponent.values()) for training in trainings_of(measured)]
    metric = metrics[0]
    items = _items(_samples(metrics), max(metric.asked for metric in metrics))
    values = _values_by_training(trainings, items)
    is_resolved = ~np.isnan(values).any(axis=0)
    table = values[:, is_resolved]
    questions = list(itertools.compress(_questions(metrics, items), is_resolved))
    scale = _scale(metric.unit, table)
    return Score(
        arm=arm.name,
        metric=metric.name,
        label=metric.label,
        opponent=opponent,
        unit=metric.unit,
        value=_mean(table) if items else _mean_reported(metrics),
        interval=mean_interval(table, questions, scale) if table.size else None,
        n=len(items) or metric.n,
        unresolved=int((~is_resolved).sum()),
        trainings=0 if arm.is_base else len(trainings),
        files=_files(metrics),
    )
