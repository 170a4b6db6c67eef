"""The folder runs/NAME/slurm/ with a script for each job, and the calls of sbatch: all jobs of a
chain are queued, or none.

A script can be read, edited and submitted by hand; what all jobs do alike (signals, requeues, exit
codes) stands in launch/job.sh, which each one sources.
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
from recipes_lib.core.project import cache_root, project_root, runs_root, shown_path
from recipes_lib.slurm.jobs import Job, JobPlan, Task
from recipes_lib.slurm.profile import Profile, SiteProfile

JOBS_FILE = "jobs.json"
TIMEOUT_S = 90
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_UNREACHABLE = re.compile("contact slurm controller|connect|configuration source|timed out", re.I)
# What only a node of several knows; bash puts it in there. On one node the launcher finds a port.
_MEETING = (
    ' --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port "$PORT"'
    " --rdzv_backend static --same_network"
)


# ---- The script of a job ----


def script_of(job: Job, folder: Path, profile: Profile) -> str:
    """Return the script of a job; it will lie in `folder`, beside its log and its exit code."""
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
    """Return the #SBATCH lines. Slurm reads quotes as bash does, but escapes within them too."""
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
    if len(job.tasks) == 1:
        return [_command(job, job.tasks[0], profile)]
    lines = ["case $SLURM_ARRAY_TASK_ID in"]
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
    """Write the scripts of the jobs and their recipes over an earlier submission's; logs stay."""
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
    _write_jobs(plan, {})


def _write_jobs(plan: JobPlan, ids: Mapping[str, str]) -> None:
    """Note the jobs, with the ids of those that `recipes launch` submitted."""
    rows = [
        {"label": job.label, "id": ids.get(job.label), "tasks": [task.what for task in job.tasks]}
        for job in plan.jobs
    ]
    write_json(plan.folder / JOBS_FILE, {"jobs": rows})


def submit_chain(plan: JobPlan, site: SiteProfile) -> dict[str, str]:
    """Write the submission's folder, submit every job, and return {label: job id}. Where Slurm
    refuses a job, those before it are cancelled.
    """
    prepare(plan, site)
    ids: dict[str, str] = {}
    try:
        for job in plan.jobs:
            done = run_slurm(_sbatch(job, plan.folder, ids))
            if done.returncode and _UNREACHABLE.search(done.stderr):
                raise no_answer(done.stderr)
            if done.returncode:
                script = shown_path(plan.folder / f"{job.label}.sbatch")
                what = f"Slurm refuses {job.label}: {_last_words(done.stderr)}"
                raise site.document.error("sbatch", what, f"what it asks for: {script}")
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
    """Return the words that submit a job after those whose ids are given."""
    conditions = (("afterok", job.after), ("afterany", job.after_any))
    waits = [":".join([when, *map(ids.__getitem__, names)]) for when, names in conditions if names]
    dependency = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
    return ["sbatch", "--parsable", *dependency, str(folder / f"{job.label}.sbatch")]


def run_slurm(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands, without the variables of a job that this process runs in."""
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
        raise no_answer(f"{argv[0]} waited {TIMEOUT_S} s in vain") from None


def scancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that are over already are no error, and no answer of Slurm is one."""
    if ids:
        done = run_slurm(["scancel", *ids])
        if done.returncode and _UNREACHABLE.search(done.stderr):
            raise no_answer(done.stderr)


def no_answer(text: str) -> EnvironmentFault:
    """Return the error of a Slurm that cannot be asked, with its own last words."""
    hint = "is this the login node, and is the controller up? sinfo"
    return EnvironmentFault(f"Slurm gives no answer: {_last_words(text)}", hint)


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("Try ")]
    return lines[-1].rpartition("error: ")[2] if lines else "no reason given"
