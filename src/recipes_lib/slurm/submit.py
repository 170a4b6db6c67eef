"""Submitting: the folder runs/NAME/slurm/ with a script for each job, and the calls of sbatch, of
whose chain all jobs are in the queue or none is. Every command of Slurm is an argument list.

A script is written to be read from top to bottom, edited and submitted by hand with `sbatch`; what
all jobs do alike (signals, requeues, exit codes) stands in launch/job.sh, which each one sources.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from recipes_lib.core.errors import EnvironmentFault, RecipesError
from recipes_lib.core.files import write_json, write_text
from recipes_lib.core.project import cache_root, project_root, runs_root
from recipes_lib.slurm.jobs import Job, JobPlan, Task
from recipes_lib.slurm.profile import Profile, SiteProfile

JOBS_FILE = "jobs.json"
TIMEOUT_S = 90
ASK_SINFO = "is this the login node, and is the controller up? sinfo"
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_UNREACHABLE = re.compile("contact slurm controller|connect|configuration source|timed out", re.I)
# What only a node of several knows; bash puts it in there. On one node the launcher finds a port.
_MEETING = (
    ' --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port "$PORT"'
    " --rdzv_backend static --same_network"
)


# ---- The script of a job ----


def script_of(job: Job, folder: Path, profile: Profile) -> str:
    """Return the script of a job.

    Args:
        job: the job.
        folder: where it will lie, beside its log and its exit code.
        profile: the site.
    """
    variables = {
        "RECIPES_RUNS_ROOT": str(runs_root().resolve()),
        "RECIPES_CACHE": str(cache_root().resolve()),
        **({"HF_HUB_OFFLINE": "1"} if profile.offline else {}),
        **({"VLLM": str(Path(profile.vllm).expanduser())} if profile.vllm else {}),
        **profile.variables(),
    }
    shared = project_root() / "launch" / "job.sh"
    lines = [
        "#!/bin/bash",
        f"# {folder.parent.name}: {job.label}, written by `recipes launch`",
        *directives(job, folder, profile),
        "",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 5",
        f"FOLDER={shlex.quote(str(folder))} JOB={job.label}",
        f"NODES={job.nodes} PROCESSES={job.processes} MAX_REQUEUES={profile.max_requeues}",
        f"source {shlex.quote(str(shared))} || exit 5   # signals, requeues, exit codes",
        "",
        *(f"export {name}={_quoted(value)}" for name, value in variables.items()),
        '[ -z "$TMPDIR" ] || mkdir -p "$TMPDIR" || environment_failed',
        *(f"{line} || environment_failed" for line in profile.setup),
        "",
        *job_commands(job, profile),
        "finish",
    ]
    return "\n".join(lines) + "\n"


def directives(job: Job, folder: Path, profile: Profile) -> list[str]:
    """Return the #SBATCH lines. Slurm reads quotes as bash does, but a backslash is one even within
    quotes.
    """
    log = str(folder / job.label).replace("%", "%%")
    array = []
    if len(job.tasks) > 1:
        limit = f"%{job.throttle}" if job.throttle else ""
        array, log = [f"--array=0-{len(job.tasks) - 1}{limit}"], f"{log}.%a"
    words = [
        f"--job-name={folder.parent.name}.{job.label}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        *profile.flags(job.stage, job.gpus, job.processes),
        f"--signal=B:USR2@{profile.signal_lead_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={log}.log",
        *array,
    ]
    return [f"#SBATCH {shlex.quote(word)}".replace("\\", "\\\\") for word in words]


def job_commands(job: Job, profile: Profile) -> list[str]:
    """Return the lines of a script that do the work."""
    lines = [
        f"export {name}={shlex.quote(value)}   # an edited study is refused"
        for name, value in job.expected.items()
    ]
    if len(job.tasks) == 1:
        return [*lines, _command(job, job.tasks[0], profile)]
    lines.append("case $SLURM_ARRAY_TASK_ID in")
    for number, task in enumerate(job.tasks):
        lines += [f"{number})   # {task.what}", f"  {_command(job, task, profile)} ;;"]
    return [*lines, "esac"]


def _command(job: Job, task: Task, profile: Profile) -> str:
    """Return the line of one task."""
    srun = shlex.join(("srun", *profile.srun))
    if job.stage != "train":
        return f"run {srun} {shlex.join((*task.launcher, *task.args))}"
    # A node ignores USR2 until its training listens, and leaves its exit code in a file: launchers
    # lose it.
    on_node = (
        'trap "" USR2; export RECIPES_EXIT_CODE_FILE="$REPORT.${SLURM_NODEID:-0}"; '
        f'exec {shlex.join(task.launcher)}{_MEETING if job.nodes > 1 else ""} "$@"'
    )
    return f"run {srun} bash -c {shlex.quote(on_node)} {job.label} {shlex.join(task.args)}"


def _quoted(value: str) -> str:
    """Quote for bash; `{job}` becomes the job's id."""
    parts = [shlex.quote(part) if part else "" for part in value.split("{job}")]
    return '"${SLURM_JOB_ID:-$$}"'.join(parts) or "''"


# ---- The folder of a launch, and sbatch ----


def prepare(plan: JobPlan, site: SiteProfile) -> None:
    """Write the scripts of the jobs and what they are handed, in place of what an earlier
    submission left; logs stay.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    for stale in plan.folder.iterdir():
        if stale.suffix in (".sbatch", ".exit_code", ".job"):
            stale.unlink()
        elif stale.suffix == ".errors":
            shutil.rmtree(stale)
    for job in plan.jobs:
        script = script_of(job, plan.folder, site.values)
        write_text(plan.folder / f"{job.label}.sbatch", script)
    for file, recipe in plan.recipes.items():
        recipe.write(plan.folder / file)
    if plan.study:
        write_json(plan.folder / "study.json", plan.study)
    _write_jobs(plan, {})


def _write_jobs(plan: JobPlan, ids: Mapping[str, str]) -> None:
    """Note the jobs, with the ids of those that `recipes launch` submitted."""
    rows = [
        {"label": job.label, "id": ids.get(job.label), "tasks": [task.what for task in job.tasks]}
        for job in plan.jobs
    ]
    write_json(plan.folder / JOBS_FILE, {"jobs": rows})


def submit_chain(plan: JobPlan, site: SiteProfile) -> dict[str, str]:
    """Write the submission's folder, submit every job, and return {label: job id}.

    Raises:
        RecipesError: Slurm refused a job; those before it are cancelled, or named where that failed
            too.
    """
    prepare(plan, site)
    ids: dict[str, str] = {}
    try:
        for job in plan.jobs:
            done = run_slurm(_sbatch(job, plan.folder, ids))
            if done.returncode:
                raise _refusal(done.stderr, job, plan, site)
            # --parsable prints ID or ID;cluster
            ids[job.label] = done.stdout.strip().splitlines()[-1].split(";")[0]
            _write_jobs(plan, ids)
    except BaseException as error:
        left = f"nothing is queued: {', '.join(ids)} had been accepted, and was cancelled"
        try:
            scancel(list(ids.values()))
            (plan.folder / JOBS_FILE).unlink(missing_ok=True)
        except RecipesError as second:
            left = f"still queued ({second.what}): recipes launch cancel {plan.name}"
        if ids and isinstance(error, RecipesError):
            error.hints = (*error.hints, left)
        raise
    return ids


def dry_run(plan: JobPlan) -> Iterator[tuple[Job, str]]:
    """Yield each job and its exact sbatch line, as bash takes it.

    A variable keeps the job's id for the lines of those that wait for it, a file keeps it for
    `recipes launch status`.
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
    """Return the argument list that submits a job; what else Slurm is asked for stands in the job's
    script.

    Args:
        ids: of the jobs before it.
    """
    conditions = (("afterok", job.after), ("afterany", job.after_any))
    waits = [":".join([when, *map(ids.__getitem__, names)]) for when, names in conditions if names]
    dependency = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
    return ["sbatch", "--parsable", *dependency, str(folder / f"{job.label}.sbatch")]


def run_slurm(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. Inside a job, say on an interactive node, it does not see that
    job's variables, which sbatch would hand on to the new one.

    Raises:
        EnvironmentFault: it is not installed here, or gives no answer.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name in _OF_THE_SITE
    }
    try:
        return subprocess.run(
            list(argv),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**environment, "LC_ALL": "C"},
            errors="replace",
        )
    except FileNotFoundError:
        hints = ("log in to the cluster's login node", "only to see what would run: --dry-run")
        raise EnvironmentFault(f"{argv[0]} is not on this machine", *hints) from None
    except subprocess.TimeoutExpired:
        what = f"{argv[0]} gave no answer in {TIMEOUT_S} s"
        raise EnvironmentFault(what, ASK_SINFO) from None


def _refusal(text: str, job: Job, plan: JobPlan, site: SiteProfile) -> RecipesError:
    """Return Slurm's error in one line, with what was asked for."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in text.splitlines()]
    said = [line for line in lines if line and not line.startswith("Try ")] or ["no reason given"]
    if _UNREACHABLE.search(text):
        return EnvironmentFault(f"Slurm cannot be reached: {said[-1]}", ASK_SINFO)
    what = said[-1].removeprefix("Batch job submission failed: ")
    asked = [line.removeprefix("#SBATCH ") for line in directives(job, plan.folder, site.values)]
    return site.document.error(
        "sbatch",
        f"Slurm refuses {job.label}: {what}",
        f"asked for: {' '.join(asked)}",
        "what the site has: sinfo -o '%P %l %D nodes, %c cores, %m MB, %G'",
    )


def scancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that are over already are no error.

    Raises:
        EnvironmentFault: Slurm did not answer, so they may go on.
    """
    if ids:
        done = run_slurm(["scancel", *ids])
        if done.returncode and _UNREACHABLE.search(done.stderr):
            what = done.stderr.strip().splitlines()[0]
            raise EnvironmentFault(f"Slurm cannot be reached: {what}", ASK_SINFO)
