"""Do the tests and intervals keep what they promise? Simulated studies with a known truth, through
the functions the reports use.

    python benchmarks/statistics_simulation.py [--studies 10000] [--only NAME]
        [--json benchmarks/results/statistics_simulation.json]

For every kind of comparison and size: how often an arm that is no better is called "better"
(promised: <= 5%), how often the 95% interval holds the true difference (promised: 94-96% at n =
800, 93-97% at n = 80; below n = 40 what comes out is stated), and how often a difference of the
stated size is found (promised: 80%). Whole tables too: how often any of the 64 rows of the shipped
lm-eval tasks is called better or worse after Holm's correction where no arm is (promised: <= 5%).
Whole studies of 2 to 5 arms on 1 to 10 metrics, through the code that writes claims: how often one
holds any false claim (promised: <= 5%), how often the interval of its first comparison holds the
truth (94-97%), and how often the stated difference is found there (80%, three points more or less).
One core, an hour.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recipes_lib.compare.claims import Causes, judge_row
from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.row import PairedItems, TableRow
from recipes_lib.compare.table import corrected
from recipes_lib.compare.validity.case import Case
from recipes_lib.statistics import paired
from recipes_lib.statistics import seeds as over_seeds
from recipes_lib.statistics.family import Hypotheses, adjust
from recipes_lib.statistics.intervals import Interval, bca, wilson
from recipes_lib.statistics.unresolved import compare, compare_ps

Array = NDArray[np.float64]
LEVEL = 0.05


@dataclass(frozen=True)
class Result:
    """What one kind of comparison did at one size. Shares of `studies` simulated studies; None
    where it was not simulated.
    """

    name: str
    n: int
    seeds: int
    studies: int
    false_better: float | None
    false_worse: float | None
    coverage: float | None
    width: float | None
    power_at_mde: float | None


def _outcomes(rng: np.random.Generator, n: int, effect: float) -> tuple[Array, Array]:
    """Pairs won, tied and lost: 30% ties; the win rate is a half plus `effect`."""
    return rng.choice([1.0, 0.5, 0.0], n, p=[0.35 + effect, 0.3, 0.35 - effect]), np.full(n, 0.5)


def _answers(rng: np.random.Generator, n: int, effect: float) -> tuple[Array, Array]:
    """Right and wrong answers of two arms that agree on most questions; the shares differ by
    `effect`.
    """
    cell = rng.choice(4, n, p=[0.12 + effect / 2, 0.12 - effect / 2, 0.5, 0.26])
    return np.isin(cell, (0, 2)).astype(float), np.isin(cell, (1, 2)).astype(float)


def _rare(rng: np.random.Generator, n: int, effect: float) -> tuple[Array, Array]:
    """Right and wrong answers where the arms differ on 4% of the questions."""
    won, lost = (
        max(0.02 + effect / 2, effect, 0.0),
        max(0.02 - effect / 2, -effect if effect < -0.04 else 0.0, 0.0),
    )
    cell = rng.choice(3, n, p=[won, lost, 1 - won - lost])
    return (cell == 0).astype(float), (cell == 1).astype(float)


_GRADES = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
_EVEN = np.array([0.1, 0.15, 0.25, 0.3, 0.2])
_SKEWED = np.array([0.06, 0.02, 0.02, 0.1, 0.8])


def _graded(rng: np.random.Generator, n: int, effect: float, weights: Array) -> tuple[Array, Array]:
    """Grades of two arms: half of the questions get the same grade in both; the first arm loses or
    gains by mixing in another law.
    """
    same = rng.random(n) < 0.5
    second = rng.choice(_GRADES, n, p=weights)
    mean = float(weights @ _GRADES)
    share = min(1.0, abs(effect) / (0.5 * ((5.0 - mean) if effect > 0 else (mean - 1.0))))
    other = np.where(
        rng.random(n) < share, 5.0 if effect > 0 else 1.0, rng.choice(_GRADES, n, p=weights)
    )
    return np.where(same, second, other), second


def _grades(rng: np.random.Generator, n: int, effect: float) -> tuple[Array, Array]:
    return _graded(rng, n, effect, _EVEN)


def _top_grades(rng: np.random.Generator, n: int, effect: float) -> tuple[Array, Array]:
    return _graded(rng, n, effect, _SKEWED)


def _scores(rng: np.random.Generator, n: int, effect: float) -> tuple[Array, Array]:
    """Scores without a lattice whose difference is skewed by heavy tails on both sides."""
    shared = rng.normal(size=n)
    return shared + rng.standard_t(6, n) + effect, shared + rng.standard_t(6, n)


@dataclass(frozen=True)
class Kind:
    """One kind of comparison: how its items arise, the difference at which coverage is measured,
    and turns per question.

    `unresolved` is the share of the first arm's losses without a verdict, `missing` that of all its
    items, whatever they would have been. `reach` is the largest difference that `draw` can make; a
    stated one beyond it cannot be simulated.
    """

    name: str
    draw: Callable[[np.random.Generator, int, float], tuple[Array, Array]]
    effect: float
    turns: int = 1
    seeds: int = 1
    spread: float = 0.0
    unresolved: float = 0.0
    missing: float = 0.0
    scale: tuple[float, float] = (0.0, 1.0)
    largest: int = 800
    reach: float = math.inf


KINDS = (
    Kind("outcomes, head to head", _outcomes, 0.05),
    Kind("right or wrong", _answers, 0.06),
    Kind("right or wrong, 4% differ", _rare, 0.02),
    Kind("grades", _grades, 0.2, scale=(1, 5)),
    Kind("grades, four in five are 5", _top_grades, -0.2, scale=(1, 5)),
    Kind("grades, two turns", _grades, 0.2, turns=2, scale=(1, 5)),
    Kind("scores", _scores, 0.3, largest=80),
    Kind("outcomes, 2 seeds that differ", _outcomes, 0.05, seeds=2, spread=0.05, reach=0.25),
    Kind("outcomes, 3 seeds that differ", _outcomes, 0.05, seeds=3, spread=0.05, reach=0.25),
    Kind("outcomes, 5 seeds that differ", _outcomes, 0.05, seeds=5, spread=0.05, reach=0.25),
    Kind("outcomes, 3 seeds alike", _outcomes, 0.05, seeds=3),
    Kind("outcomes, 5% of the losses unresolved", _outcomes, 0.05, unresolved=0.05),
    Kind("outcomes, 2% unresolved", _outcomes, 0.05, missing=0.02, reach=0.35),
    Kind("outcomes, 5% unresolved", _outcomes, 0.05, missing=0.05, reach=0.35),
)
SIZES = (10, 20, 40, 80, 800)
# Questions of the 57 subjects of MMLU, of arc_challenge and arc_easy (acc and acc_norm), of gsm8k
# (two filters) and of truthfulqa_mc2.
LM_EVAL_ROWS = (
    *(
        100,
        135,
        152,
        100,
        265,
        144,
        100,
        100,
        100,
        173,
        102,
        100,
        235,
        114,
        145,
        378,
        126,
        100,
        310,
        203,
    ),
    *(
        100,
        165,
        198,
        193,
        390,
        270,
        238,
        151,
        545,
        216,
        204,
        237,
        223,
        131,
        121,
        108,
        163,
        112,
        103,
        234,
    ),
    *(100, 783, 346, 895, 306, 311, 324, 282, 1534, 272, 612, 110, 245, 201, 100, 166, 171),
    *(1172, 1172, 2376, 2376, 1319, 1319, 817),
)
# share of the questions that a model may answer rightly in one training and wrongly in the next
UNSTABLE = 0.3


def one_study(kind: Kind, n: int, effect: float, rng: np.random.Generator) -> paired.Tested:
    """Draw one study and test it as a report does. n counts questions; each has `turns` items."""
    questions = n
    first, second = [], []
    for _ in range(kind.seeds):
        moved = effect + (rng.normal(0, kind.spread) if kind.spread else 0.0)
        moved = float(np.clip(moved, -0.35, 0.35)) if kind.spread else moved
        a, b = kind.draw(rng, questions, moved)
        if kind.turns > 1:  # turns of one question share most of what makes them good or bad
            again = kind.draw(rng, questions, moved)
            same = rng.random(questions) < 0.6
            a, b = (
                np.concatenate([one, np.where(same, one, other)])
                for one, other in zip((a, b), again, strict=True)
            )
        first.append(a)
        second.append(b)
    values = np.stack(first)
    if kind.unresolved:
        hidden = (rng.random(values.shape) < kind.unresolved) & (values < 0.5)
        values = np.where(hidden, np.nan, values)
    if kind.missing:
        values = np.where(rng.random(values.shape) < kind.missing, np.nan, values)
    clusters = np.tile(np.arange(questions), kind.turns)
    return compare(values, np.stack(second), clusters, scale=kind.scale)


@contextmanager
def _tests_alone() -> Iterator[None]:
    """Leave the intervals out where only p is counted: the bootstrap is nine tenths of the time."""
    whole = paired.mean_interval
    for module in (paired, over_seeds):
        module.mean_interval = lambda values, *rest, **options: Interval(
            float(np.mean(values)), None, None, len(values), "left out"
        )  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in (paired, over_seeds):
            module.mean_interval = whole  # type: ignore[attr-defined]


def simulate(kind: Kind, n: int, studies: int, seed: int = 0) -> Result:
    """Return what one kind of comparison does at one size."""
    rng = np.random.default_rng([seed, n, *kind.name.encode()])
    better = worse = 0
    with _tests_alone():
        for _ in range(studies):
            tested = one_study(kind, n, 0.0, rng)
            shown = tested.p is not None and tested.p <= LEVEL
            better += shown and tested.effect > 0
            worse += shown and tested.effect < 0
    covered, widths = 0, []
    for _ in range(studies):
        tested = one_study(kind, n, kind.effect, rng)
        covered += tested.low is not None and tested.low <= kind.effect <= tested.high
        widths.append((tested.high or 0) - (tested.low or 0))
    found = power(kind, n, studies, rng) if n >= 80 and not kind.unresolved else None
    return Result(
        kind.name,
        n,
        kind.seeds,
        studies,
        better / studies,
        worse / studies,
        covered / studies,
        float(np.mean(widths)),
        found,
    )


def power(kind: Kind, n: int, studies: int, rng: np.random.Generator) -> float | None:
    """Return how often a difference is found that is as large as the studies say they would find:
    the size that agrees with itself.

    None where that size cannot occur, as with two seeds that differ.
    """
    size = abs(kind.effect)
    with _tests_alone():
        for _ in range(4):
            stated = [
                one_study(kind, n, math.copysign(size, kind.effect), rng).mde() for _ in range(200)
            ]
            size = float(np.mean([one for one in stated if one is not None]))
            if size > kind.reach:
                return None
        hits = [one_study(kind, n, math.copysign(size, kind.effect), rng).p for _ in range(studies)]
    return sum(p is not None and p <= LEVEL for p in hits) / studies


def simulate_table(seeds: int, spread: float, studies: int) -> Result:
    """Return how often two arms that are alike get a claim in any row of the shipped lm-eval tasks,
    after Holm's correction.

    Args:
        spread: standard deviation of a training's accuracy in one row.
    """
    rng = np.random.default_rng([11, seeds, round(1000 * spread)])

    def answers(known: Array, unstable: NDArray[np.bool_]) -> Array:
        chances = np.clip(0.5 + rng.normal(0, spread, (seeds, 1)) / UNSTABLE, 0, 1)
        return np.where(unstable, rng.random((seeds, len(known))) < chances, known).astype(float)

    better = worse = 0
    with _tests_alone():
        for _ in range(studies):
            tested = []
            for n in LM_EVAL_ROWS:
                known, unstable = (rng.random(n) < 0.6).astype(float), rng.random(n) < UNSTABLE
                tested.append(compare(answers(known, unstable), answers(known, unstable)))
            adjusted = adjust([Hypotheses(1.0 if one.p is None else one.p) for one in tested])
            shown = [
                one.effect
                for one, result in zip(tested, adjusted, strict=True)
                if result.p <= LEVEL
            ]
            better += any(effect > 0 for effect in shown)
            worse += any(effect < 0 for effect in shown)
    return Result(
        table_name(seeds, spread),
        sum(LM_EVAL_ROWS),
        seeds,
        studies,
        better / studies,
        worse / studies,
        None,
        None,
        None,
    )


def table_name(seeds: int, spread: float) -> str:
    """Return what `simulate_table` calls its result."""
    trainings = (
        f"{seeds} seeds {f'that differ by {100 * spread:g} points' if spread else 'alike'}"
        if seeds > 1
        else "1 seed"
    )
    return f"{len(LM_EVAL_ROWS)} rows of lm-eval, {trainings}"


@dataclass(frozen=True)
class Scores:
    """How the scores of a study arise: a question's difficulty, which all arms and metrics share,
    a training's luck, and what an arm makes of a question.

    `read` turns what an arm makes of it into its score. Trainings differ by `spread`; what they
    have in common, each question included, is `alike` of the variance. `missing` scores are open.
    """

    name: str
    read: Callable[[Array], Array]
    unit: str = "share"
    seeds: int = 1
    spread: float = 0.0
    alike: float = 0.6
    missing: float = 0.0


def _right(values: Array) -> Array:
    return (values > 0).astype(float)


def _grade(values: Array) -> Array:
    return np.clip(np.rint(3.3 + 1.2 * values), 1, 5)


def _high_grade(values: Array) -> Array:
    return np.clip(np.rint(5.2 + 1.2 * values), 1, 5)


def _tied(values: Array) -> Array:
    """Lost, tied, won against a reference: half of them tied."""
    return np.where(values > 0.7, 1.0, np.where(values < -0.7, 0.0, 0.5))


SCORES = (
    Scores("right or wrong", _right),
    Scores("right or wrong, arms nearly alike", _right, alike=0.97),
    Scores("grades", _grade, "grade"),
    Scores("grades, most are 5", _high_grade, "grade"),
    Scores("outcomes, half tied", _tied),
    Scores("right or wrong, 3% open", _right, missing=0.03),
    # Trainings differ by more than the questions' part of a mean: 10 points and more.
    Scores("right or wrong, 2 seeds", _right, seeds=2, spread=0.3),
    Scores("right or wrong, 3 seeds", _right, seeds=3, spread=0.3),
    Scores("grades, 2 seeds", _grade, "grade", seeds=2, spread=0.3),
)
# arms, metrics, questions
STUDIES = (
    *((2, 1, 10), (4, 2, 20), (3, 3, 40), (2, 10, 80)),
    *((5, 1, 200), (5, 10, 100), (2, 1, 805), (3, 3, 805)),
)
_BATCH = 250  # studies in memory at once


def draw_studies(
    scores: Scores, arms: int, metrics: int, n: int, studies: int, rng: np.random.Generator
) -> Array:
    """Return the scores of studies whose arms are alike: study, metric, arm, seed, question."""
    shape = (studies, metrics, arms, scores.seeds, n)

    def part(share: float, *kept: int) -> Array:
        """Normal deviates with this share of the variance, the same along the other axes."""
        size = [length if axis in kept else 1 for axis, length in enumerate(shape)]
        return np.asarray(math.sqrt(share) * rng.normal(size=size))

    rest = 1 - scores.alike
    known = part(scores.alike * 0.7, 0, 4) + part(scores.alike * 0.3, 0, 1, 4)
    own = part(rest * 0.5, 0, 2, 4) + part(rest * 0.5, 0, 1, 2, 3, 4)
    values = scores.read(known + own + part(scores.spread**2, 0, 2, 3))
    if scores.missing:
        values = np.where(rng.random(shape) < scores.missing, np.nan, values)
    return values


def simulate_study(scores: Scores, arms: int, metrics: int, n: int, studies: int) -> Result:
    """Return how often whole studies of arms that are alike hold a claim, how often the first
    comparison's interval holds the truth, and how often the stated difference is found in it.
    """
    rng = np.random.default_rng([13, arms, metrics, n, *scores.name.encode()])
    better = worse = covered = 0
    widths: list[float] = []
    sizes: list[float | None] = []
    drawn = partial(draw_studies, scores, arms, metrics, n, _BATCH, rng)
    tables = (table for _ in range(studies // _BATCH) for table in _tables(drawn(), scores))
    for table in tables:
        shown = claims_of(table)
        better += any(row.verdict == "better" for row in shown)
        worse += any(row.verdict == "worse" for row in shown)
        first = table[0].paired.tested()
        # An interval of no width is none, and says nothing false.
        covered += first.low is None or first.low <= 0 <= first.high
        widths.append(0.0 if first.low is None else first.high - first.low)
        if len(sizes) < 200:
            sizes.append(corrected([replace(table[0], tested=first), *table[1:]])[0].mde)
    stated = [size for size in sizes if size is not None]
    found: int | None = None
    if len(stated) == len(sizes) and n >= 40:
        found = 0
        for _ in range(studies // _BATCH):
            values = drawn()
            if not plant(values, float(np.mean(stated)), rng):
                found = None
                break
            for table in _tables(values, scores):
                row = corrected(table, power=False)[0]
                row = judge_row(replace(row, tested=row.paired.tested()), (), _CAUSES)
                found += row.verdict == "better"
    return Result(
        study_name(scores, arms, metrics),
        n,
        scores.seeds,
        studies,
        better / studies,
        worse / studies,
        covered / studies,
        float(np.mean(widths)),
        None if found is None else found / studies,
    )


def study_name(scores: Scores, arms: int, metrics: int) -> str:
    """Return what `simulate_study` calls its result."""
    return f"study of {arms} arms, {metrics} metric{'s' * (metrics > 1)}: {scores.name}"


def plant(values: Array, size: float, rng: np.random.Generator) -> bool:
    """Exchange the first two arms in questions until the first one is better by `size` on the first
    metric, in all studies on average; whether the scores differ enough for that.
    """
    apart = np.nan_to_num(values[:, 0, 0] - values[:, 0, 1]).sum(axis=1)  # study, question
    known = ~np.isnan(values[:, 0, :2]).any(axis=(1, 2))
    most = float(np.abs(apart).sum() / (values.shape[3] * known.sum()))
    if size > most:
        return False
    wanted = rng.random(apart.shape) < 0.5 + size / (2 * most)
    turned = np.where(apart > 0, ~wanted, np.where(apart < 0, wanted, False))[:, None, None]
    first, second = values[:, :, 0].copy(), values[:, :, 1].copy()
    values[:, :, 0] = np.where(turned, second, first)
    values[:, :, 1] = np.where(turned, first, second)
    return True


def _tables(values: Array, scores: Scores) -> Iterator[list[TableRow]]:
    """Yield the tested rows of each study, without intervals; the first one is primary."""
    _, metrics, arms, _, n = values.shape
    scale = (1.0, 5.0) if scores.unit == "grade" else (0.0, 1.0)
    items = [(f"q{number}", 1) for number in range(n)]
    questions = np.arange(n)
    cells = [(m, a, b) for m in range(metrics) for a, b in itertools.combinations(range(arms), 2)]
    tests = [
        compare_ps(values[:, m, a], values[:, m, b], questions, scale=scale) for m, a, b in cells
    ]
    blank = paired.Tested(
        effect=None,
        low=None,
        high=None,
        p=None,
        n=n,
        questions=n,
        seeds=scores.seeds,
        test="",
        interval_method="",
    )
    for study, one in enumerate(values):
        rows = []
        for (m, a, b), (effects, ps) in zip(cells, tests, strict=True):
            p = None if math.isnan(ps[study]) else float(ps[study])
            tested = replace(blank, effect=float(effects[study]), p=p)
            rows.append(
                TableRow(
                    metric=f"m{m}",
                    label=f"m{m}",
                    first=f"arm{a}",
                    second=f"arm{b}",
                    unit=scores.unit,
                    first_value=None,
                    second_value=None,
                    primary=m == 0,
                    tested=tested,
                    paired=PairedItems(one[m, a], one[m, b], items, scale, scale[1] - scale[0]),
                )
            )
        yield rows


_CAUSES = Causes(Case(None, Measurements({})), {}, LEVEL)


def claims_of(rows: list[TableRow]) -> list[TableRow]:
    """Return the rows of a study that its report calls better or worse."""
    if not any(row.tested.p is not None and row.tested.p <= LEVEL for row in rows):
        return []
    judged = [
        judge_row(replace(row, tested=row.paired.tested()), (), _CAUSES)
        for row in corrected(rows, power=False)
        if row.p_holm is not None and row.p_holm <= LEVEL
    ]
    return [row for row in judged if row.verdict in ("better", "worse")]


def simulate_wilson(n: int, studies: int, share: float) -> Result:
    """Return the coverage of the Wilson interval: exact, over all counts that can occur."""
    from scipy import stats

    chances = stats.binom.pmf(np.arange(n + 1), n, share)
    intervals = [wilson(count, n) for count in range(n + 1)]
    covered = sum(
        chance
        for chance, one in zip(chances, intervals, strict=True)
        if one.low <= share <= one.high
    )
    width = sum(
        chance * (one.high - one.low) for chance, one in zip(chances, intervals, strict=True)
    )
    return Result(
        f"a share of {share:g} (Wilson, exact)",
        n,
        1,
        studies,
        None,
        None,
        float(covered),
        float(width),
        None,
    )


def simulate_seed_bootstrap(n: int, studies: int, seeds: int) -> Result:
    """Return what resampling seeds would have done: the interval that is not used, to show why."""
    rng = np.random.default_rng([7, n, seeds])
    covered, widths = 0, []
    for _ in range(studies):
        moved = rng.normal(0.05, 0.05, seeds)
        means = np.array(
            [_outcomes(rng, n, float(np.clip(one, -0.35, 0.35)))[0].mean() - 0.5 for one in moved]
        )
        interval = bca(means, resamples=1000)
        covered += interval.low is not None and interval.low <= 0.05 <= interval.high
        widths.append(interval.high - interval.low)
    return Result(
        f"not used: bootstrap over {seeds} seeds",
        n,
        seeds,
        studies,
        None,
        None,
        covered / studies,
        float(np.mean(widths)),
        None,
    )


def run(
    studies: int, only: str | None = None, known: Collection[tuple[str, int]] = ()
) -> Iterator[Result]:
    """Yield every result that is not known yet, the cheap kinds first."""
    tasks: list[tuple[str, int, Callable[[], Result]]] = []
    for kind in sorted(KINDS, key=lambda kind: not kind.name.startswith(("outcomes", "right"))):
        tasks += [
            (kind.name, n, partial(simulate, kind, n, studies)) for n in SIZES if n <= kind.largest
        ]
    for share in (0.5, 0.8, 0.95):
        tasks += [
            (
                f"a share of {share:g} (Wilson, exact)",
                n,
                partial(simulate_wilson, n, studies, share),
            )
            for n in SIZES
        ]
    tasks += [
        (
            f"not used: bootstrap over {seeds} seeds",
            800,
            partial(simulate_seed_bootstrap, 800, studies, seeds),
        )
        for seeds in (2, 3, 5)
    ]
    # One training that differs from the next is no seed of anything: no test over questions can
    # know (docs/studies.md).
    for seeds, spread in ((1, 0.0), (2, 0.0), (3, 0.0), (2, 0.03), (3, 0.03)):
        tasks.append(
            (
                table_name(seeds, spread),
                sum(LM_EVAL_ROWS),
                partial(simulate_table, seeds, spread, studies),
            )
        )
    tasks += [
        (
            study_name(scores, arms, metrics),
            n,
            partial(simulate_study, scores, arms, metrics, n, min(studies, 1000)),
        )
        for arms, metrics, n in STUDIES
        for scores in SCORES
    ]
    for name, n, work in tasks:
        if (not only or only in name) and (name, n) not in known:
            yield work()


def _rounded(values: dict[str, object]) -> dict[str, object]:
    return {
        key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()
    }


def main() -> None:
    """Simulate, print the table, and keep it."""
    parser = argparse.ArgumentParser(
        description="False positives, coverage and power of the statistics, by simulation."
    )
    parser.add_argument("--studies", type=int, default=10_000)
    parser.add_argument("--only", help="kinds whose name holds this")
    parser.add_argument(
        "--json",
        help="also keep the results here; those that are there already are not simulated again",
    )
    options = parser.parse_args()
    begun = time.process_time()
    print(f"{'kind':38} {'n':>4}  better  worse  coverage  width  power at the stated size")
    results, spent = _kept(Path(options.json), options.studies) if options.json else ([], 0.0)
    for result in run(options.studies, options.only, {(one.name, one.n) for one in results}):
        results.append(result)
        numbers = (
            result.false_better,
            result.false_worse,
            result.coverage,
            result.width,
            result.power_at_mde,
        )
        shown = ["     -" if value is None else f"{value:6.3f}" for value in numbers]
        print(f"{result.name:38} {result.n:>4}  {'  '.join(shown)}", flush=True)
        if options.json:
            _write(Path(options.json), spent + time.process_time() - begun, results)
    print(f"{options.studies} studies each, {time.process_time() - begun:.0f} CPU s")


def _kept(path: Path, studies: int) -> tuple[list[Result], float]:
    """What earlier calls kept that rests on at least as many studies, and the CPU seconds they
    took.
    """
    value = (
        json.loads(path.read_text(encoding="utf-8"))
        if path.is_file()
        else {"results": [], "cpu_seconds": 0}
    )
    return [Result(**one) for one in value["results"] if one["studies"] >= studies], value[
        "cpu_seconds"
    ]


def _write(path: Path, seconds: float, results: list[Result]) -> None:
    """Keep the results so far."""
    value = {
        "machine": (
            f"{platform.machine()}, one core, Python {platform.python_version()}, numpy"
            f" {np.__version__}"
        ),
        "cpu_seconds": round(seconds),
        "results": [_rounded(asdict(one)) for one in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
