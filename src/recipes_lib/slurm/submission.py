"""Writing and submitting: the folder runs/NAME/slurm/ with a script for each job, and the talk with
sbatch, of whose chain all jobs are in the queue or none is.

A script is written to be read from top to bottom, edited and submitted by hand with `sbatch`. What
all jobs do alike (signals, requeues, exit codes) stands in launch/job.sh, which each one sources.
Every command of Slurm is an argument list; nothing passes through a shell.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from recipes_lib.core.atomic_files import write_json, write_text
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipeErrors, RecipesError
from recipes_lib.core.json_files import DamagedFile, read_object
from recipes_lib.core.project import cache_root, project_root, runs_root
from recipes_lib.core.terminal import warn
from recipes_lib.slurm.jobs import Job, JobPlan, Task
from recipes_lib.slurm.profile import (
    EnvironmentSection,
    Profile,
    SiteProfile,
    seconds_of,
    time_of,
)

TIMEOUT_S = 90
WIDTH = 110
ASK_SINFO = "is this the login node, and is the controller up? sinfo"
_FORMAT_VERSION = 1
# What only a node of several knows; bash puts it in there.
_MEETING_FLAGS = (
    *("--machine_rank", '"$SLURM_NODEID"'),
    *("--main_process_ip", '"$HEAD"', "--main_process_port", '"$PORT"'),
    *("--rdzv_backend", "static", "--same_network"),
)
# What Slurm says -> the profile's key it is about, and how to see what the site has.
_ACCOUNTS = "your accounts: sacctmgr show associations user=$USER format=account,partition,qos"
_REFUSALS = (
    (r"invalid partition", "partition", "partitions here: {partitions}"),
    (r"time limit|timelimit|MaxTime", "time", "limits here: sinfo -o '%P %l'"),
    (r"gres|generic resource", "gres", "what nodes have: sinfo -o '%P %G'"),
    (r"account", "account", _ACCOUNTS),
    (r"qos", "qos", _ACCOUNTS),
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


# ---- The folder ----


@dataclass(frozen=True)
class SubmittedJob:
    """A job in the queue, as jobs.json notes it; `tasks` says what each of them is about."""

    label: str
    id: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class LaunchFolder:
    """runs/<name>/slurm/: a script for each job, what the jobs are handed, job ids, logs and exit
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

    def log(self, task_label: str) -> Path:
        """The log of a task; requeues append to it."""
        return self.path / f"{task_label}.log"

    def exit_code(self, task_label: str) -> int | None:
        """Return the code a task ended with; None while it is not over, or was killed."""
        with suppress(FileNotFoundError, ValueError):
            return int((self.path / f"{task_label}.exit_code").read_text())
        return None

    def first_error(self, task_label: str) -> str | None:
        """Return what the first failing rank said."""
        errors = sorted((self.path / f"{task_label}.errors").glob("*"))
        return errors[0].read_text(encoding="utf-8", errors="replace").strip() if errors else None

    def job_file(self, label: str) -> Path:
        """Holds the id of a job that was submitted by hand: a pasted line writes it, and so does
        the job when it starts.
        """
        return self.path / f"{label}.job"

    def read_jobs(self) -> list[SubmittedJob]:
        """Return the submitted jobs; empty where none was.

        Raises:
            DamagedFile: jobs.json is not what was written to it.
        """
        remedy = "squeue lists the jobs; submitting them again writes it anew"
        jobs = []
        for row in read_object(self.jobs_file, remedy).get("jobs", []):
            number = row["id"]
            if not number and self.job_file(row["label"]).is_file():
                number = self.job_file(row["label"]).read_text().strip().partition(";")[0]
            if number:
                jobs.append(SubmittedJob(row["label"], number, tuple(row.get("tasks", ()))))
        return jobs

    def write_jobs(self, jobs: Iterable[Job], ids: Mapping[str, str], profile: str | None) -> None:
        """Note the jobs, with the ids of those that `recipes launch` submitted."""
        rows = [
            {
                "label": job.label,
                "stage": job.stage,
                "id": ids.get(job.label),
                "tasks": [task.what for task in job.tasks],
            }
            for job in jobs
        ]
        content = {"format_version": _FORMAT_VERSION, "profile": profile, "jobs": rows}
        write_json(self.jobs_file, content)

    def write_scripts(self, jobs: Sequence[Job], profile: SiteProfile | None) -> None:
        """Write the scripts of all jobs in place of what an earlier submission left; logs stay.

        `order` names them for launch/local.sh: a job a line, or a task of an array.
        """
        scripts = {job.label: script_of(job, self.path, profile) for job in jobs}
        self.path.mkdir(parents=True, exist_ok=True)
        for stale in self.path.iterdir():
            if stale.suffix in (".sbatch", ".exit_code", ".job"):
                stale.unlink()
            elif stale.suffix == ".errors":
                shutil.rmtree(stale)
        order = []
        for job in jobs:
            write_text(self.script(job.label), scripts[job.label])
            numbers = range(len(job.tasks)) if job.is_array else [""]
            order += [f"{job.label} {number}".rstrip() + "\n" for number in numbers]
        write_text(self.path / "order", "".join(order))


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


# ---- The script of a job ----


def script_of(job: Job, folder: Path, profile: SiteProfile | None) -> str:
    """Return the script of a job, launch/job.sbatch.jinja filled in.

    Args:
        folder: where it will lie, beside its log and its exit code.
        profile: the site; without one the script asks for nothing that is the site's, and sbatch is
            given it by hand.
    """
    from jinja2 import Environment, StrictUndefined

    templates = Environment(
        trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False
    )
    templates.filters["quote"] = lambda value: shlex.quote(str(value))
    templates.filters["quote_with_job_id"] = _quoted_with_job_id
    launch = project_root() / "launch"
    text = (launch / "job.sbatch.jinja").read_text(encoding="utf-8")
    environment = profile.values.environment if profile else EnvironmentSection()
    activate = Path(environment.venv or "").expanduser() / "bin" / "activate"
    return templates.from_string(text).render(
        job=job,
        folder=folder,
        directives=directives(job, folder, profile),
        here=Path.cwd(),
        max_requeues=profile.values.max_requeues if profile else Profile.max_requeues,
        shared=launch / "job.sh",
        environment=environment,
        activate=activate if environment.venv else None,
        variables=_variables(profile),
        makes_temporary=profile is not None and profile.values.directories.temporary,
        commands=job_commands(job, profile),
    )


def _variables(profile: SiteProfile | None) -> dict[str, str]:
    """Return what every job of a site exports."""
    runs, cache = str(runs_root().resolve()), str(cache_root().resolve())
    variables = {"RECIPES_RUNS_ROOT": runs, "RECIPES_CACHE": cache}
    if profile is not None:
        for key, variable in (("hub", "HF_HOME"), ("temporary", "TMPDIR")):
            if place := profile.directory(key):
                variables[variable] = place
        if profile.values.offline:
            variables["HF_HUB_OFFLINE"] = "1"
        if profile.values.vllm:
            variables["VLLM"] = str(Path(profile.values.vllm).expanduser())
        variables |= profile.values.variables
    return variables


def _quoted_with_job_id(value: str) -> str:
    """Quote for bash; `{job}` becomes the job's id."""
    parts = [shlex.quote(part) if part else "" for part in value.split("{job}")]
    return '"${SLURM_JOB_ID:-$$}"'.join(parts) or "''"


def job_commands(job: Job, profile: SiteProfile | None) -> list[str]:
    """Return the lines of a script that do the work."""
    srun = ("srun", *(profile.values.environment.srun if profile else ()))
    lines: list[str] = []
    if job.stage == "train":
        world, kind = job.shape.nodes * job.shape.processes, job.shape.distributed_type
        expected = json.dumps({"world_size": world, "distributed_type": kind})
        lines = [
            f"export RECIPES_EXPECT='{expected}'   # training refuses to be anything else",
            "# Each node ignores USR2 until its training listens, and leaves its exit code in a"
            " file: launchers lose it.",
        ]
    if not job.is_array:
        return lines + _task_commands(job, job.tasks[0], srun)
    lines.append("case $SLURM_ARRAY_TASK_ID in")
    for index, task in enumerate(job.tasks):
        inner = (f"  {line}" for line in _task_commands(job, task, srun))
        lines += [f"{index})   # {task.what}", *inner, "  ;;"]
    return [*lines, "esac"]


def _task_commands(job: Job, task: Task, srun: tuple[str, ...]) -> list[str]:
    """Return the lines of one task: its command, and what must succeed after it."""
    launcher = [*map(shlex.quote, task.launcher), *(_MEETING_FLAGS if job.shape.nodes > 1 else ())]
    start, args = f"run {shlex.join(srun)}", list(map(shlex.quote, task.args))
    if job.stage == "train":
        leave = 'trap "" USR2; export RECIPES_EXIT_CODE_FILE="$REPORT.${SLURM_NODEID:-0}"'
        on_node = ["", f"  {leave}", *_folded("  exec", [*launcher, '"$@"'])]
        quoted = shlex.quote("\n".join(on_node))
        *lines, last = f"{start} bash -c {quoted} {job.label}".split("\n")
        lines += _folded(last, args)
    else:
        lines = _folded(start, [*launcher, *args])
    if task.check:
        # the check needs the same container
        alone = [*srun, "--nodes=1", "--ntasks=1"] if len(srun) > 1 else []
        lines += _folded("check", map(shlex.quote, [*alone, *task.check]))
    return lines


def _folded(first: str, words: Iterable[str]) -> list[str]:
    """Return a command on as many lines as it needs; a flag stays beside its value."""
    units: list[str] = []
    for word in words:
        if units and re.fullmatch(r"-\S+", units[-1]) and not word.startswith("-"):
            units[-1] += f" {word}"
        else:
            units.append(word)
    lines = [first]
    for unit in units:
        if len(lines[-1]) + 1 + len(unit) > WIDTH:
            lines[-1] += " \\"
            lines.append(f"    {unit}")
        else:
            lines[-1] += f" {unit}"
    return lines


def directives(job: Job, folder: Path, profile: SiteProfile | None) -> list[str]:
    """Return the #SBATCH lines. Slurm reads quotes as bash does, but a backslash is one even within
    quotes.
    """
    lines = _flags(job, folder, profile)
    return [f"#SBATCH {shlex.join(words)}".replace("\\", "\\\\") for words in lines]


def _flags(job: Job, folder: Path, profile: SiteProfile | None) -> list[list[str]]:
    """Return what sbatch is asked for, the words of a line together."""
    shape, size = job.shape, max(1, job.shape.processes)
    ask, site = [f"--nodes={shape.nodes}", "--ntasks-per-node=1"], []
    lead = profile.values.signal_lead_s if profile else Profile.signal_lead_s
    if profile is not None:
        values = profile.values
        ask.append(f"--cpus-per-task={size * values.cpus_per_gpu}")
        if values.memory_gib_per_gpu:
            ask.append(f"--mem={size * values.memory_gib_per_gpu}G")
        if shape.gpus and values.gres:
            ask.append(f"--gres={values.gres.replace('{gpus}', str(shape.gpus))}")
        wanted = {
            "partition": values.of_stage("partition", job.stage),
            "time": _time_limit(job, profile),
            "account": values.account,
            "qos": values.qos,
        }
        site = [f"--{flag}={value}" for flag, value in wanted.items() if value]
        site += values.extra_sbatch
    log = str(folder / job.label).replace("%", "%%") + (".%a.log" if job.is_array else ".log")
    array = []
    if job.is_array:
        limit = f"%{job.throttle}" if job.throttle else ""
        array = [f"--array=0-{len(job.tasks) - 1}{limit}"]
    lines = (
        [f"--job-name={folder.parent.name}.{job.label}"],
        ask,
        site,
        [f"--signal=B:USR2@{lead}", "--requeue", "--open-mode=append"],
        [f"--output={log}"],
        array,
    )
    return [line for line in lines if line]


def _time_limit(job: Job, profile: SiteProfile) -> str | None:
    """Return the job's time limit: the profile's, or the plan's where that is shorter, but twice
    the signal's lead at least.
    """
    allowed = profile.values.of_stage("time", job.stage)
    if job.seconds is None:
        return allowed
    planned = max(job.seconds, 2 * profile.values.signal_lead_s)
    return allowed if allowed is not None and seconds_of(allowed) <= planned else time_of(planned)


# ---- Slurm ----


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
            done = _ask_sbatch(_sbatch(job, folder, ids), job, plan.path, profile)
            # --parsable prints ID or ID;cluster
            ids[job.label] = done.stdout.strip().splitlines()[-1].split(";")[0]
            folder.write_jobs(plan.jobs, ids, profile.name)
    except BaseException as error:
        try:
            scancel(list(ids.values()))
        except RecipesError as second:
            left = (
                f"still queued: {', '.join(ids)} ({second.what}); when Slurm answers: recipes"
                f" launch cancel {plan.name}"
            )
        else:
            folder.jobs_file.unlink(missing_ok=True)
            left = (
                f"nothing is queued: {', '.join(ids)} had been accepted and"
                f" {'is' if len(ids) == 1 else 'are'} cancelled"
            )
        if ids and isinstance(error, RecipesError):
            error.hints = (*error.hints, left)
        raise
    return ids


def prepare(plan: JobPlan, profile: SiteProfile | None) -> LaunchFolder:
    """Write the jobs' scripts and what they read, and note which jobs there will be."""
    folder = LaunchFolder(plan.path)
    folder.write_scripts(plan.jobs, profile)
    folder.write_jobs(plan.jobs, {}, profile.name if profile else None)
    plan.handed.write()
    return folder


def _sbatch(job: Job, folder: LaunchFolder, ids: Mapping[str, str]) -> list[str]:
    """Return the argument list that submits a job; what else Slurm is asked for stands in the job's
    script.

    Args:
        ids: the jobs before it.
    """

    def named(label: str) -> str:
        """Return the job id, or that of one task of an array: `train`, `train.2`."""
        job, _, task = label.rpartition(".")
        return ids[label] if label in ids else f"{ids[job]}_{task}"

    conditions = (("afterok", job.after), ("afterany", job.after_any))
    waits = [":".join([when, *map(named, labels)]) for when, labels in conditions if labels]
    dependency = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
    return ["sbatch", "--parsable", *dependency, str(folder.script(job.label))]


def dry_run(plan: JobPlan) -> Iterator[tuple[Job, str]]:
    """Yield each job and its exact sbatch line, as bash takes it.

    A variable keeps the job's id for the lines of those that wait for it, a file keeps it for
    `recipes launch status`.
    """
    folder = LaunchFolder(plan.path)
    names = {job.label: re.sub(r"\W", "_", job.label) for job in plan.jobs}
    ids = {label: f"${{{name}}}" for label, name in names.items()}
    for job in plan.jobs:
        line = " ".join(
            word if word.startswith("--dependency=") else shlex.quote(word)
            for word in _sbatch(job, folder, ids)
        )
        noted = shlex.quote(str(folder.job_file(job.label)))
        yield job, f"{names[job.label]}=$({line} | tee {noted})"


def test_chain(plan: JobPlan, profile: SiteProfile) -> Iterator[tuple[str, str]]:
    """Yield the label of each job and what Slurm says to it, without queueing any. Takes job ids,
    writes nothing.

    Raises:
        RecipeErrors: what it would refuse, every job's.
    """
    refused: dict[str, RecipeError] = {}
    for job in plan.jobs:
        script = script_of(job, plan.path, profile)
        try:
            done = _ask_sbatch(["sbatch", "--test-only"], job, plan.path, profile, script)
        except RecipeError as error:
            refused.setdefault(str(error), error)
        else:  # --test-only answers on stderr
            yield job.label, done.stderr.strip().removeprefix("sbatch: ")
    if refused:
        raise RecipeErrors(refused.values())


def _ask_sbatch(
    argv: Sequence[str], job: Job, folder: Path, profile: SiteProfile, script: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run sbatch; raise what it refuses."""
    flags = [word for line in _flags(job, folder, profile) for word in line]
    # sbatch takes these variables of the shell before the #SBATCH lines
    names = [word.partition("=")[0].removeprefix("--") for word in flags]
    others = {"time": "timelimit", "mem": "mem-per-node", "array": "array-inx"}
    without = {f"SBATCH_{others.get(name, name).upper().replace('-', '_')}" for name in names}
    done = run_slurm(argv, stdin=script, without=without)
    if done.returncode:
        raise _refusal(done.stderr, profile, job.stage, flags)
    return done


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
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in without
        and (not (inside and name.startswith("SLURM_")) or name in _OF_THE_SITE)
    }
    try:
        return subprocess.run(
            list(argv),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**environment, "LC_ALL": "C"},
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


def _refusal(text: str, profile: SiteProfile, stage: str, flags: Sequence[str]) -> RecipesError:
    """Return Slurm's error in one line, with the profile's line and the remedy."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in text.strip().splitlines()]
    failed = "Batch job submission failed: "
    told = [line for line in lines if line and not line.startswith((failed.strip(), "Try "))]
    told += [line.partition(failed)[2] for line in lines if failed in line]
    what = told[0] if told else "no reason given"
    if is_unreachable(text):
        return _no_controller(what)
    refuses = f"Slurm refuses the stage {stage}: {what}"
    for pattern, key, hint in _REFUSALS:
        if re.search(pattern, text, re.I):
            if "{partitions}" in hint:
                names = run_slurm(["sinfo", "-h", "-o", "%R"]).stdout.split()
                there = ", ".join(dict.fromkeys(names)) or "not known (sinfo says nothing)"
                hint = hint.replace("{partitions}", there)
            value = profile.values.of_stage(key, stage)
            return profile.error(key, f"{refuses}; {key} is {value}", hint)
    if re.search("node configuration|node count", text, re.I):
        # Slurm does not say which of them is too much
        sizes = ("--nodes=", "--gres=", "--cpus-per-task=", "--mem=", "--partition=")
        asked = [word for word in flags if word.startswith(sizes)]
        key = "gres" if any(word.startswith("--gres=") for word in asked) else "memory_gib_per_gpu"
        hint = "what nodes have: sinfo -o '%P %D nodes, %c cores, %m MB, %G'"
        return profile.error(key, f"{refuses}: no node has {' '.join(asked)} at once", hint)
    command = "the exact command: recipes launch ... --dry-run"
    return RecipeError(refuses, command, file=profile.document.file)


def is_unreachable(said: str) -> bool:
    """Whether what one of Slurm's commands said means that the controller did not answer."""
    return _UNREACHABLE.search(said) is not None


def _no_controller(said: str) -> EnvironmentFault:
    return EnvironmentFault(f"Slurm cannot be reached: {said}", ASK_SINFO)


def scancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that are over already are no error.

    Raises:
        EnvironmentFault: Slurm did not answer, so they may go on.
    """
    if ids:
        done = run_slurm(["scancel", *ids])
        if done.returncode and is_unreachable(done.stderr):
            raise _no_controller(done.stderr.strip().splitlines()[0])
