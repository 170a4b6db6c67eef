"""Talking to Slurm: the argument list of sbatch, submission, and what its errors mean in terms of the profile.

Every command is an argument list; nothing passes through a shell.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes_lib.errors import EnvironmentFault, RecipeError, RecipesError
from recipes_lib.launching.folder import LaunchFolder
from recipes_lib.launching.jobs import Job
from recipes_lib.launching.profile import SiteProfile, seconds_of, time_of
from recipes_lib.recipe.project import project_root

TIMEOUT_S = 90
# What Slurm says -> the profile's key it is about, and what to do.
_REFUSALS: tuple[tuple[str, str, str], ...] = (
    (r"invalid partition", "partition", "partitions here: {partitions}"),
    (r"time limit|timelimit|MaxTime", "time", "limits here: sinfo -o '%P %l'"),
    (r"gres|generic resource", "gres", "what nodes have: sinfo -o '%P %G'"),
    (r"account", "account", "your accounts: sacctmgr show associations user=$USER format=account,partition,qos"),
    (r"qos", "qos", "your accounts: sacctmgr show associations user=$USER format=account,partition,qos"),
    (r"memory", "memory_gib_per_gpu", "what nodes have, in MB: sinfo -o '%P %m'"),
    (r"more processors|cpu count|cpus", "cpus_per_gpu", "what nodes have: sinfo -o '%P %c'"),
    (r"unrecognized option|invalid option|unknown option", "extra_sbatch", "its flags: man sbatch"),
)
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_UNREACHABLE = re.compile(r"contact slurm controller|connect failure|communication connection|configuration source|timed out", re.I)


def sbatch_argv(job: Job, folder: LaunchFolder, profile: SiteProfile, dependencies: Sequence[str] = ()) -> list[str]:
    """Return the argument list that submits a job.

    Args:
        dependencies: `afterok:12`, `afterany:13_2`: all of them must hold.
    """
    values, shape = profile.values, job.shape
    size = max(1, shape.processes)
    pattern = str(folder.path / job.label).replace("%", "%%") + (".%a.log" if job.is_array else ".log")
    words = ["sbatch", "--parsable", f"--job-name={folder.name}.{job.label}", f"--nodes={shape.nodes}", "--ntasks-per-node=1"]
    words.append(f"--cpus-per-task={size * values.cpus_per_gpu}")
    if values.memory_gib_per_gpu:
        words.append(f"--mem={size * values.memory_gib_per_gpu}G")
    if shape.gpus and values.gres:
        words.append(f"--gres={values.gres.replace('{gpus}', str(shape.gpus))}")
    for flag, value in (("partition", values.of_stage("partition", job.stage)), ("time", time_limit(job, profile))):
        words += [f"--{flag}={value}"] if value else []
    for flag in ("account", "qos"):
        words += [f"--{flag}={getattr(values, flag)}"] if getattr(values, flag) else []
    words += [f"--signal=B:USR2@{values.signal_lead_s}", "--requeue", "--open-mode=append", f"--output={pattern}", f"--chdir={Path.cwd()}"]
    if job.is_array:
        words.append(f"--array=0-{len(job.tasks) - 1}" + (f"%{job.throttle}" if job.throttle else ""))
    if dependencies:
        words += [f"--dependency={','.join(dependencies)}", "--kill-on-invalid-dep=yes"]
    return [*words, *values.extra_sbatch, str(project_root() / "launch" / "job.sbatch"), str(folder.path), job.label]


def time_limit(job: Job, profile: SiteProfile) -> str | None:
    """Return the job's time limit: the profile's, or the plan's where that is shorter, but twice the signal's lead at least."""
    allowed = profile.values.of_stage("time", job.stage)
    if job.seconds is None:
        return allowed
    planned = max(job.seconds, 2 * profile.values.signal_lead_s)
    return allowed if allowed is not None and seconds_of(allowed) <= planned else time_of(planned)


def run_slurm(argv: Sequence[str], timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Raises:
        EnvironmentFault: it is not installed here, or gives no answer.
    """
    # Within a job, say on an interactive node, the shell holds that job's variables, and sbatch would hand them on to the new one.
    inside = "SLURM_JOB_ID" in os.environ
    kept = {name: value for name, value in os.environ.items() if not (inside and name.startswith("SLURM_")) or name in _OF_THE_SITE}
    environment = {**kept, "LC_ALL": "C"}
    try:
        return subprocess.run(list(argv), capture_output=True, text=True, timeout=timeout_s, env=environment, errors="replace")
    except FileNotFoundError:
        raise EnvironmentFault(
            f"{argv[0]} is not on this machine",
            "log in to the cluster's login node; without Slurm: launch/local.sh RECIPE",
            "only to see what would be submitted: --dry-run",
        ) from None
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(f"{argv[0]} gave no answer in {timeout_s:g} s", "the Slurm controller may be down: sinfo") from None


def submit(argv: Sequence[str], profile: SiteProfile, stage: str) -> str:
    """Submit a job and return its id.

    Raises:
        RecipesError: Slurm refused it; placed at the profile's key where one is the cause.
    """
    done = run_slurm(argv)
    if done.returncode:
        raise refusal(done.stderr, profile, stage, argv)
    return done.stdout.strip().splitlines()[-1].split(";")[0]  # --parsable prints ID or ID;cluster


def try_submission(argv: Sequence[str], profile: SiteProfile, stage: str) -> str:
    """Ask Slurm whether it would take a job, and return when it would start. Takes a job id, starts nothing.

    Raises:
        RecipesError: it would not.
    """
    ours = [word for word in argv if word != "--parsable" and not word.startswith(("--dependency=", "--kill-on-invalid-dep"))]
    done = run_slurm([ours[0], "--test-only", *ours[1:]])
    if done.returncode:
        raise refusal(done.stderr, profile, stage, argv)
    return done.stderr.strip().removeprefix("sbatch: ")  # --test-only answers there


def refusal(text: str, profile: SiteProfile, stage: str, argv: Sequence[str]) -> RecipesError:
    """Return Slurm's error in one line, with the profile's line and the remedy.

    Args:
        argv: what was submitted.
    """
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in text.strip().splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Batch job submission failed", "Try "))]
    reason = next((line.partition("Batch job submission failed: ")[2] for line in lines if "submission failed: " in line), "")
    what = told[0] if told else reason or "no reason given"
    if is_unreachable(text):
        return _no_controller(what)
    for pattern, key, hint in _REFUSALS:
        if re.search(pattern, text, re.I):
            value = profile.values.of_stage(key, stage) if key in ("partition", "time") else getattr(profile.values, key)
            hint = hint.replace("{partitions}", partitions())
            return profile.error(key, f"Slurm refuses the stage {stage}: {what}; {key} is {value}", hint)
    if re.search("node configuration|node count", text, re.I):  # Slurm does not say which of them is too much
        asked = [word for word in argv if word.startswith(("--nodes=", "--gres=", "--cpus-per-task=", "--mem=", "--partition="))]
        key = "gres" if any(word.startswith("--gres=") for word in asked) else "memory_gib_per_gpu"
        hint = "what nodes have: sinfo -o '%P %D nodes, %c cores, %m MB, %G'"
        return profile.error(key, f"Slurm refuses the stage {stage}: {what}: no node has {' '.join(asked)} at once", hint)
    return RecipeError(
        f"Slurm refuses the stage {stage}: {what}", "the exact command: recipes launch ... --dry-run", file=profile.document.file
    )


def partitions() -> str:
    """Return the names of the site's partitions."""
    done = run_slurm(["sinfo", "-h", "-o", "%R"])
    return ", ".join(dict.fromkeys(done.stdout.split())) or "not known (sinfo says nothing)"


def is_unreachable(said: str) -> bool:
    """Whether what one of Slurm's commands said means that the controller did not answer."""
    return _UNREACHABLE.search(said) is not None


def _no_controller(said: str) -> EnvironmentFault:
    return EnvironmentFault(f"Slurm cannot be reached: {said}", "is this the login node, and is the controller up? sinfo")


def scancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that are over already are no error.

    Raises:
        EnvironmentFault: Slurm did not answer, so they may go on.
    """
    if ids:
        done = run_slurm(["scancel", *ids])
        if done.returncode and is_unreachable(done.stderr):
            raise _no_controller(done.stderr.strip().splitlines()[0])


def named(ids: Mapping[str, str], label: str) -> str:
    """Return the Slurm name of a label such as `train` or `train.2`: the job id, or that of one task of an array."""
    if label in ids:
        return ids[label]
    job, _, task = label.rpartition(".")
    return f"{ids[job]}_{task}"
