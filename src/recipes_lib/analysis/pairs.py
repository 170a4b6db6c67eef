"""Trainings of two arms in pairs: by seed, and each judged against the same runs.

A training counts once, however many trainings of an opponent it met.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from recipes_lib.analysis.runs import ArmRuns, Run
from recipes_lib.analysis.text import sentence_list
from recipes_lib.evals.log import Metric

# Flags of trainings that a user put into one arm: how they are paired.
BY_SEED = "paired by seed"
EXCHANGEABLE = "paired in any order, as their seeds are not known"

# One metric of an arm, by training and by the opponent's run.
Measured: TypeAlias = list[tuple[Run, Metric]]


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training's results on a metric, by the opponent's run; "" where there is no opponent."""

    run: Run
    by_opponent: Mapping[str, Metric]


@dataclass(frozen=True, kw_only=True)
class TrainingPair:
    """Two trainings, each with its results against the opponents' runs that both have met."""

    first: Run
    second: Run
    first_metrics: list[Metric]
    second_metrics: list[Metric]


def trainings_of(measured: Measured) -> list[Training]:
    """Return the trainings behind an arm's results, each once whatever opponents it met."""
    runs: dict[tuple[str, Path], Run] = {}
    metrics: dict[tuple[str, Path], dict[str, Metric]] = defaultdict(dict)
    for run, metric in measured:
        runs[identity_of(run)] = run
        metrics[identity_of(run)][metric.opponent or ""] = metric
    return [Training(run=run, by_opponent=metrics[key]) for key, run in runs.items()]


def identity_of(run: Run) -> tuple[str, Path]:
    """Return what tells runs apart: two files of other programs may share a name or a folder."""
    return run.name, run.folder


def pair_trainings(
    first: ArmRuns, second: ArmRuns, first_runs: Measured, second_runs: Measured
) -> tuple[list[TrainingPair], list[str]]:
    """Return trainings paired by seed, a base with each of them, and flags that name the rest.

    Both of a pair were judged against the same runs: a stronger training of the opponent would
    else count against one of them.
    """
    first_trainings = trainings_of(first_runs)
    second_trainings = trainings_of(second_runs)
    is_base = first.is_base or second.is_base
    by_seed = []
    for left, right in itertools.product(first_trainings, second_trainings):
        if left.run.seed is not None and left.run.seed == right.run.seed:
            by_seed.append((left, right))
    if by_seed and not is_base:
        matched = by_seed
    elif second.is_base and len(second_trainings) == 1:
        matched = [(training, second_trainings[0]) for training in first_trainings]
    elif first.is_base and not second.is_base and len(first_trainings) == 1:
        matched = [(first_trainings[0], training) for training in second_trainings]
    else:
        matched = list(zip(first_trainings, second_trainings, strict=False))
    pairs = []
    runs: list[Run] = []
    for left, right in matched:
        opponents = [name for name in left.by_opponent if name in right.by_opponent]
        if opponents:
            runs += [left.run, right.run]
            pair = TrainingPair(
                first=left.run,
                second=right.run,
                first_metrics=[left.by_opponent[name] for name in opponents],
                second_metrics=[right.by_opponent[name] for name in opponents],
            )
            pairs.append(pair)
    flags = []
    have_seeds = bool(runs) and all(run.seed is not None for run in runs)
    if have_seeds and not (by_seed or is_base):
        flags.append("different seeds in each arm")
    elif len(pairs) > 1 and not is_base and any(run.arm for run in runs):
        flags.append(BY_SEED if by_seed else EXCHANGEABLE)
    paired = {identity_of(run) for run in runs}
    trained = [training.run for training in first_trainings + second_trainings]
    flags += left_out([run.name for run in trained if identity_of(run) not in paired])
    return pairs, flags


def left_out(names: Sequence[str]) -> tuple[str, ...]:
    """Return the flag of a row that names what it leaves out; none where that is nothing."""
    return (f"left out: {sentence_list(names, 3)}",) if names else ()
