"""Submitting: the folder runs/NAME/slurm/ with a script for each job, and the calls of sbatch, of
whose chain all jobs are in the queue or none is. Every command of Slurm is an argument list.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from recipes_lib.core.errors import EnvironmentFault, RecipesError
from recipes_lib.core.files import DamagedFile, read_object, write_json, write_text
from recipes_lib.core.project import runs_root
from recipes_lib.core.terminal import warn
from recipes_lib.slurm.jobs import Job, JobPlan
from recipes_lib.slurm.profile import SiteProfile
from recipes_lib.slurm.script import sbatch_words, script_of

TIMEOUT_S = 90
ASK_SINFO = "is this the login node, and is the controller up? sinfo"
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_UNREACHABLE = re.compile(
    r"contact slurm controller|connect failure|communication connection|configuration"
    r" source|timed out",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class SubmittedJob:
    """A job in the queue, as jobs.json notes it; `tasks` says what each of them is about."""

    label: str
    id: str
    tasks: tuple[str, ...]

    @property
    def task_labels(self) -> list[str]:
        """The file names of its tasks."""
        several = len(self.tasks) > 1
        return [f"{self.label}.{n}" for n in range(len(self.tasks))] if several else [self.label]


@dataclass(frozen=True)
class LaunchFolder:
    """runs/<name>/slurm/: a script for each job, what trainings are handed, job ids, logs, exit
    codes.
    """

    path: Path

    @property
    def name(self) -> str:
        """The run or study it belongs to."""
        return self.path.parent.name

    @property
    def jobs_file(self) -> Path:
        """The jobs that were submitted, with their ids."""
        return self.path / "jobs.json"

    def script(self, label: str) -> Path:
        """The script of a job."""
        return self.path / f"{label}.sbatch"

    def log(self, task: str) -> Path:
        """The log of a task; requeues append to it."""
        return self.path / f"{task}.log"

    def exit_code(self, task: str) -> int | None:
        """Return the code a task ended with; None while it is not over, or was killed."""
        with suppress(FileNotFoundError, ValueError):
            return int((self.path / f"{task}.exit_code").read_text())
        return None

    def first_error(self, task: str) -> str | None:
        """Return what the first failing rank said."""
        errors = sorted((self.path / f"{task}.errors").glob("*"))
        return errors[0].read_text(encoding="utf-8", errors="replace").strip() if errors else None

    def read_jobs(self) -> list[SubmittedJob]:
        """Return the submitted jobs; empty where none was. The id of one that was submitted by hand
        stands in a file of its own.

        Raises:
            DamagedFile: jobs.json is not what was written to it.
        """
        remedy = "squeue lists the jobs; submitting them again writes it anew"
        jobs = []
        for row in read_object(self.jobs_file, remedy).get("jobs", []):
            by_hand = self.path / f"{row['label']}.job"
            number = row["id"]
            if not number and by_hand.is_file():
                number = by_hand.read_text().strip().partition(";")[0]
            if number:
                jobs.append(SubmittedJob(row["label"], number, tuple(row["tasks"])))
        return jobs

    def write_jobs(self, jobs: Sequence[Job], ids: Mapping[str, str]) -> None:
        """Note the jobs, with the ids of those that `recipes launch` submitted."""
        rows = [
            {"label": job.label, "id": ids.get(job.label), "tasks": [one.what for one in job.tasks]}
            for job in jobs
        ]
        write_json(self.jobs_file, {"jobs": rows})


def all_launches() -> list[LaunchFolder]:
    """Return everything that was launched, by name."""
    launched = []
    for file in sorted(runs_root().resolve().glob("*/slurm/jobs.json")):
        try:
            if (folder := LaunchFolder(file.parent)).read_jobs():
                launched.append(folder)
        except DamagedFile as error:  # it costs only its own line
            warn(f"{str(error).splitlines()[0]}; left out")
    return launched


def prepare(plan: JobPlan, profile: SiteProfile) -> LaunchFolder:
    """Write the scripts of the jobs and what trainings are handed, in place of what an earlier
    submission left; logs stay.
    """
    folder = LaunchFolder(plan.folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    for stale in folder.path.iterdir():
        if stale.suffix in (".sbatch", ".exit_code", ".job"):
            stale.unlink()
        elif stale.suffix == ".errors":
            shutil.rmtree(stale)
    for job in plan.jobs:
        write_text(folder.script(job.label), script_of(job, folder.path, profile.values))
    for file, recipe in plan.recipes.items():
        recipe.write(folder.path / file)
    folder.write_jobs(plan.jobs, {})
    return folder


def submit_chain(plan: JobPlan, profile: SiteProfile) -> dict[str, str]:
    """Write the submission's folder, submit every job, and return {label: job id}.

    Raises:
        RecipesError: Slurm refused a job; those before it are cancelled, or named where that failed
            too.
    """
    folder = prepare(plan, profile)
    ids: dict[str, str] = {}
    try:
        for job in plan.jobs:
            flags = sbatch_words(job, folder.path, profile.values)
            done = run_slurm(_sbatch(job, folder, ids), without=_variables_of(flags))
            if done.returncode:
                raise _refusal(done.stderr, job, plan, profile)
            # --parsable prints ID or ID;cluster
            ids[job.label] = done.stdout.strip().splitlines()[-1].split(";")[0]
            folder.write_jobs(plan.jobs, ids)
    except BaseException as error:
        try:
            scancel(list(ids.values()))
            folder.jobs_file.unlink(missing_ok=True)
            left = f"nothing is queued: {', '.join(ids)} had been accepted, and was cancelled"
        except RecipesError as second:
            left = (
                f"still queued: {', '.join(ids)} ({second.what}): recipes launch cancel {plan.name}"
            )
        if ids and isinstance(error, RecipesError):
            error.hints = (*error.hints, left)
        raise
    return ids


def dry_run(plan: JobPlan) -> Iterator[tuple[Job, str]]:
    """Yield each job and its exact sbatch line, as bash takes it.

    A variable keeps the job's id for the lines of those that wait for it, a file keeps it for
    `recipes launch status`.
    """
    folder = LaunchFolder(plan.folder)
    names = {job.label: re.sub(r"\W", "_", job.label) for job in plan.jobs}
    ids = {label: f"${{{name}}}" for label, name in names.items()}
    for job in plan.jobs:
        line = " ".join(
            word if word.startswith("--dependency=") else shlex.quote(word)
            for word in _sbatch(job, folder, ids)
        )
        note = shlex.quote(str(folder.path / f"{job.label}.job"))
        yield job, f"{names[job.label]}=$({line} | tee {note})"


def _sbatch(job: Job, folder: LaunchFolder, ids: Mapping[str, str]) -> list[str]:
    """Return the argument list that submits a job; what else Slurm is asked for stands in the job's
    script.

    Args:
        job: the job.
        folder: where its script lies.
        ids: the jobs before it.
    """
    conditions = (("afterok", job.after), ("afterany", job.after_any))
    waits = [":".join([when, *(ids[one] for one in names)]) for when, names in conditions if names]
    dependency = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
    return ["sbatch", "--parsable", *dependency, str(folder.script(job.label))]


def _variables_of(flags: Sequence[str]) -> set[str]:
    """Return the variables of the shell that sbatch would take before these flags of a script."""
    others = {"time": "timelimit", "mem": "mem-per-node", "array": "array-inx"}
    names = [word.removeprefix("--").partition("=")[0] for word in flags]
    return {f"SBATCH_{others.get(name, name).upper().replace('-', '_')}" for name in names}


def run_slurm(
    argv: Sequence[str], timeout_s: float = TIMEOUT_S, without: Collection[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. Inside a job, say on an interactive node, it does not see that
    job's variables, which sbatch would hand on to the new one.

    Args:
        argv: the command.
        timeout_s: how long it is waited for.
        without: variables that it is not to see.

    Raises:
        EnvironmentFault: it is not installed here, or gives no answer.
    """
    inside = "SLURM_JOB_ID" in os.environ
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in without
        and (not (inside and name.startswith("SLURM_")) or name in _OF_THE_SITE)
    }
    try:
        return subprocess.run(
            list(argv),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**environment, "LC_ALL": "C"},
            errors="replace",
        )
    except FileNotFoundError:
        what = f"{argv[0]} is not on this machine"
        hints = ("log in to the cluster's login node", "only to see what would run: --dry-run")
        raise EnvironmentFault(what, *hints) from None
    except subprocess.TimeoutExpired:
        what = f"{argv[0]} gave no answer in {timeout_s:g} s"
        raise EnvironmentFault(what, "the Slurm controller may be down: sinfo") from None


def _refusal(text: str, job: Job, plan: JobPlan, profile: SiteProfile) -> RecipesError:
    """Return Slurm's error in one line, with what was asked for, at the flag that it names."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in text.strip().splitlines()]
    said = [line for line in lines if line and not line.startswith("Try ")]
    what = said[-1].removeprefix("Batch job submission failed: ") if said else "no reason given"
    if is_unreachable(text):
        return EnvironmentFault(f"Slurm cannot be reached: {what}", ASK_SINFO)
    flags = sbatch_words(job, plan.folder, profile.values)
    own = {name for name in profile.values.sbatch if name.split("-")[0] in what.lower()}
    key = ("sbatch", min(own)) if own else ("sbatch",)
    asked = " ".join(word for word in flags if not word.startswith(("--output", "--job-name")))
    return profile.document.error(
        key,
        f"Slurm refuses {job.label}: {what}",
        f"asked for: {asked}",
        "what the site has: sinfo -o '%P %l %D nodes, %c cores, %m MB, %G'",
    )


def is_unreachable(said: str) -> bool:
    """Whether what one of Slurm's commands said means that the controller did not answer."""
    return _UNREACHABLE.search(said) is not None


def scancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that are over already are no error.

    Raises:
        EnvironmentFault: Slurm did not answer, so they may go on.
    """
    if ids:
        done = run_slurm(["scancel", *ids])
        if done.returncode and is_unreachable(done.stderr):
            what = done.stderr.strip().splitlines()[0]
            raise EnvironmentFault(f"Slurm cannot be reached: {what}", ASK_SINFO)
