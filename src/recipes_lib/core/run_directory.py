"""One run, one folder: where each file lies, and the state in run.json.

    runs/<name>/
      recipe.yaml  resolved.yaml  command.txt  environment.json  splits.json
      supervision.json  metrics.jsonl  checkpoints/checkpoint-N/  adapter/ or model/
      merged/  evals/  run.json

run.json is the only truth about how a run ended: exit codes do not survive `accelerate launch`.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, cast, get_args

from recipes_lib.core.errors import DataError, EnvironmentFault, RecipeError
from recipes_lib.core.files import DamagedFile, Row, read_object, utc_now, write_json
from recipes_lib.core.project import check_run_name, runs_root

State = Literal["created", "running", "preempted", "failed", "finished"]


class RunState(TypedDict, total=False):
    """run.json of a training, an evaluated `base`, or `answers` of a file; only `state` is sure."""

    name: str
    state: State
    kind: str
    created: str
    updated: str
    attempts: int
    exit_code: int | None
    error: str | None
    launch: str
    steps_began: str | None  # when the newest attempt began its first step
    guard: Mapping[str, object]  # training.resume_guard
    resumed: list[Mapping[str, object]]
    step: int
    summary: Mapping[str, Any] | None  # training.attempt
    weights_check: Mapping[str, Any]  # weights.check.SavedWeights
    fingerprint: str
    base_fingerprint: str | None
    prompt_format_hash: str
    template_date: str | None  # data.prompts.template_date
    stand_in: Mapping[str, Any]  # the sections of a base's recipe
    data_files: Mapping[str, str]  # data.sources.source_hashes


class RunDirectory:
    """A folder under the runs root, which need not exist; a link out of the root is refused."""

    def __init__(self, name: str, root: Path | None = None) -> None:
        check_run_name(name)
        self.name = name
        self.root = (root or runs_root()).resolve()
        self.path = self.root / name
        self.state_file = self.path / "run.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.stop_file = self.path / "STOP"  # asks a running training to checkpoint and stop
        self._refuse_link(self.path)

    def weights(self, full_finetuning: bool) -> Path:
        """Folder of the final weights: `model/` for full fine-tuning, `adapter/` otherwise."""
        return self.path / ("model" if full_finetuning else "adapter")

    def exists(self) -> bool:
        """Whether this run was ever started."""
        return self.state_file.is_file()

    def train_command(self) -> str:
        """Return the command that trains or continues this run, as it was typed."""
        try:
            words = shlex.split((self.path / "command.txt").read_text(encoding="utf-8"))
            typed = words[words.index("recipes_lib.train") + 1 :]
        except (OSError, ValueError):  # it is gone, or damaged
            return f"recipes train RECIPE run.name={self.name}, with its recipe and overrides"
        return shlex.join(["recipes", "train", *typed])

    def read_state(self) -> RunState:
        """Return run.json; a damaged one, or one of another version, is an EnvironmentFault."""
        if not self.exists():
            raise _no_such_run(f"no run named '{self.name}' in {self.root}", self.name, self.root)
        self.check_inside()
        wrong = "is not a run.json of this version"
        try:
            state = read_object(self.state_file)
            if state.get("state") in get_args(State):
                return cast(RunState, state)
        except DamagedFile as error:
            wrong = error.what
        remedy = f"move it away: mv {self.state_file} {self.state_file}.damaged"
        goes_on = f"then the newest whole checkpoint goes on: {self.train_command()}"
        raise EnvironmentFault(wrong, remedy, goes_on, file=self.state_file)

    def check_inside(self) -> None:
        """Refuse a run with a folder or file that a symbolic link puts outside the runs root."""
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            self._refuse_link(entry)

    def _refuse_link(self, path: Path) -> None:
        if path.is_symlink() and not path.resolve().is_relative_to(self.root):
            raise RecipeError(
                f"{path} is a symbolic link that leads out of {self.root}",
                "remove it, or put the whole runs root on the other disk: RECIPES_RUNS_ROOT=FOLDER",
            )

    def write_state(self, state: State, **fields: Any) -> None:
        """Set the run's state, keeping the other fields of run.json and adding `fields`."""
        begun = {"name": self.name, "created": utc_now()}
        known: Mapping[str, object] = self.read_state() if self.exists() else begun
        write_json(self.state_file, {**known, "state": state, "updated": utc_now(), **fields})


def open_run(name: str, root: Path | None = None) -> RunDirectory:
    """Return an existing run, given its name or folder (`my-first`, `runs/my-first/`)."""
    path = Path(name)
    if len(path.parts) != 1:  # a folder; `.` has no parts
        path = Path(os.path.abspath(name))  # noqa: PTH100 (resolve would follow links)
        if not path.is_dir():
            raise _no_such_run(f"no such run: {name}", path.name, root or runs_root())
        root = path.parent
    run = RunDirectory(path.name, root)
    run.read_state()
    return run


def all_runs(root: Path | None = None) -> list[RunDirectory]:
    """Return every run under the runs root, by name."""
    names = sorted(file.parent.name for file in (root or runs_root()).glob("*/run.json"))
    return [RunDirectory(name, root) for name in names if not name.startswith(".")]


def _no_such_run(what: str, name: str, root: Path) -> RecipeError:
    if (root / "run.json").is_file():
        return RecipeError(what, f"a part of a run is named by the run: {root.name}")
    names = [run.name for run in all_runs(root)]
    if near := difflib.get_close_matches(name, names, n=3):
        return RecipeError(what, f"did you mean {' or '.join(near)}?")
    more = f" and {len(names) - 5} more: recipes status" if len(names) > 5 else ""
    listed = f"runs there: {', '.join(names[:5])}{more}"
    return RecipeError(what, listed if names else "no run there yet: recipes train RECIPE")


def read_resolved(folder: Path) -> Row:
    """Return a run's resolved recipe; an absent one is empty, a damaged one a DataError."""
    import yaml

    path = folder / "resolved.yaml"
    if not path.is_file():
        return {}
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        remedy = "train the run's recipe again: a finished run only writes this file anew"
        raise DataError("is damaged: it holds no recipe", remedy, file=path)
    return value
