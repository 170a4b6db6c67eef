"""How often does a study like recipes/studies/lora-rank.yaml find a true difference on its primary
metric? Simulated studies with a known truth, through the code that writes the claims.

    python benchmarks/study_power.py [--studies 400] [--differences 5 7.7 10 20]

Two arms of three seeds and their base, 805 questions head to head, 30% ties, trainings of one
recipe that differ by a point (SD); both arms win 70% against the base. Behind the primary question
stand AlpacaEval against the reference and tasks of lm-eval, without a difference between the arms.
One core; about half a second for a study.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from recipes_lib.compare.aims import Aims
from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.measurements import ArmMeasurements, Measurements, RunMeasurements
from recipes_lib.eval_log import EvalLog, Measure, Sample

QUESTIONS, SEEDS, TIES, APART = 805, 3, 0.3, 0.01
TASKS = {"gsm8k": 1319, "arc_challenge": 1172, "truthfulqa": 817}


def measure(metric: str, opponent: str | None, values: np.ndarray, run: str) -> Measure:
    """Return the measure of these values, one question each."""
    samples = tuple(Sample(str(n), 1, "all", float(value), "x") for n, value in enumerate(values))
    file = Path("runs", run, "evals", "e", "result.json")
    return Measure("e", "e", metric, metric, samples, file, opponent)


def outcomes(rng: np.random.Generator, own: np.ndarray, rate: float) -> np.ndarray:
    """Return wins, ties and losses; half of what decides a question is the same in each seed."""
    again = rng.random(len(own)) < 0.5
    drawn = np.where(again, rng.random(len(own)), own)
    win = rate - TIES / 2
    return np.where(drawn < win, 1.0, np.where(drawn < win + TIES, 0.5, 0.0))


def study(rng: np.random.Generator, difference: float) -> Measurements:
    """Draw one study."""
    own = {name: rng.random(QUESTIONS) for name in ("r32-r8", "r8-base", "r32-base", "reference")}
    arms = {"base": [[] for _ in range(1)], "r8": [], "r32": []}
    arms["base"][0] = [
        measure("win_rate", "reference", outcomes(rng, own["reference"], 0.5), "base")
    ]
    known = {task: rng.random(size) for task, size in TASKS.items()}
    for name in ("r8", "r32"):
        for seed in range(SEEDS):
            run, moved = f"{name}-{seed}", rng.normal(0, APART)
            mine = [
                measure("win_rate", "base", outcomes(rng, own[f"{name}-base"], 0.7 + moved), run),
                measure("win_rate", "reference", outcomes(rng, own["reference"], 0.5 + moved), run),
            ]
            if name == "r32":  # one of the two trainings moves each side
                rate = 0.5 + difference + rng.normal(0, APART * 2**0.5)
                direct = outcomes(rng, own["r32-r8"], rate)
                mine.append(measure("win_rate", f"r8-{seed}", direct, run))
            for task, base in known.items():
                right = np.where(rng.random(len(base)) < 0.8, base, rng.random(len(base)))
                mine.append(measure(task, None, (right < 0.5).astype(float), run))
            arms[name].append(mine)
    arms["base"][0] += [
        measure(task, None, (base < 0.5).astype(float), "base") for task, base in known.items()
    ]
    return Measurements({name: _arm(name, lists) for name, lists in arms.items()})


def _arm(name: str, lists: list[list[Measure]]) -> ArmMeasurements:
    runs = []
    for seed, mine in enumerate(lists):
        run = "base" if name == "base" else f"{name}-{seed}"
        logs = tuple(
            EvalLog(eval="e", suite="e", against=one.opponent, file=one.file, measures=(one,))
            for one in mine
        )
        state = {"state": "finished"}
        runs.append(RunMeasurements(run, Path("runs", run), state, {}, {}, {}, (), logs, seed=seed))
    return ArmMeasurements(name, tuple(runs))


def found(difference: float, studies: int) -> tuple[float, float]:
    """Return how often the arms are said to differ: with a primary question, and as one family."""
    rng = np.random.default_rng([3, round(1000 * difference)])
    hits = np.zeros(2)
    for _ in range(studies):
        measured = study(rng, difference)
        for way, aims in enumerate((Aims("win_rate"), Aims())):
            rows = compare_arms(measured, aims=aims).rows
            row = next(one for one in rows if one.arms == ("r32", "r8") and one.head_to_head)
            hits[way] += row.verdict == "better"
    return hits[0] / studies, hits[1] / studies


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description="How often a study finds a true difference.")
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--differences", type=float, nargs="+", default=[0, 5, 7.7, 10, 20])
    options = parser.parse_args()
    begun = time.process_time()
    print("points  found with a primary question  found in one family")
    for points in options.differences:
        primary, family = found(points / 100, options.studies)
        print(f"{points:6g}  {primary:29.3f}  {family:19.3f}", flush=True)
    print(f"{options.studies} studies each, {time.process_time() - begun:.0f} CPU s")


if __name__ == "__main__":
    main()
