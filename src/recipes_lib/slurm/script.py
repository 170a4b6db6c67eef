"""The script of a job: directives, the site's environment, the commands. It is written to be read
from top to bottom, edited and submitted by hand with `sbatch`; what all jobs do alike (signals,
requeues, exit codes) stands in launch/job.sh, which each one sources.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from recipes_lib.core.project import cache_root, project_root, runs_root
from recipes_lib.slurm.jobs import Job, Task
from recipes_lib.slurm.profile import Profile

# What only a node of several knows; bash puts it in there. On one node the launcher finds a port.
_MEETING = (
    ' --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port "$PORT"'
    " --rdzv_backend static --same_network"
)


def script_of(job: Job, folder: Path, profile: Profile) -> str:
    """Return the script of a job.

    Args:
        job: the job.
        folder: where it will lie, beside its log and its exit code.
        profile: the site.
    """
    size, shared = job.size, project_root() / "launch" / "job.sh"
    lines = [
        "#!/bin/bash",
        f"# {folder.parent.name}: {job.label}, written by `recipes launch`",
        *directives(job, folder, profile),
        "",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 5",
        f"FOLDER={shlex.quote(str(folder))} JOB={job.label}",
        f"NODES={size.nodes} PROCESSES={size.processes} MAX_REQUEUES={profile.max_requeues}",
        f"source {shlex.quote(str(shared))} || exit 5   # signals, requeues, exit codes",
        "",
        *(f"export {name}={_quoted(value)}" for name, value in _variables(profile).items()),
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
    words = sbatch_words(job, folder, profile)
    return [f"#SBATCH {shlex.quote(word)}".replace("\\", "\\\\") for word in words]


def sbatch_words(job: Job, folder: Path, profile: Profile) -> list[str]:
    """Return what sbatch is asked for."""
    log = str(folder / job.label).replace("%", "%%") + (".%a.log" if job.is_array else ".log")
    limit = f"%{job.throttle}" if job.throttle else ""
    return [
        f"--job-name={folder.parent.name}.{job.label}",
        f"--nodes={job.size.nodes}",
        "--ntasks-per-node=1",
        *profile.flags(job.stage, job.size.gpus, job.size.processes),
        f"--signal=B:USR2@{profile.signal_lead_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={log}",
        *([f"--array=0-{len(job.tasks) - 1}{limit}"] if job.is_array else []),
    ]


def job_commands(job: Job, profile: Profile) -> list[str]:
    """Return the lines of a script that do the work."""
    lines: list[str] = []
    if job.stage == "train":
        world, kind = job.size.nodes * job.size.processes, job.size.distributed_type
        expected = json.dumps({"world_size": world, "distributed_type": kind})
        lines = [f"export RECIPES_EXPECT='{expected}'   # training refuses to be anything else"]
    if not job.is_array:
        return [*lines, _command(job, job.tasks[0], profile)]
    lines.append("case $SLURM_ARRAY_TASK_ID in")
    for number, task in enumerate(job.tasks):
        lines += [f"{number})   # {task.what}", f"  {_command(job, task, profile)} ;;"]
    return [*lines, "esac"]


def _command(job: Job, task: Task, profile: Profile) -> str:
    """Return the line of one task."""
    srun = shlex.join(("srun", *profile.srun))
    meeting = _MEETING if job.size.nodes > 1 else ""
    if job.stage != "train":
        return f"run {srun} {shlex.join((*task.launcher, *task.args))}"
    # A node ignores USR2 until its training listens, and leaves its exit code in a file: launchers
    # lose it.
    on_node = (
        'trap "" USR2; export RECIPES_EXIT_CODE_FILE="$REPORT.${SLURM_NODEID:-0}"; '
        f'exec {shlex.join(task.launcher)}{meeting} "$@"'
    )
    return f"run {srun} bash -c {shlex.quote(on_node)} {job.label} {shlex.join(task.args)}"


def _variables(profile: Profile) -> dict[str, str]:
    """Return what every job of a site exports."""
    runs, cache = str(runs_root().resolve()), str(cache_root().resolve())
    variables = {"RECIPES_RUNS_ROOT": runs, "RECIPES_CACHE": cache}
    if profile.offline:
        variables["HF_HUB_OFFLINE"] = "1"
    if profile.vllm:
        variables["VLLM"] = str(Path(profile.vllm).expanduser())
    return variables | profile.variables()


def _quoted(value: str) -> str:
    """Quote for bash; `{job}` becomes the job's id."""
    parts = [shlex.quote(part) if part else "" for part in value.split("{job}")]
    return '"${SLURM_JOB_ID:-$$}"'.join(parts) or "''"
