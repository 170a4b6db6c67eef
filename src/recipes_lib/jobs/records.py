"""What a launch leaves in its folder, whatever the scheduler: the list of its jobs, exit codes.

jobs.json          every job with its id, its tasks and the jobs it waits for
JOB.job            the id of a job that was submitted by hand
JOB.exit_code      how a job ended; of several tasks, JOB.N.exit_code
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.core.files import object_or_none, read_object, write_json
from recipes_lib.core.project import runs_root

if TYPE_CHECKING:
    from recipes_lib.jobs.jobs import Plan

JOBS_FILE = "jobs.json"
# States of a task that is neither queued nor running. Others are the scheduler's words.
DONE = "done"
FAILED = "failed"
STOPPED = "stopped"
CANCELLED = "cancelled"
UNKNOWN = "unknown"


@dataclass
class TaskState:
    """One task of a launch."""

    label: str  # that of its job; of several tasks, with the task's number behind a dot
    job: str  # the id of its job; of several tasks, with the task's number behind a line: 12_0
    what: str  # its title
    state: str = UNKNOWN  # the scheduler's word, or how it ended
    reason: str = ""  # why it waits, where it runs, or its exit code
    active: bool = False  # whether it is queued or runs
    exit_code: int | None = None
    error: str = ""  # what a failed training says of itself in run.json
    after: tuple[str, ...] = ()  # labels of the jobs that must have succeeded before

    @property
    def job_id(self) -> str:
        """The id of its whole job."""
        return self.job.partition("_")[0]

    @property
    def job_label(self) -> str:
        """The label of its whole job."""
        return self.label.rpartition(".")[0] if "_" in self.job else self.label


def write_jobs(plan: "Plan", ids: Mapping[str, str]) -> None:
    """Note a plan's jobs, with the ids of those that were submitted."""
    rows = []
    for job in plan.jobs:
        row = {
            "label": job.label,
            "id": ids.get(job.label),
            "tasks": [task.title for task in job.tasks],
            "after": list(job.after),
        }
        rows.append(row)
    write_json(plan.folder / JOBS_FILE, {"jobs": rows})


def submitted_tasks(folder: Path) -> list[TaskState]:
    """Return every task submitted from a launch's folder; jobs submitted by hand left their ids."""
    remedy = "squeue lists the jobs; submitting them again rewrites it"
    tasks: list[TaskState] = []
    for row in read_object(folder / JOBS_FILE, remedy).get("jobs", []):
        label = row["label"]
        job_id = row["id"]
        by_hand = folder / f"{label}.job"
        if not job_id and by_hand.is_file():
            job_id = by_hand.read_text().strip().partition(";")[0]
        if not job_id:
            continue
        after = tuple(row.get("after", ()))
        for number, title in enumerate(row["tasks"]):
            task = TaskState(label=label, job=job_id, what=title, after=after)
            if len(row["tasks"]) > 1:
                task.label = f"{label}.{number}"
                task.job = f"{job_id}_{number}"
            tasks.append(task)
    return tasks


def read_end(folder: Path, task: TaskState) -> None:
    """Set how a task ended from the exit code that it left; nothing where it was killed."""
    with suppress(FileNotFoundError, ValueError):
        task.exit_code = int((folder / f"{task.label}.exit_code").read_text())
    if task.exit_code is None:
        return
    if task.exit_code == ExitCode.DONE:
        task.state = DONE
        return
    task.reason = f"exit code {task.exit_code}"
    if task.exit_code == ExitCode.FAILED and task.label.startswith("look"):
        task.state = STOPPED
        task.reason = "the study ends at this look"
    elif task.exit_code == ExitCode.PREEMPTED:
        task.state = STOPPED
        task.reason += ": saved, launch it again to continue"
    else:
        task.state = FAILED
    if task.label.startswith("train"):
        state = object_or_none(folder.parents[1] / task.what / "run.json") or {}
        # an attempt that was refused before it had the run leaves the record of the one before
        if state.get("exit_code") == task.exit_code:
            task.error = str(state.get("error") or "")


def cancel_what_cannot_start(tasks: Sequence[TaskState]) -> None:
    """Call a task cancelled that nobody knows and that waited for a job which did not succeed."""
    ended_badly: dict[str, str] = {}  # label of a job -> how it ended
    for task in tasks:
        causes = [label for label in task.after if label in ended_badly]
        if task.state == UNKNOWN and causes:
            task.state = CANCELLED
            task.reason = f"{causes[0]}: {ended_badly[causes[0]]}"
        if not task.active and task.state not in (DONE, UNKNOWN):
            ended_badly[task.job_label] = task.state


def launched(scheduler: str, names: Sequence[str]) -> dict[str, Path]:
    """Return the folders of the launches named, or of all."""
    folders: dict[str, Path] = {}
    for file in sorted(runs_root().resolve().glob(f"*/{scheduler}/{JOBS_FILE}")):
        if submitted_tasks(file.parent):
            folders[file.parts[-3]] = file.parent
    wanted = [Path(name).name for name in names] or list(folders)
    for name in wanted:
        if name not in folders:
            hint = f"launched: {', '.join(folders) or 'nothing yet'}"
            raise RecipeError(f"nothing was launched as '{name}' in {runs_root()}", hint)
    return {name: folders[name] for name in wanted}
