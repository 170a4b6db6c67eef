"""Talking to Slurm: submitting a chain of jobs, of which all are in the queue or none is, and what
its errors mean for the profile.

Every command is an argument list; nothing passes through a shell.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence

from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipeErrors, RecipesError
from recipes_lib.slurm.folder import LaunchFolder
from recipes_lib.slurm.jobs import Job
from recipes_lib.slurm.profile import SiteProfile
from recipes_lib.slurm.recipe_jobs import JobPlan
from recipes_lib.slurm.script import Script, script_of

TIMEOUT_S = 90
# What Slurm says -> the profile's key it is about, and what to do.
_REFUSALS: tuple[tuple[str, str, str], ...] = (
    (r"invalid partition", "partition", "partitions here: {partitions}"),
    (r"time limit|timelimit|MaxTime", "time", "limits here: sinfo -o '%P %l'"),
    (r"gres|generic resource", "gres", "what nodes have: sinfo -o '%P %G'"),
    (
        r"account",
        "account",
        "your accounts: sacctmgr show associations user=$USER format=account,partition,qos",
    ),
    (
        r"qos",
        "qos",
        "your accounts: sacctmgr show associations user=$USER format=account,partition,qos",
    ),
    (r"memory", "memory_gib_per_gpu", "what nodes have, in MB: sinfo -o '%P %m'"),
    (r"more processors|cpu count|cpus", "cpus_per_gpu", "what nodes have: sinfo -o '%P %c'"),
    (r"unrecognized option|invalid option|unknown option", "extra_sbatch", "its flags: man sbatch"),
)
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_UNREACHABLE = re.compile(
    r"contact slurm controller|connect failure|communication connection|configuration"
    r" source|timed out",
    re.I,
)


def submit_chain(plan: JobPlan, profile: SiteProfile) -> dict[str, str]:
    """Write the submission's folder, submit every job, and return {label: job id}.

    Raises:
        RecipesError: Slurm refused a job; those before it are cancelled, or named where that failed
            too.
    """
    scripts = prepare(plan, profile)
    ids: dict[str, str] = {}
    try:
        for job in plan.jobs:
            argv = sbatch_argv(job, plan.folder, ids)
            done = run_slurm(argv, without=_overruled(scripts[job.label]))
            if done.returncode:
                raise _refusal(done.stderr, profile, job.stage, scripts[job.label])
            ids[job.label] = (
                done.stdout.strip().splitlines()[-1].split(";")[0]
            )  # --parsable prints ID or ID;cluster
            plan.folder.write_jobs(plan.jobs, ids, profile.name)
    except BaseException as error:
        try:
            scancel(list(ids.values()))
        except RecipesError as second:
            left = (
                f"still queued: {', '.join(ids)} ({second.what}); when Slurm answers: recipes"
                f" launch cancel {plan.name}"
            )
        else:
            plan.folder.jobs_file.unlink(missing_ok=True)
            left = (
                f"nothing is queued: {', '.join(ids)} had been accepted and"
                f" {'is' if len(ids) == 1 else 'are'} cancelled"
            )
        if ids and isinstance(error, RecipesError):
            error.hints = (*error.hints, left)
        raise
    return ids


def prepare(plan: JobPlan, profile: SiteProfile | None) -> dict[str, Script]:
    """Write the jobs' scripts and what they read, note which jobs there will be, and return {label:
    script}.
    """
    scripts = {job.label: script_of(job, plan.folder.path, profile) for job in plan.jobs}
    plan.folder.write_scripts(
        plan.jobs, {label: script.text() for label, script in scripts.items()}
    )
    plan.folder.write_jobs(plan.jobs, {}, profile.name if profile else None)
    plan.snapshot.write()
    return scripts


def sbatch_argv(job: Job, folder: LaunchFolder, ids: Mapping[str, str]) -> list[str]:
    """Return the argument list that submits a job; what else Slurm is asked for stands in the job's
    script.

    Args:
        ids: the jobs before it.
    """
    waits = [
        f"{when}:" + ":".join(_named(ids, label) for label in labels)
        for when, labels in (("afterok", job.after), ("afterany", job.after_any))
        if labels
    ]
    dependency = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
    return ["sbatch", "--parsable", *dependency, str(folder.script(job.label))]


def dry_run(plan: JobPlan, profile: SiteProfile) -> Iterator[tuple[str, Job, Script]]:
    """Yield the exact sbatch line of each job, as bash takes it, and its script.

    A variable keeps the job's id for the lines of those that wait for it, a file keeps it for
    `recipes launch status`.
    """
    names = {job.label: re.sub(r"\W", "_", job.label) for job in plan.jobs}
    ids = {label: f"${{{name}}}" for label, name in names.items()}
    for job in plan.jobs:
        words = sbatch_argv(job, plan.folder, ids)
        line = " ".join(
            word if word.startswith("--dependency=") else shlex.quote(word) for word in words
        )
        noted = shlex.quote(str(plan.folder.job_file(job.label)))
        yield (
            f"{names[job.label]}=$({line} | tee {noted})",
            job,
            script_of(job, plan.folder.path, profile),
        )


def test_chain(plan: JobPlan, profile: SiteProfile) -> Iterator[tuple[Job, str]]:
    """Yield what Slurm says to each job, without queueing any. Takes job ids, writes nothing.

    Raises:
        RecipeErrors: what it would refuse, every job's.
    """
    refused: dict[str, RecipeError] = {}
    for job in plan.jobs:
        script = script_of(job, plan.folder.path, profile)
        done = run_slurm(["sbatch", "--test-only"], stdin=script.text(), without=_overruled(script))
        if done.returncode == 0:
            yield job, done.stderr.strip().removeprefix("sbatch: ")  # --test-only answers there
            continue
        error = _refusal(done.stderr, profile, job.stage, script)
        if not isinstance(error, RecipeError):
            raise error
        refused.setdefault(str(error), error)
    if refused:
        raise RecipeErrors(refused.values())


def _overruled(script: Script) -> set[str]:
    """Return the variables with which a shell would overrule what the script asks for: sbatch takes
    them before #SBATCH lines.
    """
    flags = [word.partition("=")[0].removeprefix("--") for words in script.flags for word in words]
    others = {"time": "timelimit", "mem": "mem-per-node", "array": "array-inx"}
    return {f"SBATCH_{others.get(flag, flag).upper().replace('-', '_')}" for flag in flags}


def run_slurm(
    argv: Sequence[str],
    timeout_s: float = TIMEOUT_S,
    stdin: str | None = None,
    without: Collection[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Args:
        without: variables that it is not to see.

    Raises:
        EnvironmentFault: it is not installed here, or gives no answer.
    """
    # Within a job, say on an interactive node, the shell holds that job's variables, and sbatch
    # would hand them on to the new one.
    inside = "SLURM_JOB_ID" in os.environ
    kept = {
        name: value
        for name, value in os.environ.items()
        if not (inside and name.startswith("SLURM_")) or name in _OF_THE_SITE
    }
    environment = {name: value for name, value in kept.items() if name not in without} | {
        "LC_ALL": "C"
    }
    try:
        return subprocess.run(
            list(argv),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment,
            errors="replace",
        )
    except FileNotFoundError:
        raise EnvironmentFault(
            f"{argv[0]} is not on this machine",
            "log in to the cluster's login node; without Slurm: launch/local.sh RECIPE",
            "only to see what would be submitted: --dry-run",
        ) from None
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(
            f"{argv[0]} gave no answer in {timeout_s:g} s",
            "the Slurm controller may be down: sinfo",
        ) from None


def _refusal(text: str, profile: SiteProfile, stage: str, script: Script) -> RecipesError:
    """Return Slurm's error in one line, with the profile's line and the remedy."""
    lines = [
        re.sub(r"^\w+: (error: )?", "", line).strip()
        for line in text.strip().splitlines()
        if line.strip()
    ]
    told = [line for line in lines if not line.startswith(("Batch job submission failed", "Try "))]
    reason = next(
        (
            line.partition("Batch job submission failed: ")[2]
            for line in lines
            if "submission failed: " in line
        ),
        "",
    )
    what = told[0] if told else reason or "no reason given"
    if is_unreachable(text):
        return _no_controller(what)
    for pattern, key, hint in _REFUSALS:
        if re.search(pattern, text, re.I):
            value = (
                profile.values.of_stage(key, stage)
                if key in ("partition", "time")
                else getattr(profile.values, key)
            )
            if "{partitions}" in hint:
                names = run_slurm(["sinfo", "-h", "-o", "%R"]).stdout.split()
                hint = hint.replace(
                    "{partitions}",
                    ", ".join(dict.fromkeys(names)) or "not known (sinfo says nothing)",
                )
            return profile.error(
                key, f"Slurm refuses the stage {stage}: {what}; {key} is {value}", hint
            )
    if re.search(
        "node configuration|node count", text, re.I
    ):  # Slurm does not say which of them is too much
        words = [word for line in script.flags for word in line]
        asked = [
            word
            for word in words
            if word.startswith(
                ("--nodes=", "--gres=", "--cpus-per-task=", "--mem=", "--partition=")
            )
        ]
        key = "gres" if any(word.startswith("--gres=") for word in asked) else "memory_gib_per_gpu"
        hint = "what nodes have: sinfo -o '%P %D nodes, %c cores, %m MB, %G'"
        return profile.error(
            key,
            f"Slurm refuses the stage {stage}: {what}: no node has {' '.join(asked)} at once",
            hint,
        )
    return RecipeError(
        f"Slurm refuses the stage {stage}: {what}",
        "the exact command: recipes launch ... --dry-run",
        file=profile.document.file,
    )


def is_unreachable(said: str) -> bool:
    """Whether what one of Slurm's commands said means that the controller did not answer."""
    return _UNREACHABLE.search(said) is not None


def _no_controller(said: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"Slurm cannot be reached: {said}",
        "is this the login node, and is the controller up? sinfo",
    )


def scancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that are over already are no error.

    Raises:
        EnvironmentFault: Slurm did not answer, so they may go on.
    """
    if ids:
        done = run_slurm(["scancel", *ids])
        if done.returncode and is_unreachable(done.stderr):
            raise _no_controller(done.stderr.strip().splitlines()[0])


def _named(ids: Mapping[str, str], label: str) -> str:
    """Return the Slurm name of a label such as `train` or `train.2`: the job id, or that of one
    task of an array.
    """
    if label in ids:
        return ids[label]
    job, _, task = label.rpartition(".")
    return f"{ids[job]}_{task}"
