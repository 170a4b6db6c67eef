"""Slurm as a backend of `jobs`: jobs go in all or none; squeue says what is queued or runs, and the
exit codes that jobs left, else sacct, how they ended.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipesError
from recipes_lib.core.files import write_text
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import count
from recipes_lib.jobs import records
from recipes_lib.jobs.jobs import Job, Plan
from recipes_lib.jobs.records import TaskState
from recipes_lib.slurm.client import last_words, run_slurm
from recipes_lib.slurm.profile import SCHEDULER, Profile
from recipes_lib.slurm.script import directives, job_commands, script_of


@dataclass(frozen=True)
class Slurm:
    """Slurm's queue; what is submitted needs the profile of a site."""

    site: Profile | None = None
    scheduler: str = SCHEDULER

    @property
    def profile(self) -> Profile:
        """The site that jobs are written for."""
        assert self.site is not None
        return self.site

    def prepare(self, plan: Plan) -> None:
        """Write the jobs' scripts and their recipes over an earlier submission's; logs stay."""
        plan.folder.mkdir(parents=True, exist_ok=True)
        for stale in plan.folder.iterdir():
            if stale.suffix in (".sbatch", ".exit_code", ".job"):
                stale.unlink()
        for job in plan.jobs:
            script = script_of(job, plan.folder, self.profile)
            write_text(plan.folder / f"{job.label}.sbatch", script)
        plan.write_recipes()
        records.write_jobs(plan, {})

    def preview(self, plan: Plan) -> Iterator[str]:
        """Yield each job's exact sbatch line, as bash takes it, and its script as comments."""
        names = {job.label: re.sub(r"\W", "_", job.label) for job in plan.jobs}
        ids = {label: f"${{{name}}}" for label, name in names.items()}
        for job in plan.jobs:
            unit = "GPU" if job.uses_gpus else "process"
            size = f"{count(job.nodes, 'node')} x {count(job.processes, unit)}"
            if len(job.tasks) > 1:
                size = f"{len(job.tasks)} arms, each {size}"
            yield f"# {job.label}: {size}"
            words = []
            for word in _sbatch(job, plan.folder, ids):
                # quotes would keep bash from reading the variables in it
                is_dependency = word.startswith("--dependency=")
                words.append(word if is_dependency else shlex.quote(word))
            # the id: in a variable for the jobs that wait for it, in a file for `launch status`
            note = shlex.quote(str(plan.folder / f"{job.label}.job"))
            yield f"{names[job.label]}=$({' '.join(words)} | tee {note})"
            script = directives(job, plan.folder, self.profile) + job_commands(job, self.profile)
            for line in "\n".join(script).split("\n"):
                yield f"#     {line}"

    def submit(self, plan: Plan) -> dict[str, str]:
        """Submit every job, or none if Slurm refuses one; return {label: job id}."""
        active = [task for task in self.states(plan.folder) if task.active]
        if active:
            jobs = ", ".join(f"{task.label} is {task.state} (job {task.job})" for task in active)
            hint = f"wait for it, or: recipes launch cancel {plan.name}"
            raise RecipeError(f"'{plan.name}' is already launched: {jobs}", hint)
        self.prepare(plan)
        ids: dict[str, str] = {}
        try:
            for job in plan.jobs:
                done = run_slurm(_sbatch(job, plan.folder, ids))
                if done.returncode:
                    script = shown_path(plan.folder / f"{job.label}.sbatch")
                    what = f"Slurm refuses {job.label}: {last_words(done.stderr)}"
                    raise self.profile.error(what, f"what it requests: {script}")
                # --parsable prints ID or ID;cluster
                ids[job.label] = done.stdout.strip().splitlines()[-1].split(";")[0]
                records.write_jobs(plan, ids)
        except BaseException as error:
            if ids:  # where Slurm does not answer, recipes launch cancel still knows them
                self.cancel(list(ids.values()))
            (plan.folder / records.JOBS_FILE).unlink()  # nothing is queued
            if ids and isinstance(error, RecipesError):
                accepted = f"{', '.join(ids)} had been accepted, and was cancelled"
                error.hints += (f"nothing is queued: {accepted}",)
            raise
        return ids

    def states(self, folder: Path) -> list[TaskState]:
        """Return the state of every task of a submission, in order."""
        tasks = records.submitted_tasks(folder)
        if not tasks:
            return []
        by_id = {task.job: task for task in tasks}
        listed = run_slurm(["squeue", "--me", "-h", "-a", "-r", "-o", "%i|%T|%r|%N"]).stdout
        for line in listed.splitlines():
            cells = line.split("|")
            if len(cells) == 4 and cells[0] in by_id:
                task_id, state, reason, nodes = cells
                task = by_id[task_id]
                task.active = True
                task.state = state.lower()
                task.reason = nodes if reason in ("", "None") else reason
        for task in tasks:
            if not task.active:
                records.read_end(folder, task)
        # the accounting database, where the site has one, knows those that left no exit code
        lost = [task.job for task in tasks if task.state == records.UNKNOWN]
        if lost:
            command = ["sacct", "-n", "-P", "-X", "-j", ",".join(lost), "--format=JobID,State"]
            with suppress(EnvironmentFault):
                for line in run_slurm(command).stdout.splitlines():
                    task_id, _, state = line.partition("|")
                    if task_id in lost and state:
                        by_id[task_id].state = state.split()[0].lower()  # CANCELLED by 1000
        records.cancel_what_cannot_start(tasks)
        return tasks

    def cancel(self, job_ids: Sequence[str]) -> None:
        """End jobs that wait or run."""
        run_slurm(["scancel"] + list(job_ids))


def _sbatch(job: Job, folder: Path, ids: Mapping[str, str]) -> list[str]:
    """Return the words that submit a job after those whose ids are given."""
    conditions = []
    for condition, labels in (("afterok", job.after), ("afterany", job.after_any)):
        if labels:
            conditions.append(":".join([condition] + [ids[label] for label in labels]))
    words = ["sbatch", "--parsable"]
    if conditions:
        # one whose condition cannot come true would stay in the queue for ever
        words += [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"]
    words.append(str(folder / f"{job.label}.sbatch"))
    return words
