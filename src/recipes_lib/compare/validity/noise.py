"""Effects that are no larger than chance, and numbers that were chosen for being good."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import special

from recipes_lib.compare.findings import INSIDE_NOISE, Finding, found
from recipes_lib.compare.row import corrected_values
from recipes_lib.compare.validity.case import SEED, Case, changed, differing, metrics_of, pairs
from recipes_lib.compare.validity.grid import grid_of
from recipes_lib.compare.wording import count
from recipes_lib.core.project import shown_path
from recipes_lib.eval_log import Measure

MANY = 3
_Key = tuple[str, str | None, bool]  # metric, opponent, whether human labels correct its values


@dataclass(frozen=True)
class Floor:
    """The standard deviation between trainings of one recipe on one metric."""

    deviation: float
    freedom: int
    recipes: int

    def limit(self, first: int, second: int, alpha: float = 0.05) -> float:
        """Return what two means over that many trainings of one recipe differ by at most, with
        probability 1 - alpha.
        """
        quantile = float(special.stdtrit(self.freedom, 1 - alpha / 2))
        return self.deviation * quantile * math.sqrt(1 / first + 1 / second)

    def __str__(self) -> str:
        return f"{self.freedom + self.recipes} trainings of {count(self.recipes, 'recipe')}"


def noise_floors(case: Case) -> dict[_Key, Floor]:
    """Return the noise floor of every metric and opponent that has one: between seeds of an arm, or
    between two arms of an A/A pair.
    """
    twins = _twins(case)
    floors = {key: _floor(by_arm, twins) for key, by_arm in _means(case).items()}
    return {key: floor for key, floor in floors.items() if floor is not None}


def check_noise(case: Case) -> Iterator[Finding]:
    """Yield whether a noise floor is missing, and the effects that lie inside one."""
    trained = [name for name in case.trained if name != "base"]
    twins, means = _twins(case), _means(case)
    several = any(len(case.arms[name].runs) > 1 for name in trained)
    if len(trained) > 1 and not several and not twins:
        yield _missing(case, trained)
    for key, floor in noise_floors(case).items():
        metric, opponent, labels = key
        corrected = means.get((metric, opponent, True), {})
        for arms in pairs(name for name in means[key] if name in trained):
            if labels != (set(arms) <= set(corrected)):
                continue  # that is not what is tested
            one, other = (means[key][name] for name in arms)
            effect, limit = abs(_mean(one) - _mean(other)), floor.limit(len(one), len(other))
            if set(arms) not in twins and effect <= limit:
                evidence = f"difference {effect:.4g}, noise floor {limit:.4g} ({floor}, 95%)"
                yield found(INSIDE_NOISE, [evidence], arms, (metric,), metric=metric)


def _twins(case: Case) -> list[set[str]]:
    """Pairs of arms of one recipe with other seeds."""
    values = {name: case.values[name] for name in case.measurements.arms if name in case.values}
    return [
        {first, second}
        for first, second in pairs(values)
        if not changed(case.study, values[first], values[second])
        and SEED in differing(values[first], values[second])
    ]


def _missing(case: Case, trained: list[str]) -> Finding:
    """The offer of an A/A run, as a command where there is one to give."""
    runs = {name: case.arms[name].runs[0] for name in trained}
    unknown = "one training, its seed not recorded"
    evidence = [
        f"{name}: {unknown if run.seed is None else f'seed {run.seed}'}"
        for name, run in runs.items()
    ]
    study, run = case.study, runs[trained[0]]
    if study is not None and any(arm.trained for arm in study.arms):
        seeds = sorted({seed for arm in study.arms for seed in arm.seeds}) or [42]
        how = f"recipes study run {shown_path(study.path)} 'seeds=[{seeds[0]}, {seeds[-1] + 1}]'"
    else:
        how = (
            f"recipes train RECIPE train.seed={(run.seed or 42) + 1} run.name={run.name}-again,"
            " then evaluate both"
        )
    return found("noise-floor-missing", evidence, how=how)


def _means(case: Case) -> dict[_Key, dict[str, list[float]]]:
    """Mean per run of every metric and opponent, by arm; those that labels correct where all runs
    of the arm have enough of them.
    """
    means: dict[_Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    measures: dict[tuple[str, str | None, str], list[Measure]] = defaultdict(list)
    for name, log in case.logs:
        for measure in log.measures:
            opponent = case.measurements.opponent_name(measure.opponent)
            values = [item.value for item in measure.samples if item.value is not None]
            mean = _mean(values) if values else measure.reported
            if mean is not None:
                means[measure.name, opponent, False][name].append(mean)
                measures[measure.name, opponent, name].append(measure)
    for (metric, opponent, name), mine in measures.items():
        table = corrected_values(mine)
        if table is not None:
            means[metric, opponent, True][name] = [float(np.nanmean(row)) for row in table]
    return means


def _floor(by_arm: dict[str, list[float]], twins: list[set[str]]) -> Floor | None:
    """The standard deviation between trainings of one recipe, pooled over recipes; None where none
    was trained twice. Trainings that all came to the very same mean do not tell: few items do that.
    """
    recipes: list[list[str]] = []
    for name in by_arm:
        same = [arms for arms in recipes if any({name, other} in twins for other in arms)]
        if same:
            same[0].append(name)
        else:
            recipes.append([name])
    groups = [[value for name in arms for value in by_arm[name]] for arms in recipes]
    groups = [values for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in groups)
    squares = sum((value - _mean(values)) ** 2 for values in groups for value in values)
    return Floor(math.sqrt(squares / freedom), freedom, len(groups)) if squares else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def check_selection(case: Case) -> Iterator[Finding]:
    """Yield arms, checkpoints and tuned values that were chosen by what is compared here."""
    trained, study = [name for name in case.trained if name != "base"], case.study
    if len(trained) >= MANY and (study is None or len(study.factors) < 2 or grid_of(study)):
        evidence = (
            f"arms: {', '.join(trained)}",
            "Holm's correction keeps the tests honest, not the size of the lead",
        )
        yield found("best-of-many", evidence, n=len(trained))
    for name, values in case.values.items():
        if values.get("train.load_best_model_at_end") and name in case.arms:
            n = max(
                sum(line.get("eval_loss") is not None for line in run.curves)
                for run in case.arms[name].runs
            )
            told = f"train.load_best_model_at_end, {n} evaluations in metrics.jsonl"
            if n > 1:
                yield found("best-checkpoint", [told], (name,), ("validation_loss",), n=n)
    evals = {one.name for one in study.evals if one.data.questions == "validation"} if study else ()
    for arm in study.arms if study else ():
        tuning = arm.tuning
        if tuning is None or arm.name not in case.arms:
            continue
        told = f"{tuning.key}: {tuning.chosen} of {tuning.grid}"
        if tuning.edge:
            yield found("tuned-at-edge", [told], (arm.name,), edge=tuning.edge, key=tuning.key)
        metrics = ["validation_loss", *metrics_of(log for _, log in case.logs if log.eval in evals)]
        yield found("tuned-on-validation", [told], (arm.name,), metrics, key=tuning.key)
