"""Slurm's queue: jobs go in all or none; squeue says what is queued or runs, and the exit codes
that jobs left, else sacct, how they ended.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipeError, RecipesError
from recipes_lib.core.files import object_or_none, read_object, write_json, write_text
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.terminal import aligned, next_step, print_json, say
from recipes_lib.slurm.jobs import Job, JobPlan, script_of
from recipes_lib.slurm.profile import Profile

JOBS_FILE = "jobs.json"
_OF_THE_SITE = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
_UNREACHABLE = re.compile("contact slurm controller|connect|configuration source|timed out", re.I)


# ---- Submission ----


def prepare(plan: JobPlan, profile: Profile) -> None:
    """Write the scripts of the jobs and their recipes over an earlier submission's; logs stay."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    for stale in plan.folder.iterdir():
        if stale.suffix in (".sbatch", ".exit_code", ".job"):
            stale.unlink()
    for job in plan.jobs:
        write_text(plan.folder / f"{job.label}.sbatch", script_of(job, plan.folder, profile))
    for file, recipe in plan.recipes.items():
        recipe.write(plan.folder / file)
    _write_jobs(plan, {})


def _write_jobs(plan: JobPlan, ids: Mapping[str, str]) -> None:
    """Note the jobs, with the ids of those that `recipes launch` submitted."""
    rows = []
    for job in plan.jobs:
        names = [task.what for task in job.tasks]
        row = {"label": job.label, "id": ids.get(job.label), "tasks": names}
        rows.append({**row, "after": list(job.after)})
    write_json(plan.folder / JOBS_FILE, {"jobs": rows})


def submit_chain(plan: JobPlan, profile: Profile) -> dict[str, str]:
    """Write the submission's folder, submit every job, and return {label: job id}. Where Slurm
    refuses a job, those before it are cancelled.
    """
    active = [task for task in task_states(plan.folder) if task.active]
    if active:
        jobs = ", ".join(f"{task.label} is {task.state} (job {task.job})" for task in active)
        hint = f"wait for it, or: recipes launch cancel {plan.name}"
        raise RecipeError(f"'{plan.name}' is already launched: {jobs}", hint)
    prepare(plan, profile)
    ids: dict[str, str] = {}
    try:
        for job in plan.jobs:
            done = run_slurm(_sbatch(job, plan.folder, ids))
            if done.returncode:
                script = shown_path(plan.folder / f"{job.label}.sbatch")
                what = f"Slurm refuses {job.label}: {_last_words(done.stderr)}"
                raise profile.error(what, f"what it requests: {script}")
            # --parsable prints ID or ID;cluster
            ids[job.label] = done.stdout.strip().splitlines()[-1].split(";")[0]
            _write_jobs(plan, ids)
    except BaseException as error:
        if ids:  # where Slurm does not answer, recipes launch cancel still knows them
            run_slurm(["scancel", *ids.values()])
        (plan.folder / JOBS_FILE).unlink()
        if ids and isinstance(error, RecipesError):
            accepted = f"{', '.join(ids)} had been accepted, and was cancelled"
            error.hints = (*error.hints, f"nothing is queued: {accepted}")
        raise
    return ids


def sbatch_lines(plan: JobPlan) -> Iterator[tuple[Job, str]]:
    """Yield each job and its exact sbatch line, as bash takes it: a variable keeps the job's id for
    those that wait for it, a file for `recipes launch status`.
    """
    names = {job.label: re.sub(r"\W", "_", job.label) for job in plan.jobs}
    ids = {label: f"${{{name}}}" for label, name in names.items()}
    for job in plan.jobs:
        line = " ".join(
            word if word.startswith("--dependency=") else shlex.quote(word)
            for word in _sbatch(job, plan.folder, ids)
        )
        note = shlex.quote(str(plan.folder / f"{job.label}.job"))
        yield job, f"{names[job.label]}=$({line} | tee {note})"


def _sbatch(job: Job, folder: Path, ids: Mapping[str, str]) -> list[str]:
    """Return the words that submit a job after those whose ids are given."""
    conditions = (("afterok", job.after), ("afterany", job.after_any))
    waits = [":".join([when, *map(ids.__getitem__, names)]) for when, names in conditions if names]
    dependency = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
    return ["sbatch", "--parsable", *dependency, str(folder / f"{job.label}.sbatch")]


def run_slurm(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands, without the variables of a job that this process runs in; no
    answer of Slurm is an EnvironmentFault.
    """
    own = {name for name in os.environ if name.startswith("SLURM_")} - _OF_THE_SITE
    environment = {name: value for name, value in os.environ.items() if name not in own}
    try:
        done = subprocess.run(
            list(argv), capture_output=True, text=True, env={**environment, "LC_ALL": "C"}
        )
    except FileNotFoundError:
        hints = ("log in to the cluster's login node", "to see what would run: --dry-run")
        raise EnvironmentFault(f"{argv[0]} is not on this machine", *hints) from None
    if done.returncode and _UNREACHABLE.search(done.stderr):
        hint = "is this the login node, and is the controller up? sinfo"
        raise EnvironmentFault(f"Slurm does not answer: {_last_words(done.stderr)}", hint)
    return done


def largest_array() -> int | None:
    """Return how many tasks Slurm takes in one array; None where it cannot be asked."""
    try:
        configuration = run_slurm(["scontrol", "show", "config"]).stdout
    except EnvironmentFault:
        return None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", configuration, re.M)
    return int(found[1]) if found else None


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("Try ")]
    return lines[-1].rpartition("error: ")[2] if lines else "no reason given"


# ---- Status ----


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
    error: str = ""  # what a failed training says of itself in run.json
    after: tuple[str, ...] = ()  # labels of the jobs that must have succeeded before


def submitted_tasks(folder: Path) -> list[TaskState]:
    """Return every task submitted from a launch's folder; jobs submitted by hand left their ids."""
    remedy, tasks = "squeue lists the jobs; submitting them again rewrites it", []
    for row in read_object(folder / JOBS_FILE, remedy).get("jobs", []):
        label, job, by_hand = row["label"], row["id"], folder / f"{row['label']}.job"
        if not job and by_hand.is_file():
            job = by_hand.read_text().strip().partition(";")[0]
        for number, what in enumerate(row["tasks"] if job else ()):
            task = TaskState(label, job, what, after=tuple(row.get("after", ())))
            if len(row["tasks"]) > 1:
                task.label, task.job = f"{label}.{number}", f"{job}_{number}"
            tasks.append(task)
    return tasks


def task_states(folder: Path) -> list[TaskState]:
    """Return the state of every task of a submission, in order."""
    tasks = submitted_tasks(folder)
    if not tasks:
        return []
    # what is queued or runs: id, state, reason, nodes
    listed = run_slurm(["squeue", "--me", "-h", "-a", "-r", "-o", "%i|%T|%r|%N"]).stdout
    rows = (line.split("|") for line in listed.splitlines())
    queued = {row[0]: row[1:] for row in rows if len(row) == 4}
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
            if task.exit_code == ExitCode.PREEMPTED:
                task.state = "stopped"
                task.reason += ": saved, launch it again to continue"
            if task.exit_code and task.label.startswith("train"):
                task.error = _error_of(folder.parents[1], task)
    # the accounting database knows the others, where the site has one
    unknown = {task.job: task for task in tasks if task.state == "unknown"}
    with suppress(EnvironmentFault):
        words = ["sacct", "-n", "-P", "-X", "-j", ",".join(unknown), "--format=JobID,State"]
        for line in run_slurm(words).stdout.splitlines() if unknown else ():
            job, _, state = line.partition("|")
            if job in unknown and state:
                unknown[job].state = state.split()[0].lower()  # CANCELLED by 1000
    _cancelled_by_dependency(tasks)
    return tasks


def _cancelled_by_dependency(tasks: Sequence[TaskState]) -> None:
    """Say of a task that no file and no accounting knows that Slurm never started it, where a job
    that it waited for did not succeed.
    """
    ended_badly: dict[str, str] = {}  # label of a job -> how it ended
    for task in tasks:
        causes = [label for label in task.after if label in ended_badly]
        if task.state == "unknown" and causes:
            task.state = "cancelled"
            task.reason = f"{causes[0]}: {ended_badly[causes[0]]}"
        if not task.active and task.state not in ("done", "unknown"):
            label = task.label.rpartition(".")[0] if "_" in task.job else task.label
            ended_badly[label] = task.state


def _error_of(root: Path, task: TaskState) -> str:
    """Return what run.json says of a training that ended with this exit code; else nothing."""
    state = object_or_none(root / task.what / "run.json") or {}
    if state.get("exit_code") != task.exit_code:  # an attempt that was refused leaves no error
        return ""
    return str(state.get("error") or "")


def show_status(names: Sequence[str], as_json: bool = False) -> int:
    """Print the jobs of the launches named, or of all."""
    folders = launched(names)
    states = {name: task_states(folder) for name, folder in folders.items()}
    if as_json:
        return print_json({name: list(map(vars, tasks)) for name, tasks in states.items()})
    for name, tasks in states.items():
        say(name)
        table = [(task.job, task.label, task.what, task.state, task.reason) for task in tasks]
        say(*aligned([("job", "task", "what", "state", ""), *table]))
        for task in tasks:
            if task.error:
                say(f"  {task.label}: {task.error}")
        say(f"  logs: {shown_path(folders[name])}")
    return 0 if states else next_step("launch", "RECIPE", "--profile", "example", "--dry-run")


def cancel(names: Sequence[str]) -> int:
    """Cancel every job of the launches named."""
    if not names:
        raise RecipeError("recipes launch cancel: name a run or study")
    for name, folder in launched(names).items():
        active = (task.job.partition("_")[0] for task in task_states(folder) if task.active)
        ids = list(dict.fromkeys(active))
        if ids:
            run_slurm(["scancel", *ids])
        say(f"{name}: cancelled {', '.join(ids) or 'nothing: no job is queued or runs'}")
    return next_step("launch", "status", names[0])


def launched(names: Sequence[str]) -> dict[str, Path]:
    """Return the folders of the launches named, or of all."""
    files = sorted(runs_root().resolve().glob(f"*/slurm/{JOBS_FILE}"))
    known = {file.parts[-3]: file.parent for file in files if submitted_tasks(file.parent)}
    wanted = [Path(name).name for name in names]
    for name in wanted:
        if name not in known:
            hint = f"launched: {', '.join(known) or 'nothing yet'}"
            raise RecipeError(f"nothing was launched as '{name}' in {runs_root()}", hint)
    return {name: known[name] for name in wanted or known}
