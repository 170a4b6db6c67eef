"""How much changes where nothing was changed: whether that was measured, and which effects are no
larger.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recipes_lib.compare.findings import Finding
from recipes_lib.compare.validity.settings import arm_values, changed, differing, pairs
from recipes_lib.compare.wording import count
from recipes_lib.core.project import shown_path

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import Measurements, RunMeasurements

INSIDE_NOISE = "inside-noise-floor"
Means = dict[tuple[str, str | None], dict[str, list[float]]]


@dataclass(frozen=True)
class Floor:
    """How much trainings of one recipe differ on one metric: their standard deviation, and how many
    trainings know it.
    """

    deviation: float
    freedom: int
    recipes: int

    def limit(self, first: int, second: int, alpha: float = 0.05) -> float:
        """Return what two means over that many trainings of one recipe differ by at most, with
        probability 1 - alpha.
        """
        from scipy import stats

        return (
            self.deviation
            * float(stats.t.ppf(1 - alpha / 2, self.freedom))
            * math.sqrt(1 / first + 1 / second)
        )

    def __str__(self) -> str:
        return f"{self.freedom + self.recipes} trainings of {count(self.recipes, 'recipe')}"


def noise_floors(
    study: Study | None, measurements: Measurements
) -> dict[tuple[str, str | None], Floor]:
    """Return the noise floor of every metric and opponent that has one: between seeds of an arm, or
    between two arms of an A/A pair.
    """
    twins = _twins(study, measurements)
    floors = {}
    for key, by_arm in _means(measurements).items():
        if (floor := _floor(by_arm, twins)) is not None:
            floors[key] = floor
    return floors


def check_noise(study: Study | None, measurements: Measurements) -> Iterator[Finding]:
    """Yield whether a noise floor is missing, and the effects that lie inside the one that was
    measured.
    """
    trained = [
        name
        for name, arm in measurements.arms.items()
        if arm.runs and not arm.is_base and name != "base"
    ]
    twins = _twins(study, measurements)
    several = [name for name in trained if len(measurements.arms[name].runs) > 1]
    if len(trained) > 1 and not several and not twins:
        yield _missing(study, measurements, trained)
    means = _means(measurements)
    for key, floor in noise_floors(study, measurements).items():
        metric, by_arm = key[0], means[key]
        for first, second in pairs(
            {name: values for name, values in by_arm.items() if name in trained}
        ):
            if {first, second} in twins:
                continue
            effect = _mean(by_arm[first]) - _mean(by_arm[second])
            limit = floor.limit(len(by_arm[first]), len(by_arm[second]))
            if abs(effect) <= limit:
                title = (
                    f"{first} and {second} differ on {metric} by no more than two trainings of one"
                    " recipe do"
                )
                evidence = (
                    f"difference {abs(effect):.4g}, noise floor {limit:.4g} ({floor}, 95%)",
                )
                remedy = (
                    "more seeds per arm make the floor lower; until then this is no effect of the"
                    " factor"
                )
                yield Finding(
                    INSIDE_NOISE, "warning", title, evidence, remedy, (first, second), (metric,)
                )


def _twins(study: Study | None, measurements: Measurements) -> list[set[str]]:
    """Pairs of arms of one recipe with other seeds."""
    values = {
        name: values
        for name, values in arm_values(study, measurements).items()
        if name in measurements.arms
    }
    return [
        {first, second}
        for first, second in pairs(values)
        if not changed(study, values[first], values[second])
        and "train.seed" in differing(values[first], values[second])
    ]


def _missing(study: Study | None, measurements: Measurements, trained: list[str]) -> Finding:
    """The offer of an A/A run, as a command where there is one to give."""
    title = (
        "No noise floor: every arm was trained once, so a difference may be that of two trainings"
        " of one recipe"
    )
    run = measurements.arms[trained[0]].runs[0]
    evidence = tuple(f"{name}: {_seed(measurements.arms[name].runs[0])}" for name in trained)
    if study is not None and any(arm.trained for arm in study.arms):
        seeds = sorted({seed for arm in study.arms for seed in arm.seeds}) or [42]
        remedy = (
            f"an A/A run: recipes study run {shown_path(study.path)} 'seeds=[{seeds[0]},"
            f" {seeds[-1] + 1}]'"
        )
    elif run.imported:
        remedy = "an A/A run: train and evaluate one of the recipes twice, with two seeds"
    else:
        remedy = (
            f"an A/A run: recipes train RECIPE train.seed={(run.seed or 42) + 1}"
            f" run.name={run.name}-again, then evaluate both"
        )
    return Finding("noise-floor-missing", "warning", title, evidence, remedy)


def _seed(run: RunMeasurements) -> str:
    return f"seed {run.seed}" if run.seed is not None else "one training, its seed not recorded"


def _means(measurements: Measurements) -> Means:
    """Mean per run of every metric: {(metric, opponent): {arm: [one per run]}}."""
    found: Means = defaultdict(lambda: defaultdict(list))
    for name, arm in measurements.arms.items():
        for run in arm.runs:
            for measure in run.measures():
                values = [item.value for item in measure.samples if item.value is not None]
                mean = sum(values) / len(values) if values else measure.reported
                if mean is not None:
                    found[measure.name, measurements.opponent_name(measure.opponent)][name].append(
                        mean
                    )
    return found


def _floor(by_arm: dict[str, list[float]], twins: list[set[str]]) -> Floor | None:
    """The standard deviation between trainings of one recipe, pooled over recipes; None where none
    was trained twice.
    """
    recipes: list[list[str]] = []
    for name in by_arm:
        twin = next(
            (arms for arms in recipes if any({name, other} in twins for other in arms)), None
        )
        recipes.append([name]) if twin is None else twin.append(name)
    groups = [[value for name in arms for value in by_arm[name]] for arms in recipes]
    groups = [values for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in groups)
    if not freedom:
        return None
    squares = sum((value - _mean(values)) ** 2 for values in groups for value in values)
    return Floor(math.sqrt(squares / freedom), freedom, len(groups))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
