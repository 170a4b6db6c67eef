"""The table of a study: every arm's score with its interval, and every pair of arms on every metric
that both have, tested.

No sentence is written here (`claims` does that) and no file read (`measurements` did).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from recipes_lib.compare.aims import Aims, is_named
from recipes_lib.compare.head_to_head import head_to_head_rows
from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.row import (
    ALPHA,
    ItemValues,
    TableRow,
    corrected_values,
    files_of,
    filling_of,
    measures_of,
    reported,
    scale_of,
    values_of,
)
from recipes_lib.compare.side_by_side import side_by_side_rows
from recipes_lib.compare.training_speed import training_speed_rows
from recipes_lib.eval_log import EvalLog, Measure
from recipes_lib.statistics.family import Hypotheses, adjust
from recipes_lib.statistics.intervals import Interval, mean_interval, wilson
from recipes_lib.statistics.labels import num_labels
from recipes_lib.statistics.seeds import crossed_interval, question_means

# What yields the rows of two arms; a kind of rows is one file and one line here.
ROW_KINDS: tuple[Callable[[Measurements, str, str], Iterator[TableRow]], ...] = (
    head_to_head_rows,
    side_by_side_rows,
    training_speed_rows,
)


@dataclass(frozen=True)
class Score:
    """One arm on one metric: the mean with its interval, and the bounds that unresolved items
    leave.
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


def pairs_of(measurements: Measurements, base: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return the pairs of arms, the later one first; pairs with a base model come last."""
    pairs = [
        (first, second) if second in base else (second, first)
        for first, second in itertools.combinations(measurements.arms, 2)
    ]
    return sorted(pairs, key=lambda pair: any(name in base for name in pair))


def build_rows(
    measurements: Measurements, base: Sequence[str] = (), aims: Aims | None = None
) -> list[TableRow]:
    """Return every comparison with its test; those that are only shown say why.

    Args:
        base: names of the arms that are base models.
    """
    rows = [
        row
        for pair in pairs_of(measurements, base)
        for rows_of in ROW_KINDS
        for row in rows_of(measurements, *pair)
    ]
    aims = aims or Aims()
    asides = _parts_of_groups(rows, aims) | _same_questions(rows, aims)
    return [
        replace(row, aside=asides.get(number, "")) if row.measures else row
        for number, row in enumerate(rows)
    ]


def _parts_of_groups(rows: Sequence[TableRow], aims: Aims) -> dict[int, str]:
    """Why rows of tasks are only shown: their group is tested as one mean."""
    groups = {
        (row.arms, row.measures[0].eval, part): row.measures[0].task
        for row in reversed(rows)
        if row.measures and _p(row) is not None
        for part in row.measures[0].parts
    }
    found: dict[int, str] = {}
    for number, row in enumerate(rows):
        one = row.measures[0] if row.measures else None
        group = groups.get((row.arms, one.eval, one.task)) if one else None
        if one and group and not aims.subtasks and not aims.asks_for(one.task):
            found[number] = f"it is a part of {group}, which is tested as one mean"
    return found


def _same_questions(rows: Sequence[TableRow], aims: Aims) -> dict[int, str]:
    """Why rows are only shown whose task is tested by another of its metrics: of accuracies the
    normalised one where there is one, of several filters the first; one that a study names before
    all others.
    """
    questions: dict[object, list[int]] = {}
    for number, row in enumerate(rows):
        if row.measures and row.measures[0].suite == "lm_eval" and _p(row) is not None:
            metric = row.measures[0].metric.partition(",")[0]
            metric = "acc" if metric.startswith("acc_") else metric
            key = (row.arms, row.opponent, row.measures[0].eval, row.measures[0].task, metric)
            questions.setdefault(key, []).append(number)
    found: dict[int, str] = {}
    for numbers in questions.values():
        names = {number: rows[number].measures[0].metric for number in numbers}
        chosen = min(
            numbers,
            key=lambda number: (
                not aims.asks_for(names[number]),
                not names[number].startswith("acc_norm"),
                number,
            ),
        )
        found |= {
            number: f"{names[chosen]} of the same task is tested in its place"
            for number in numbers
            if number != chosen
        }
    return found


def with_primary(rows: Sequence[TableRow], primary: str | None) -> list[TableRow]:
    """Return the rows with those marked that answer the primary question: of every two arms the
    first tested one of its metric, which is the one head to head where there is one.
    """
    first: dict[tuple[str, str], TableRow] = {}
    for row in rows:
        if primary and _p(row) is not None and is_named(primary, row.metric):
            first.setdefault(row.arms, row)
    return [replace(row, primary=first.get(row.arms) is row) for row in rows]


def with_margins(rows: Sequence[TableRow], aims: Aims) -> list[TableRow]:
    """Return the rows with their margins; one that is none of its row's metric is a flag."""
    found = []
    for row in rows:
        margin = aims.margin_of(row.metric)
        if margin and not row.aside:
            wrong = margin.fits(row.label, row.unit == "share")
            flags = (*row.flags, f"no margin: {wrong}") if wrong else row.flags
            row = replace(row, margin=None if wrong else margin.size, flags=flags)
        found.append(row)
    return found


def corrected(rows: Sequence[TableRow], *, power: bool = True) -> list[TableRow]:
    """Return the rows with adjusted p, and power at the level that the smallest p of their family
    is held to.

    Args:
        power: False to leave that out, which takes longer than all else.
    """
    values = [_p(row) for row in rows]
    tested = [
        Hypotheses(_over_looks(row, p), _bounds(row), row.primary)
        for row, p in zip(rows, values, strict=True)
        if p is not None
    ]
    results = iter(adjust(tested, ALPHA))
    return [
        row if p is None else _adjusted(row, next(results), power)
        for row, p in zip(rows, values, strict=True)
    ]


def _adjusted(row: TableRow, result: Hypotheses, power: bool) -> TableRow:
    level = result.level * row.level_share
    tested = row.tested if power and level else None
    above, below = result.bounds or (None, None)
    return replace(
        row,
        p_holm=result.p,
        p_not_worse=above if row.higher_is_better else below,
        p_not_better=below if row.higher_is_better else above,
        mde=tested.mde(level) if tested else None,
        needed=tested.questions_needed(level) if tested else None,
    )


def _bounds(row: TableRow) -> tuple[float, ...]:
    """Twice the one-sided p of lying above the lower end of the margin, and below the upper end."""
    if row.margin is None or row.tested is None:
        return ()
    effect, found = row.tested.effect or 0.0, []
    for end, inside in ((-row.margin, effect > -row.margin), (row.margin, effect < row.margin)):
        p = row.tested.touching(end) if inside else None
        found.append(1.0 if p is None else _over_looks(row, p))
    return tuple(found)


def _over_looks(row: TableRow, p: float) -> float:
    """A p of this look as one of all looks at the row's comparison."""
    return min(1.0, p / row.level_share) if row.level_share else 1.0


def is_tested(row: TableRow) -> bool:
    """Return whether a row enters the correction."""
    return not (row.tested is None or row.reason or row.aside)


def _p(row: TableRow) -> float | None:
    """The p that enters the correction: 1 where the test was made and no item differs."""
    if row.tested is None or not is_tested(row):
        return None
    return 1.0 if row.tested.p is None else row.tested.p


# ---- Scores ----


def build_scores(measurements: Measurements) -> list[Score]:
    """Return every arm's score on every metric, with intervals over questions and, where there are
    several, seeds.
    """
    return [
        _score(name, opponent, measures)
        for name in measurements.arms
        for (_, opponent), measures in measures_of(measurements, name).items()
    ]


def _score(arm: str, opponent: str | None, measures: Sequence[Measure]) -> Score:
    one = measures[0]
    table, keys = values_of(measures)
    label, corrected = one.label, corrected_values(measures)
    if corrected is not None:
        labels = num_labels(table, values_of(measures, human=True)[0])
        label, table = f"{label}, corrected by {labels:,} human labels", corrected
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
        label,
        opponent,
        one.unit,
        interval.estimate if keys else reported(measures),
        None if flat else interval.low,
        None if flat else interval.high,
        len(keys) or int(one.reported_n or 0),
        len(measures),
        int((~known).sum()),
        lowest,
        highest,
        interval.method if keys else "reported",
        one.higher_is_better,
        files_of(measures),
    )


def _score_interval(table: ItemValues, questions: Sequence[str]) -> Interval:
    """Wilson for plain shares, crossed for several seeds, else the bootstrap over questions."""
    if table.shape[0] > 1:
        return crossed_interval(question_means(table, np.asarray(questions)))[0]
    values = table[0]
    if len(values) and np.isin(values, (0.0, 1.0)).all() and len(set(questions)) == len(values):
        return wilson(int(values.sum()), len(values))
    return mean_interval(values, np.asarray(questions) if len(values) else None)


# ---- Flags ----


def with_flags(row: TableRow, measurements: Measurements) -> TableRow:
    """Return the row with flags about how its numbers came to be."""
    flags = ["primary question"] * row.primary + list(row.flags)
    logs = {log.file: log for arm in measurements.arms.values() for log in arm.logs}
    for measure in row.measures:
        if measure.file in logs:
            flags += _flags_of(measure, logs[measure.file])
    return replace(row, flags=tuple(dict.fromkeys(flags)))


def _flags_of(measure: Measure, log: EvalLog) -> Iterator[str]:
    """Flags of one measure: subset, judge, orders, few-shot."""
    if log.subset:
        yield f"n = {measure.reported_n}, a subset" if measure.reported_n else "a subset"
    if log.judge and log.judge.weak:
        yield "weak judge"
    yield from log.flags
    for task in log.tasks:
        mine = task.task == measure.task and measure.label.endswith(task.shown)
        if mine and task.num_fewshot is not None:
            yield f"{task.num_fewshot}-shot"
