"""After the submission: what became of the jobs, waiting for their end, cancelling them, their
logs. One squeue tells what is queued or runs, in Slurm's own words; the exit codes that the jobs
left tell how the others ended, and one sacct how those did that left none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipeError
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.terminal import aligned, next_step, print_json, say
from recipes_lib.slurm.jobs import jobs_folder
from recipes_lib.slurm.submit import ASK_SINFO, LaunchFolder, all_launches, run_slurm, scancel

POLL_S = 30.0  # Slurm's manuals ask not to call its commands in tight loops


@dataclass
class TaskState:
    """One task as it stands. `state` is Slurm's word while it is queued or runs, afterwards `done`,
    `failed` or what sacct says; `unknown` where nobody says.
    """

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


def states_of(folder: LaunchFolder) -> list[TaskState]:
    """Return the state of every task of a submission, in order.

    Raises:
        EnvironmentFault: Slurm gives no answer.
    """
    tasks = []
    for job in folder.read_jobs():
        for number, what in enumerate(job.tasks):
            task = TaskState(job.label, job.id, what)
            if len(job.tasks) > 1:
                task.label, task.job = f"{job.label}.{number}", f"{job.id}_{number}"
            tasks.append(task)
    queued = _queued() if tasks else {}
    for task in tasks:
        task.exit_code = None if task.job in queued else folder.exit_code(task.label)
        if task.job in queued:
            task.state, task.reason = queued[task.job]
            task.active = True
        elif task.exit_code is not None:
            task.state = "failed" if task.exit_code else "done"
            task.reason = f"exit code {task.exit_code}" if task.exit_code else ""
    left = [task.job for task in tasks if task.state == "unknown"]
    accounted = _accounted(left) if left else {}
    for task in tasks:
        task.state = accounted.get(task.job, task.state)
    return tasks


def _queued() -> dict[str, tuple[str, str]]:
    """Return the user's jobs that are queued or run: id -> state and reason, or the nodes."""
    done = run_slurm(["squeue", "--me", "-h", "-a", "-r", "-o", "%i|%T|%r|%N"])
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise EnvironmentFault(f"Slurm gives no answer: {said}", ASK_SINFO)
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 3]
    return {
        id: (state.lower(), nodes if reason in ("", "None") else reason)
        for id, state, reason, nodes in rows
    }


def _accounted(ids: Sequence[str]) -> dict[str, str]:
    """Return how jobs ended, of the accounting database where the site has one."""
    words = ["sacct", "-n", "-P", "-X", "-j", ",".join(ids), "--format=JobID,State"]
    with suppress(EnvironmentFault):
        done = run_slurm(words)
        rows = [line.partition("|") for line in done.stdout.splitlines() if done.returncode == 0]
        # CANCELLED by 1000
        return {id: state.split()[0].lower() for id, _, state in rows if state}
    return {}


# ---- Showing ----


def show_status(names: Sequence[str], as_json: bool = False) -> int:
    """Print the jobs of the launches named, or of all."""
    folders = [_folder(name) for name in names] or all_launches()
    states = {folder: states_of(folder) for folder in folders}
    if as_json:
        return print_json({folder.name: list(map(vars, tasks)) for folder, tasks in states.items()})
    if not folders:
        say(f"nothing was launched from {runs_root()}")
        next_step("recipes launch RECIPE --profile P --dry-run")
        return ExitCode.DONE
    failed = []
    for folder, tasks in states.items():
        say(folder.name)
        table = [(task.job, task.label, task.what, task.state, task.reason) for task in tasks]
        for line in aligned([("job", "task", "what", "state", ""), *table]):
            say(f"  {line}")
        for task in (task for task in tasks if not task.active and not task.succeeded):
            failed += [f"{folder.name} --stage {task.label}"] * folder.log(task.label).is_file()
            if error := folder.first_error(task.label):
                say(f"  {task.label}: {error}")
    next_step(f"recipes launch logs {failed[0] if failed else folders[-1].name}")
    return ExitCode.DONE


def wait(folder: LaunchFolder) -> int:
    """Wait for the end of a chain, say what changes, and return 0 or the exit code of the first job
    that failed.
    """
    before: dict[str, str] = {}
    while True:
        tasks = states_of(folder)
        for task in tasks:
            if before.get(task.label) != task.state:
                say(f"{task.label}: {task.state} {task.reason}".rstrip())
                before[task.label] = task.state
        if not any(task.active for task in tasks):
            break
        time.sleep(POLL_S)
    failed = [task for task in tasks if not task.succeeded]
    if not failed:
        say(f"{folder.name}: every job succeeded")
        return ExitCode.DONE
    cause = next((task for task in failed if task.exit_code), failed[0])
    next_step(f"recipes launch logs {folder.name} --stage {cause.label}")
    return cause.exit_code or ExitCode.FAILED


def cancel(names: Sequence[str]) -> int:
    """Cancel every job of the launches named.

    Raises:
        EnvironmentFault: Slurm does not say what is queued.
    """
    if not names:
        raise RecipeError("recipes launch cancel: name a run or study", f"launched: {_launched()}")
    for name in names:
        active = [task.job.partition("_")[0] for task in states_of(_folder(name)) if task.active]
        ids = list(dict.fromkeys(active))
        scancel(ids)
        said = f"cancelled {', '.join(ids)}" if ids else "nothing was queued or running"
        say(f"{name}: {said}")
    next_step(f"recipes launch status {names[0]}")
    return ExitCode.DONE


def show_logs(names: Sequence[str], stage: str | None, lines: int) -> int:
    """Print the last lines of each task's log, after the first error where there is one."""
    if len(names) != 1:
        raise RecipeError("recipes launch logs: name one run or study", f"launched: {_launched()}")
    folder = _folder(names[0])
    logs = sorted(folder.path.glob("*.log"), key=lambda path: path.stat().st_mtime)
    chosen = [path for path in logs if stage is None or f"{path.stem}.".startswith(f"{stage}.")]
    if not chosen:
        what = f"'{names[0]}' has no log{f' of {stage}' if stage else ' yet'}"
        raise RecipeError(what, f"logs: {', '.join(path.stem for path in logs) or 'none'}")
    for path in chosen:
        say(f"==> {shown_path(path)}")
        if error := folder.first_error(path.stem):
            say(f"first error: {error}")
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]:
            say(line)
    next_step(f"recipes launch status {names[0]}")
    return ExitCode.DONE


def refuse_if_active(folder: LaunchFolder) -> None:
    """Refuse to launch what is queued or running already.

    Raises:
        RecipeError: it is.
        EnvironmentFault: Slurm does not say.
    """
    active = [task for task in states_of(folder) if task.active]
    if active:
        jobs = ", ".join(f"{task.label} is {task.state} (job {task.job})" for task in active)
        hint = f"wait for it, or: recipes launch cancel {folder.name}"
        raise RecipeError(f"'{folder.name}' is launched already: {jobs}", hint)


def _folder(name: str) -> LaunchFolder:
    """Return what was launched under a name."""
    folder = LaunchFolder(jobs_folder(name.rstrip("/").rpartition("/")[2]))
    if not folder.read_jobs():
        what = f"nothing was launched as '{name}' in {runs_root()}"
        raise RecipeError(what, f"launched: {_launched()}")
    return folder


def _launched() -> str:
    return ", ".join(folder.name for folder in all_launches()) or "nothing yet"
