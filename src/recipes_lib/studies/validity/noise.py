"""How much changes where nothing was changed: whether that was measured, and which effects are no larger."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from recipes_lib.recipe.project import shown_path
from recipes_lib.studies.findings import Finding
from recipes_lib.studies.validity.settings import arm_values, differing, pairs

if TYPE_CHECKING:
    from recipes_lib.studies.measurements import Measurements, RunMeasurements
    from recipes_lib.studies.study import Study

Means = dict[tuple[str, str | None], dict[str, list[float]]]


def check_noise(study: Study | None, measurements: Measurements) -> Iterator[Finding]:
    """Yield whether a noise floor is missing, and the effects that lie inside the one that was measured.

    The floor is what two trainings of one recipe differ by: between seeds of an arm, or between two arms that differ in nothing but
    the seed (an A/A run).
    """
    trained = [name for name, arm in measurements.arms.items() if arm.runs and not arm.is_base and name != "base"]
    twins = _twins(study, measurements)
    several = [name for name in trained if len(measurements.arms[name].runs) > 1]
    if len(trained) > 1 and not several and not twins:
        yield _missing(study, measurements, trained)
    means = _means(measurements)
    for (metric, _), by_arm in means.items():
        floor, how = _floor(by_arm, twins)
        if floor is None:
            continue
        for first, second in pairs({name: values for name, values in by_arm.items() if name in trained}):
            if {first, second} in twins:
                continue
            effect = _mean(by_arm[first]) - _mean(by_arm[second])
            limit = _of_difference(floor, len(by_arm[first]), len(by_arm[second]))
            if abs(effect) <= limit:
                title = f"{first} and {second} differ on {metric} by no more than two trainings of one recipe do"
                evidence = (f"difference {abs(effect):.4g}, noise floor {limit:.4g} ({how})",)
                remedy = "more seeds per arm make the floor lower; until then this is no effect of the factor"
                yield Finding("inside-noise-floor", "warning", title, evidence, remedy, (first, second), (metric,))


def _twins(study: Study | None, measurements: Measurements) -> list[set[str]]:
    """Pairs of arms that differ in nothing but the seed."""
    values = {name: values for name, values in arm_values(study, measurements).items() if name in measurements.arms}
    return [{first, second} for first, second in pairs(values) if differing(values[first], values[second]) == ["train.seed"]]


def _missing(study: Study | None, measurements: Measurements, trained: list[str]) -> Finding:
    """The offer of an A/A run, as a command where there is one to give."""
    title = "No noise floor: every arm was trained once, so a difference may be that of two trainings of one recipe"
    run = measurements.arms[trained[0]].runs[0]
    evidence = tuple(f"{name}: {_seed(measurements.arms[name].runs[0])}" for name in trained)
    if study is not None and any(arm.trained for arm in study.arms):
        seeds = sorted({seed for arm in study.arms for seed in arm.seeds}) or [42]
        remedy = f"an A/A run: recipes study run {shown_path(study.path)} 'seeds=[{seeds[0]}, {seeds[-1] + 1}]'"
    elif run.imported:
        remedy = "an A/A run: train and evaluate one of the recipes twice, with two seeds"
    else:
        remedy = f"an A/A run: recipes train RECIPE train.seed={(run.seed or 42) + 1} run.name={run.name}-again, then evaluate both"
    return Finding("noise-floor-missing", "warning", title, evidence, remedy)


def _seed(run: RunMeasurements) -> str:
    return f"seed {run.seed}" if run.seed is not None else "one training, its seed not recorded"


def _means(measurements: Measurements) -> Means:
    """Mean per run of every metric: {(metric, opponent): {arm: [one per run]}}."""
    found: Means = defaultdict(lambda: defaultdict(list))
    for name, arm in measurements.arms.items():
        for run in arm.runs:
            for measure in run.measures():
                values = [item.value for item in measure.items if item.value is not None]
                mean = sum(values) / len(values) if values else measure.reported
                if mean is not None:
                    found[measure.name, measurements.opponent_name(measure.opponent)][name].append(mean)
    return found


def _floor(by_arm: dict[str, list[float]], twins: list[set[str]]) -> tuple[float | None, str]:
    """The standard deviation between trainings of one recipe times Student's factor, pooled over arms; and where it comes from."""
    groups = [values for values in by_arm.values() if len(values) > 1]
    groups += [[_mean(by_arm[name]) for name in sorted(pair)] for pair in twins if pair <= by_arm.keys()]
    freedom = sum(len(values) - 1 for values in groups)
    if not freedom:
        return None, ""
    from scipy import stats

    squares = sum((value - _mean(values)) ** 2 for values in groups for value in values)
    how = f"{freedom + len(groups)} trainings of {len(groups)} recipes, 95%"
    return math.sqrt(squares / freedom) * float(stats.t.ppf(0.975, freedom)), how


def _of_difference(floor: float, first: int, second: int) -> float:
    """The floor of a difference of two means over that many trainings."""
    return floor * math.sqrt(1 / first + 1 / second)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
