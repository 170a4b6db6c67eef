"""What was measured, read from run folders: the log of every evaluation, training curves, and the
facts about each run. No model, no statistics, no sentence; `eval_files` knows how an evaluation
lies on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes_lib.core.json_files import DamagedFile, read_object
from recipes_lib.core.run_directory import read_resolved
from recipes_lib.eval_files import read_evals, read_lines
from recipes_lib.eval_log import REFERENCE, EvalLog, Measure


@dataclass(frozen=True)
class RunMeasurements:
    """One run: what its folder says, each part empty where the file is absent."""

    name: str
    folder: Path
    state: Mapping[str, Any] = field(repr=False)  # run.json
    resolved: Mapping[str, Any] = field(repr=False)  # resolved.yaml
    environment: Mapping[str, Any] = field(repr=False)  # environment.json
    splits: Mapping[str, Any] = field(repr=False)  # splits.json
    # metrics.jsonl, non-finite values left out
    curves: tuple[Mapping[str, Any], ...] = field(repr=False)
    evals: tuple[EvalLog, ...] = field(repr=False)
    unfinished: tuple[str, ...] = ()  # evaluations with judgments or answers but no result
    seed: int | None = None

    @property
    def is_base(self) -> bool:
        """Whether this is a model without a run."""
        return self.name.startswith("base--")

    def measures(self) -> Iterator[Measure]:
        """Yield every measure of every evaluation."""
        for result in self.evals:
            yield from result.measures


@dataclass(frozen=True)
class ArmMeasurements:
    """One arm: one run per training seed."""

    name: str
    runs: tuple[RunMeasurements, ...]

    @property
    def logs(self) -> list[EvalLog]:
        """Every evaluation of every run."""
        return [log for run in self.runs for log in run.evals]

    @property
    def is_base(self) -> bool:
        """Whether the arm is a model without a run."""
        return bool(self.runs) and all(run.is_base for run in self.runs)


@dataclass(frozen=True)
class Measurements:
    """All arms by name, in the order of the study."""

    arms: Mapping[str, ArmMeasurements]

    @cached_property
    def arm_of_run(self) -> dict[str, str]:
        """The arm of each run's name: an opponent in a result file is a run, in a report an arm."""
        return {run.name: name for name, arm in self.arms.items() for run in arm.runs}

    def opponent_name(self, opponent: str | None) -> str | None:
        """Return the arm that an opponent belongs to, or the opponent as it is (`reference`, a
        foreign run), never under an arm's name.
        """
        if opponent is None:
            return None
        if opponent in self.arm_of_run and opponent != REFERENCE:
            return self.arm_of_run[opponent]
        if opponent not in self.arms and opponent not in self.arm_of_run:
            return opponent
        return "the reference answers" if opponent == REFERENCE else f"another run, {opponent}"


def same_questions(measures: Sequence[Measure]) -> dict[str, str]:
    """Return the questions whose texts are known, each with the first id of its text: asked again
    under another id, a question is no new evidence.
    """
    texts: dict[str, dict[int, str]] = {}
    same: dict[str, str] = {}
    for measure in measures:
        for item in measure.samples:
            # lm-eval's items have a hash of their document behind the number.
            known = item.id.rpartition(":")[2] if measure.suite == "lm_eval" else item.input
            if item.same_as:
                same[item.id] = item.same_as
            elif known and known.strip():
                texts.setdefault(item.id, {})[item.turn] = " ".join(known.split()).casefold()
    first: dict[tuple[tuple[int, str], ...], str] = {}
    return {
        name: first.setdefault(tuple(sorted(mine.items())), name) for name, mine in texts.items()
    } | same


def read_measurements(
    runs: Mapping[str, Sequence[Path]], report: Callable[[DamagedFile], None] | None = None
) -> Measurements:
    """Return everything that was measured.

    Args:
        runs: folders of runs by arm, one per seed. A folder that does not exist is an arm without
            that run.
        report: is told of each evaluation that is damaged, which is then left out; None to raise
            the error.

    Raises:
        DataError: a file is damaged, or its numbers do not agree with its items.
    """
    return Measurements(
        {
            name: ArmMeasurements(
                name, tuple(read_run(folder, report) for folder in folders if folder.is_dir())
            )
            for name, folders in runs.items()
        }
    )


def read_run(folder: Path, report: Callable[[DamagedFile], None] | None = None) -> RunMeasurements:
    """Return what one run's folder holds; `report` as for `read_measurements`.

    Raises:
        DataError: a file is damaged.
    """
    state = read_object(folder / "run.json")
    resolved = read_resolved(folder)
    evals, unfinished = read_evals(folder, report)
    seed = (resolved.get("train") or {}).get("seed")
    return RunMeasurements(
        name=folder.name,
        folder=folder,
        state=state,
        resolved=resolved,
        environment=read_object(folder / "environment.json"),
        splits=read_object(folder / "splits.json"),
        curves=tuple(read_lines(folder / "metrics.jsonl", skip_damaged=True)),
        evals=evals,
        unfinished=unfinished,
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
    )
