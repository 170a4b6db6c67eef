"""The script of a job. What all scripts share (signals, requeues, exit codes) is launch/job.sh."""

import shlex
from pathlib import Path

from recipes_lib.core.project import cache_root, project_root, runs_root
from recipes_lib.jobs.jobs import Job
from recipes_lib.slurm.profile import Profile, flag_words

# What only a node of several knows; bash puts it in there. On one node the launcher finds a port.
_MEETING = (
    ' --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port "$PORT"'
    " --rdzv_backend static --same_network"
)


def script_of(job: Job, folder: Path, profile: Profile) -> str:
    """Return the script of a job; it will lie in `folder`, beside its log and its exit code."""
    shared = project_root() / "launch" / "job.sh"
    lines = ["#!/bin/bash", f"# {folder.parent.name}: {job.label}, written by `recipes launch`"]
    lines += directives(job, folder, profile)
    lines += [
        "",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 5",
        f"FOLDER={shlex.quote(str(folder))} JOB={shlex.quote(job.label)}",
        f"NODES={job.nodes} PROCESSES={job.processes} MAX_REQUEUES={profile.max_requeues}",
        f"source {shlex.quote(str(shared))} || exit 5   # signals, requeues, exit codes",
        "",
    ]
    variables = {
        "RECIPES_RUNS_ROOT": str(runs_root().resolve()),
        "RECIPES_CACHE": str(cache_root().resolve()),
    }
    if profile.offline:
        variables["HF_HUB_OFFLINE"] = "1"
    if profile.vllm:
        variables["VLLM"] = str(Path(profile.vllm).expanduser())
    # the site's own come last, and win
    for name, value in (variables | profile.variables()).items():
        # `{job}` becomes the job's id
        parts = [shlex.quote(part) if part else "" for part in value.split("{job}")]
        quoted = '"${SLURM_JOB_ID:-$$}"'.join(parts) or "''"
        lines.append(f"export {name}={quoted}")
    lines.append('[ -z "$TMPDIR" ] || mkdir -p "$TMPDIR" || environment_failed')
    lines += [f"{line} || environment_failed" for line in profile.setup]
    lines.append("")
    lines += job_commands(job, profile)
    lines.append("finish")
    return "\n".join(lines) + "\n"


def directives(job: Job, folder: Path, profile: Profile) -> list[str]:
    """Return the #SBATCH lines. Slurm reads quotes as bash does, but escapes within them too."""
    log = str(folder / job.label).replace("%", "%%")
    array = f"--array=0-{len(job.tasks) - 1}"
    if job.throttle:
        array += f"%{job.throttle}"
    if len(job.tasks) > 1:
        log += ".%a"
    gpus = job.processes if job.uses_gpus else 0
    words = [f"--job-name={folder.parent.name}.{job.label}", f"--nodes={job.nodes}"]
    words.append("--ntasks-per-node=1")  # accelerate starts the processes of a node
    words += profile.flags(job.stage, gpus, job.processes)
    # to the script alone, which asks the training to save
    words.append(f"--signal=B:USR2@{profile.signal_lead_s}")
    words += ["--requeue", "--open-mode=append", f"--output={log}.log"]
    if len(job.tasks) > 1:
        words.append(array)
    return [f"#SBATCH {shlex.quote(word)}".replace("\\", "\\\\") for word in words]


def job_commands(job: Job, profile: Profile) -> list[str]:
    """Return the lines of a script that do the work."""
    lines = []
    gpus = job.processes if job.uses_gpus else 0
    srun = ["srun", *flag_words(profile.srun, gpus, job.processes)]
    for task in job.tasks:
        on_node = shlex.join(task.launcher)
        words = task.launcher + task.args
        if job.stage == "train":
            # A node ignores USR2 until its training listens, and leaves its exit code in a file:
            # launchers lose it.
            if job.nodes > 1:
                on_node += _MEETING
            script = (
                'trap "" USR2; export RECIPES_EXIT_CODE_FILE="$REPORT.${SLURM_NODEID:-0}"; '
                f'exec {on_node} "$@"'
            )
            words = ("bash", "-c", script, job.label) + task.args
        lines.append(f"run {shlex.join([*srun, *words])}")
    if len(lines) == 1:
        return lines
    cases = ["case $SLURM_ARRAY_TASK_ID in"]
    for number, (line, task) in enumerate(zip(lines, job.tasks, strict=True)):
        cases.append(f"{number}) {line} ;;   # {task.title}")
    return cases + ["esac"]
