"""What was measured, as the analysis sees it: a run, an arm of several runs, and all arms.

The readers in `analysis/readers/` make runs out of files; nothing here reads one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes_lib.analysis.curves import Curve
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.evals.log import REFERENCE, EvalLog, Metric, Sample

DESIGN_LOCKS = "design_locks"  # in run.json: the name of a study -> the hash of its lock


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
    given: str = ""  # the word that a user gave to have it read
    arm: str = ""  # of which it is one training among several; else it is an arm of its own
    unread: tuple[str, ...] = ()  # results that lie beside those that were read, and why not

    @property
    def is_base(self) -> bool:
        """Whether this is a model that was not trained here."""
        return self.name.startswith("base--") or self.state.get("kind") in ("base", "answers")

    @property
    def metrics(self) -> Iterator[Metric]:
        """Every metric of every evaluation."""
        return (metric for log in self.evals for metric in log.metrics)


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
        return {run.name: arm for arm, run in self.runs}

    @property
    def runs(self) -> list[tuple[str, Run]]:
        """Every run with its arm."""
        return [(arm.name, run) for arm in self for run in arm.runs]

    @property
    def logs(self) -> list[tuple[str, EvalLog]]:
        """Every evaluation with its arm."""
        return [(arm, log) for arm, run in self.runs for log in run.evals]

    def opponent(self, run: str | None) -> str | None:
        """Return the arm of an opponent, or the opponent as it is and never under an arm's name."""
        if run is None:
            return None
        if run in self.of_run and run != REFERENCE:
            return self.of_run[run]
        if run not in self.by_name and run not in self.of_run:
            return run
        return "the reference answers" if run == REFERENCE else f"another run, {run}"


def run_place(path: Path) -> str:
    """Return a file of a run as `runs/<run>/...`, wherever the runs lie."""
    root = runs_root().resolve()
    if path.resolve().is_relative_to(root):
        return f"runs/{path.resolve().relative_to(root).as_posix()}"
    return shown_path(path)


def question_of(samples: Sequence[Sample]) -> dict[str, str]:
    """Return the question behind each id: asked again under another id it is no new evidence."""
    texts: dict[str, dict[int, str]] = {}
    recorded: dict[str, str] = {}  # where the text itself is not recorded
    for sample in samples:
        text = " ".join((sample.input or "").split()).casefold()
        if sample.same_as:
            recorded[sample.id] = sample.same_as
        elif text:
            texts.setdefault(sample.id, {})[sample.turn] = text
    first_id: dict[tuple[tuple[int, str], ...], str] = {}
    questions: dict[str, str] = {}
    for id, text_of_turn in texts.items():
        whole_text = tuple(sorted(text_of_turn.items()))
        questions[id] = first_id.setdefault(whole_text, id)
    return questions | recorded


def arms_of(runs: Sequence[Run]) -> Arms:
    """Return the arms of runs: those that name one arm and were read together, else each alone.

    Arms of one name are told apart by their folders, as far up as it takes.

    Raises:
        RecipeError: one run was given twice.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for number, run in enumerate(runs):
        key = (run.arm, run.given) if run.arm else ("", str(number))
        groups.setdefault(key, []).append(run)
    arms: dict[str, ArmRuns] = {}
    for key, group in groups.items():
        first = group[0]
        namesakes = []
        for other_key, (other, *_) in groups.items():
            if other_key != key and (other.arm or other.name) == (first.arm or first.name):
                namesakes.append(other.folder)
        name = _told_apart(first.arm or first.name, first.folder, namesakes)
        if name in arms:
            hint = "a run compared with itself shows nothing"
            raise RecipeError(f"'{first.arm or first.name}' is named twice", hint)
        arms[name] = ArmRuns(name, tuple(group))
    arm_of: dict[tuple[str, Path], str] = {}
    for arm in arms.values():
        for run in arm.runs:
            other_arm = arm_of.setdefault((run.name, run.folder.resolve()), arm.name)
            if other_arm != arm.name:
                what = f"{shown_path(run.folder)} is in two arms: {other_arm} and {arm.name}"
                raise RecipeError(what)
    return Arms(arms)


def _told_apart(name: str, folder: Path, namesakes: Sequence[Path]) -> str:
    """Return a name with as much of its folder as its namesakes' folders do not share."""
    if not namesakes:
        return name
    parts = folder.resolve().parts
    others = [namesake.resolve().parts for namesake in namesakes]
    for depth in range(1, len(parts)):
        ending = parts[-depth:]
        if all(other[-depth:] != ending for other in others):
            return "-".join([name, *ending])
    return f"{name}-{folder.name}"
