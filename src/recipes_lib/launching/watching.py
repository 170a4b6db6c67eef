"""After the submission: the table of a chain's jobs, waiting for its end, cancelling it, its logs."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence

from recipes_lib.errors import EnvironmentFault, ExitCode, RecipeError
from recipes_lib.launching.folder import LaunchFolder, all_launches, launch_folder
from recipes_lib.launching.status import TaskState, active_ids, states_of
from recipes_lib.launching.submission import scancel
from recipes_lib.recipe.project import runs_root, shown_path
from recipes_lib.runs.directory import RunDirectory
from recipes_lib.terminal import next_step, say

POLL_S = 2.0
ASK_SINFO = "is this the login node, and is the controller up? sinfo"
COLUMNS = ("job", "stage", "state", "tries", "")


def show_status(names: Sequence[str], as_json: bool = False) -> int:
    """Print the jobs of the launches named, or of all."""
    folders = [_folder(name) for name in names] or all_launches()
    if as_json:
        say(json.dumps({folder.name: [dataclasses.asdict(state) for state in states_of(folder)] for folder in folders}, indent=2))
        return ExitCode.DONE
    if not folders:
        say(f"nothing was launched from {runs_root()}")
        next_step("recipes launch RECIPE --profile P --dry-run")
        return ExitCode.DONE
    last: list[TaskState] = []
    for folder in folders:
        last = states_of(folder)
        say(f"{folder.name}{_training_state(folder)}")
        rows = [COLUMNS, *(_row(state) for state in last)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        for row in rows:
            say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for state in last:
            error = None if state.active or state.succeeded else folder.first_error(state.label)
            if error:
                say(f"  {state.label}: {error}")
    _next(folders[-1], last)
    return ExitCode.DONE


def _next(folder: LaunchFolder, states: Sequence[TaskState]) -> None:
    """Name the command that follows: the log of what failed where there is one, else the logs of what runs, else the run."""
    failed = [state for state in states if not (state.active or state.succeeded or state.unheard)]
    told = next((state for state in failed if folder.log(state.label).is_file()), None)
    if any(state.unheard for state in states):
        next_step(f"recipes launch status {folder.name}")
    elif told:
        next_step(f"recipes launch logs {folder.name} --stage {told.label}")
    elif any(folder.path.glob("*.log")):
        next_step(f"recipes launch logs {folder.name}" if any(state.active for state in states) else f"recipes status {folder.name}")
    elif failed:
        next_step("recipes launch RECIPE|STUDY --profile P   (the same command as before: it continues)")
    else:
        next_step(f"recipes launch status {folder.name}")


def _row(state: TaskState) -> tuple[str, ...]:
    what = f" ({state.what})" if "." in state.label and state.what else ""
    return state.job, f"{state.label}{what}", state.state.lower(), str(state.tries), state.explanation()


def _training_state(folder: LaunchFolder) -> str:
    """Return what run.json says beside the jobs: a job that runs may be starting, training or saving."""
    run = RunDirectory(folder.name, folder.path.parents[1])
    if not run.exists():
        return ""
    state = run.read_state()
    error = f"; {str(state['error']).splitlines()[0]}" if state.get("error") else ""
    return f": run {state['state']}{error}"


def wait(folder: LaunchFolder) -> int:
    """Wait for the end of a chain, say what changes, and return 0 or the exit code of the first job that failed."""
    before: dict[str, str] = {}
    while True:
        states = states_of(folder)
        for state in states:
            if before.get(state.label) != state.state:
                say(f"{state.label}: {state.state.lower()}{f' - {state.explanation()}' if state.explanation() else ''}")
                before[state.label] = state.state
        if not any(state.active or state.unheard for state in states):
            break
        time.sleep(POLL_S)
    failed = [state for state in states if not state.succeeded]
    if not failed:
        say(f"{folder.name}: every job succeeded")
        return ExitCode.DONE
    cause = next((state for state in failed if state.exit_code), failed[0])
    for line in _tail(folder, cause.label, 15):
        say(f"  {line}")
    next_step(f"recipes launch logs {folder.name} --stage {cause.label}")
    return cause.exit_code or ExitCode.FAILED


def cancel(names: Sequence[str]) -> int:
    """Cancel every job of the launches named.

    Raises:
        EnvironmentFault: Slurm does not say what is queued.
    """
    if not names:
        raise RecipeError("recipes launch cancel: name a run or study", f"launched: {_known()}")
    for name in names:
        states = states_of(_folder(name))
        if any(state.unheard for state in states):
            raise EnvironmentFault(f"{name}: Slurm gives no answer, so nothing is cancelled", ASK_SINFO)
        ids = active_ids(states)
        scancel(ids)
        say(f"{name}: cancelled {', '.join(ids)}" if ids else f"{name}: nothing was queued or running")
    next_step(f"recipes launch status {names[0]}")
    return ExitCode.DONE


def show_logs(names: Sequence[str], stage: str | None, lines: int) -> int:
    """Print the last lines of each stage's log, after the first error where there is one."""
    if len(names) != 1:
        raise RecipeError("recipes launch logs: name one run or study", f"launched: {_known()}")
    folder = _folder(names[0])
    logs = sorted(folder.path.glob("*.log"), key=lambda path: path.stat().st_mtime)
    chosen = [path for path in logs if stage is None or path.stem == stage or path.stem.startswith(f"{stage}.")]
    if not chosen:
        there = ", ".join(path.stem for path in logs)
        raise RecipeError(f"'{names[0]}' has no log{f' of {stage}' if stage else ' yet'}", f"logs: {there or 'none; has a job started?'}")
    for path in chosen:
        say(f"==> {shown_path(path)}")
        error = folder.first_error(path.stem)
        if error:
            say(f"first error: {error}")
        for line in _tail(folder, path.stem, lines):
            say(line)
    next_step(f"recipes launch status {names[0]}")
    return ExitCode.DONE


def refuse_if_active(folder: LaunchFolder) -> None:
    """Refuse to launch what is queued or running already.

    Raises:
        RecipeError: it is.
        EnvironmentFault: Slurm does not say.
    """
    known = states_of(folder)
    if any(state.unheard for state in known):
        raise EnvironmentFault(
            f"'{folder.name}' was launched before and may still be queued: Slurm gives no answer",
            ASK_SINFO,
        )
    states = [state for state in known if state.active]
    if states:
        jobs = ", ".join(f"{state.label} is {state.state.lower()} (job {state.job})" for state in states)
        raise RecipeError(
            f"'{folder.name}' is launched already: {jobs}",
            f"wait for it, or: recipes launch cancel {folder.name}",
        )


def _folder(name: str) -> LaunchFolder:
    """Return what was launched under a name.

    Raises:
        RecipeError: nothing was.
    """
    folder = launch_folder(name.rstrip("/").rpartition("/")[2])
    if not folder.read_jobs():
        raise RecipeError(f"nothing was launched as '{name}' in {runs_root()}", f"launched: {_known()}")
    return folder


def _known() -> str:
    return ", ".join(folder.name for folder in all_launches()) or "nothing yet"


def _tail(folder: LaunchFolder, label: str, lines: int) -> list[str]:
    path = folder.log(label)
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:] if path.is_file() else []
