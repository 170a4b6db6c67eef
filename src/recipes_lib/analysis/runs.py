"""What was measured, read from run folders: evaluations, training curves, facts about each run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes_lib.core.files import DamagedFile, read_object, read_rows
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.run_directory import read_resolved
from recipes_lib.evals.log import REFERENCE, EvalLog, Metric, Sample, read_eval_logs

MOST_POINTS = 1_000
CURVES = ("loss", "eval_loss", "learning_rate", "tokens_per_second")


@dataclass
class Curve:
    """Points (step, value) of one thing that a training logged, thinned while they are read."""

    points: list[tuple[float, float]] = field(default_factory=list)
    count: int = 0
    every: int = 1  # how many points each stands for; the last one stands for itself

    def add(self, step: float, value: float) -> None:
        """Add a point; of more than `MOST_POINTS` every second one is dropped."""
        if (self.count - 1) % self.every:
            self.points.pop()
        self.points.append((step, value))
        self.count += 1
        if len(self.points) > MOST_POINTS:
            self.points = self.points[::2]
            self.every *= 2


def read_curves(file: Path) -> dict[str, Curve]:
    """Return the curves of metrics.jsonl; nothing of it stays in memory but them."""
    curves: dict[str, Curve] = {}
    for row in read_rows(file, skip_damaged=True):
        step = row.get("step")
        if not isinstance(step, int | float):
            continue
        for name in CURVES:
            value = row.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, Curve()).add(step, value)
    return curves


@dataclass(frozen=True)
class Run:
    """One run: what its folder says, each part empty where the file is absent."""

    name: str
    folder: Path
    state: Mapping[str, Any] = field(default_factory=dict, repr=False)  # run.json
    resolved: Mapping[str, Any] = field(default_factory=dict, repr=False)  # resolved.yaml
    environment: Mapping[str, Any] = field(default_factory=dict, repr=False)
    splits: Mapping[str, Any] = field(default_factory=dict, repr=False)
    curves: Mapping[str, Curve] = field(default_factory=dict, repr=False)
    evals: tuple[EvalLog, ...] = field(default=(), repr=False)
    unfinished: tuple[str, ...] = ()  # evaluations with judgments or answers and no result
    seed: int | None = None
    foreign: bool = False  # another program's files

    @property
    def is_base(self) -> bool:
        """Whether this is a model that was not trained here."""
        return self.name.startswith("base--") or self.state.get("kind") in ("base", "answers")

    @property
    def metrics(self) -> Iterator[Metric]:
        """Every metric of every evaluation."""
        for log in self.evals:
            yield from log.metrics


@dataclass(frozen=True)
class ArmRuns:
    """One arm: one run per training seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def logs(self) -> list[EvalLog]:
        """Every evaluation of every run."""
        return [log for run in self.runs for log in run.evals]

    @property
    def is_base(self) -> bool:
        """Whether the arm is a model that was not trained here."""
        return bool(self.runs) and all(run.is_base for run in self.runs)


@dataclass(frozen=True)
class Arms:
    """All arms by name, in the order of the study."""

    by_name: Mapping[str, ArmRuns]

    def __getitem__(self, name: str) -> ArmRuns:
        return self.by_name[name]

    def __iter__(self) -> Iterator[ArmRuns]:
        return iter(self.by_name.values())

    @cached_property
    def of_run(self) -> dict[str, str]:
        """The arm of each run's name: an opponent in a result is a run, in a report an arm."""
        return {run.name: arm.name for arm in self for run in arm.runs}

    @property
    def logs(self) -> list[tuple[str, EvalLog]]:
        """Every evaluation with its arm."""
        return [(arm.name, log) for arm in self for log in arm.logs]

    def opponent(self, run: str | None) -> str | None:
        """Return the arm of an opponent, or the opponent as it is and never under an arm's name."""
        if run is None:
            return None
        if run in self.of_run and run != REFERENCE:
            return self.of_run[run]
        if run not in self.by_name and run not in self.of_run:
            return run
        return "the reference answers" if run == REFERENCE else f"another run, {run}"


def load_arms(
    folders: Mapping[str, Sequence[Path]], report: Callable[[DamagedFile], None] | None = None
) -> Arms:
    """Return everything that was measured, of each arm the folders (one per seed) that exist.

    `report` is called with each damaged evaluation, which is left out; None to raise the error.
    """
    return Arms(
        {
            name: ArmRuns(name, tuple(load_run(path, report) for path in paths if path.is_dir()))
            for name, paths in folders.items()
        }
    )


def load_run(folder: Path, report: Callable[[DamagedFile], None] | None = None) -> Run:
    """Return what one run's folder holds; `report` as for `load_arms`."""
    resolved = read_resolved(folder)
    evals, unfinished = read_eval_logs(folder, report)
    seed = (resolved.get("train") or {}).get("seed")
    return Run(
        name=folder.name,
        folder=folder,
        state=read_object(folder / "run.json"),
        resolved=resolved,
        environment=read_object(folder / "environment.json"),
        splits=read_object(folder / "splits.json"),
        curves=read_curves(folder / "metrics.jsonl"),
        evals=evals,
        unfinished=unfinished,
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
    )


def run_place(path: Path) -> str:
    """Return a file of a run as `runs/<run>/...`, wherever the runs lie."""
    root, whole = runs_root().resolve(), path.resolve()
    if whole.is_relative_to(root):
        return f"runs/{whole.relative_to(root).as_posix()}"
    return shown_path(path)


def question_of(samples: Sequence[Sample]) -> dict[str, str]:
    """Return the question behind each id: asked again under another id it is no new evidence."""
    texts: dict[str, dict[int, str]] = {}
    same: dict[str, str] = {}
    for sample in samples:
        if sample.same_as:
            same[sample.id] = sample.same_as
        elif sample.input and sample.input.strip():
            texts.setdefault(sample.id, {})[sample.turn] = " ".join(sample.input.split()).casefold()
    first: dict[tuple[tuple[int, str], ...], str] = {}
    known = {id: first.setdefault(tuple(sorted(text.items())), id) for id, text in texts.items()}
    return known | same
