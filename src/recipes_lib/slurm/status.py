"""After the submission: state, logs, end and cancelling of the jobs. squeue says what is queued or
runs; the exit codes that jobs left, and else sacct, how they ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipeError
from recipes_lib.core.files import read_object
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.terminal import aligned, next_step, print_json, say
from recipes_lib.slurm.jobs import jobs_folder
from recipes_lib.slurm.submit import JOBS_FILE, no_answer, run_slurm, scancel


@dataclass
class TaskState:
    """One task. `state` is Slurm's word, or after the end `done`, `failed` or that of sacct."""

    label: str
    job: str
    what: str
    state: str = "unknown"
    reason: str = ""
    active: bool = False
    exit_code: int | None = None

    @property
    def succeeded(self) -> bool:
        """Whether it ended well."""
        return self.state in ("done", "completed")


def submitted_tasks(folder: Path) -> list[TaskState]:
    """Return every task that was submitted from a launch's folder, in order; the id of a job that
    was submitted by hand stands in a file of its own.
    """
    remedy, tasks = "squeue lists the jobs; submitting them again writes it anew", []
    for row in read_object(folder / JOBS_FILE, remedy).get("jobs", []):
        label, job, by_hand = row["label"], row["id"], folder / f"{row['label']}.job"
        if not job and by_hand.is_file():
            job = by_hand.read_text().strip().partition(";")[0]
        for number, what in enumerate(row["tasks"] if job else ()):
            task = TaskState(label, job, what)
            if len(row["tasks"]) > 1:
                task.label, task.job = f"{label}.{number}", f"{job}_{number}"
            tasks.append(task)
    return tasks


def states_of(folder: Path) -> list[TaskState]:
    """Return the state of every task of a submission, in order.

    Raises:
        EnvironmentFault: Slurm gives no answer.
    """
    tasks = submitted_tasks(folder)
    if not tasks:
        return []
    # what is queued or runs: id, state, reason, nodes
    done = run_slurm(["squeue", "--me", "-h", "-a", "-r", "-o", "%i|%T|%r|%N"])
    if done.returncode:
        raise no_answer(done.stderr)
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 3]
    queued = {row[0]: row[1:] for row in rows}
    for task in tasks:
        if task.job in queued:
            state, reason, nodes = queued[task.job]
            task.state, task.active = state.lower(), True
            task.reason = nodes if reason in ("", "None") else reason
            continue
        with suppress(FileNotFoundError, ValueError):  # it was killed
            task.exit_code = int((folder / f"{task.label}.exit_code").read_text())
            task.state = "failed" if task.exit_code else "done"
            task.reason = f"exit code {task.exit_code}" if task.exit_code else ""
    # the accounting database knows the others, where the site has one
    unknown = {task.job: task for task in tasks if task.state == "unknown"}
    with suppress(EnvironmentFault):
        words = ["sacct", "-n", "-P", "-X", "-j", ",".join(unknown), "--format=JobID,State"]
        for line in run_slurm(words).stdout.splitlines() if unknown else ():
            job, _, state = line.partition("|")
            if job in unknown and state:
                unknown[job].state = state.split()[0].lower()  # CANCELLED by 1000
    return tasks


def first_error(folder: Path, task: str) -> str:
    """Return what the first failing rank of a task said; empty where none did."""
    errors = sorted((folder / f"{task}.errors").glob("*"))
    return errors[0].read_text(encoding="utf-8", errors="replace").strip() if errors else ""


# ---- What `recipes launch` shows and does ----


def show_status(names: Sequence[str], as_json: bool = False) -> int:
    """Print the jobs of the launches named, or of all."""
    folders = {Path(name).name: _folder(name) for name in names or _launched()}
    states = {name: states_of(folder) for name, folder in folders.items()}
    if as_json:
        return print_json({name: list(map(vars, tasks)) for name, tasks in states.items()})
    if not folders:
        say(f"nothing was launched from {runs_root()}")
        next_step("recipes launch RECIPE --profile P --dry-run")
        return ExitCode.DONE
    for name, tasks in states.items():
        say(name)
        table = [(task.job, task.label, task.what, task.state, task.reason) for task in tasks]
        for line in aligned([("job", "task", "what", "state", ""), *table]):
            say(f"  {line}")
        for task in (task for task in tasks if not task.active and not task.succeeded):
            if error := first_error(folders[name], task.label):
                say(f"  {task.label}: {error}")
        say(f"  logs: {shown_path(folders[name])}")
    return ExitCode.DONE


def cancel(names: Sequence[str]) -> int:
    """Cancel every job of the launches named."""
    if not names:
        raise RecipeError("recipes launch cancel: name a run or study", _launched_hint())
    for name in names:
        active = [task.job.partition("_")[0] for task in states_of(_folder(name)) if task.active]
        ids = list(dict.fromkeys(active))
        scancel(ids)
        said = f"cancelled {', '.join(ids)}" if ids else "nothing was queued or running"
        say(f"{name}: {said}")
    return next_step(f"recipes launch status {names[0]}")


def refuse_if_active(name: str) -> None:
    """Refuse to launch what is queued or running already."""
    active = [task for task in states_of(jobs_folder(name)) if task.active]
    if active:
        jobs = ", ".join(f"{task.label} is {task.state} (job {task.job})" for task in active)
        hint = f"wait for it, or: recipes launch cancel {name}"
        raise RecipeError(f"'{name}' is launched already: {jobs}", hint)


def _folder(name: str) -> Path:
    """Return the folder of what was launched under a name."""
    folder = jobs_folder(name.rstrip("/").rpartition("/")[2])
    if not submitted_tasks(folder):
        what = f"nothing was launched as '{name}' in {runs_root()}"
        raise RecipeError(what, _launched_hint())
    return folder


def _launched() -> list[str]:
    """The names of everything that was launched."""
    files = sorted(runs_root().resolve().glob(f"*/slurm/{JOBS_FILE}"))
    return [file.parts[-3] for file in files if submitted_tasks(file.parent)]


def _launched_hint() -> str:
    return f"launched: {', '.join(_launched()) or 'nothing yet'}"
