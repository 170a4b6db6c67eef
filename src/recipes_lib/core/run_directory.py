"""One run, one folder (recipe.yaml, resolved.yaml, metrics.jsonl, checkpoints/, adapter/ or model/,
merged/, evals/): where each file lies, the state in run.json, and the lock on the folder.

run.json is the only truth about how a run ended: exit codes do not survive `accelerate launch`. The
lock ends with its process; a note says who holds it.
"""

import difflib
import os
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.files import Row, object_or_none, utc_now, write_json
from recipes_lib.core.project import check_run_name, runs_root, shown_path
from recipes_lib.core.terminal import say

State = Literal["created", "running", "stopped", "failed", "finished"]
# An earlier try of a batch job is asked to save and stop; a step and a save of a large model take
# minutes, and so does a file server until it gives up the locks of a machine that is lost.
REQUEUE_WAIT_S = 600.0
# The lock of a folder may be taken for a moment by `is_held` of another process.
_LOCK_WAIT_S = 0.5
# filelock's word for waiting without an end.
_FOR_EVER = -1.0
# By these variables a scheduler's script says which job it runs. The name stays the same when the
# job is queued again, the number of restarts grows.
JOB_VARIABLE = "RECIPES_JOB"
RESTARTS_VARIABLE = "RECIPES_JOB_RESTARTS"
# What run.json holds as objects, each where there is one.
_SECTIONS = ("guard", "data_files", "summary", "weights_check", "design_locks")


def damaged_section(state: Row) -> str:
    """Return what is wrong with the sections of a run.json; nothing where all are objects."""
    for name in _SECTIONS:
        if not isinstance(state.get(name, {}), dict):
            return f"is damaged: {name} is not a JSON object"
    return ""


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
        if not self.path.resolve().is_relative_to(self.root):
            what = f"{self.path} is a symbolic link that leads out of {self.root}"
            raise RecipeError(what, "remove it, or link the whole runs root to another disk")

    def weights(self, full_finetuning: bool) -> Path:
        """Folder of the final weights: `model/` for full fine-tuning, `adapter/` otherwise."""
        return self.path / ("model" if full_finetuning else "adapter")

    def exists(self) -> bool:
        """Whether this run was ever started."""
        return self.state_file.is_file()

    def train_command(self) -> str:
        """Return the command that trains or continues this run: its resolved recipe is a recipe."""
        return shlex.join(["recipes", "train", shown_path(self.path / "resolved.yaml")])

    def read_state(self) -> Row:
        """Return run.json, where only `state` is sure; a damaged one is an EnvironmentFault."""
        if not self.exists():
            what = f"no run named '{self.name}' in {self.root}"
            if self.name.endswith((".yaml", ".yml")):
                raise RecipeError(what, "name the recipe's run: recipes status lists them")
            raise RecipeError(what, *self._near_runs(), "train it first; all runs: recipes status")
        state = object_or_none(self.state_file) or {}
        what = damaged_section(state)
        if state.get("state") not in get_args(State):
            what = "cannot be read, is damaged, or not a run.json of this version"
        if not what:
            return state
        remedy = f"move it away to resume from the last complete checkpoint: {self.train_command()}"
        raise EnvironmentFault(what, remedy, file=self.state_file)

    def _near_runs(self) -> list[str]:
        """Return the hint `did you mean X?` for a run that does not exist."""
        names = [run.name for run in all_runs(self.root)]
        # a recipe without run.name makes runs FOLDER--NAME
        near = [name for name in names if name.endswith(f"--{self.name}")]
        near += difflib.get_close_matches(self.name, names, 1, cutoff=0.65)
        return [f"did you mean {name}?" for name in near[:1]]

    def write_state(self, state: State, **fields: Any) -> None:
        """Set the run's state, keeping the other fields of run.json and adding `fields`."""
        values: Row = {"name": self.name, "created": utc_now()}
        if self.exists():
            values = self.read_state()
        write_json(self.state_file, values | {"state": state, "updated": utc_now()} | fields)


def open_run(name: str, root: Path | None = None) -> RunDirectory:
    """Return an existing run, given its name or folder (`my-first`, `runs/my-first/`)."""
    path = Path(name)
    if len(path.parts) != 1:  # a folder; `.` has no parts
        path = Path(os.path.abspath(name))  # noqa: PTH100 (resolve would follow links)
        root = path.parent
    run = RunDirectory(path.name, root)
    run.read_state()
    return run


def all_runs(root: Path | None = None) -> list[RunDirectory]:
    """Return every run under the runs root, by name."""
    files = sorted((root or runs_root()).glob("[!.]*/run.json"))
    return [RunDirectory(file.parent.name, root) for file in files]


@contextmanager
def run_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold `folder` for this process; a folder that another process holds is an EnvironmentFault.

    With `wait` it is waited for, so that nothing is made twice. A batch job that was queued again
    asks its earlier try to stop, and waits up to ten minutes for its end.
    """
    lock = FileLock(folder / ".lock")
    note = folder / "lock.json"
    job = os.environ.get(JOB_VARIABLE) or None  # such as `Slurm job 7`
    restarts = int(os.environ.get(RESTARTS_VARIABLE) or 0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = object_or_none(note) or {}
        is_same_job = job is not None and earlier.get("job") == job
        is_earlier_try = is_same_job and earlier.get("restarts", 0) < restarts
        if (wait or is_earlier_try) and is_held(folder):
            say(f"{folder} is still in use{describe_holder(folder)}: waiting for it")
            if not wait:
                (folder / "STOP").touch()
        wait_s = _LOCK_WAIT_S
        if is_earlier_try:
            wait_s = REQUEUE_WAIT_S
        if wait:
            wait_s = _FOR_EVER
        lock.acquire(timeout=wait_s, poll_interval=0.2)
    except Timeout:
        raise EnvironmentFault(
            f"{folder.name} is in use{describe_holder(folder)}",
            f"wait for it, or stop it: touch {folder / 'STOP'}",
            f"only if that process or its machine is gone for good: rm {folder / '.lock'} {note}",
        ) from None
    try:
        holder = f"process {os.getpid()} on host {socket.gethostname()}"
        if job is not None:
            holder += f" ({job})"
        holder += f" since {utc_now()}"
        write_json(note, {"holder": holder, "job": job, "restarts": restarts})
        yield
    finally:
        with suppress(OSError):  # a disk that refuses: what went wrong before must not be hidden
            note.unlink(missing_ok=True)
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a live process on this machine (or on a file system with working locks) holds it."""
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def describe_holder(folder: Path) -> str:
    """Return ` by process 4711 on host gpu3 since ...`, or an empty string if there is no note."""
    holder = (object_or_none(folder / "lock.json") or {}).get("holder")
    return f" by {holder}" if holder else ""
