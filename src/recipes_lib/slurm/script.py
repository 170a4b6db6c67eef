"""The script of a job, runs/NAME/slurm/JOB.sbatch: what Slurm is asked for, the site's environment,
and the plain commands.

It is written to be read from top to bottom, edited and submitted by hand with `sbatch`. What all
jobs do alike (signals, requeues, exit codes) stands in launch/job.sh, which each script sources.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import cache_root, project_root, runs_root
from recipes_lib.slurm.jobs import Job, Task
from recipes_lib.slurm.profile import SiteProfile, seconds_of, time_of
from recipes_lib.slurm.sections import Profile

WIDTH = 110
# What only a node of several knows; bash puts it in there.
MEETING_FLAGS = (
    *(
        "--machine_rank",
        '"$SLURM_NODEID"',
        "--main_process_ip",
        '"$HEAD"',
        "--main_process_port",
        '"$PORT"',
    ),
    *("--rdzv_backend", "static", "--same_network"),
)


@dataclass(frozen=True)
class Script:
    """A job's script in three parts.

    Args:
        flags: words for sbatch, those of one line together.
        setup: the lines before the commands.
        commands: the lines that do the work.
    """

    title: str
    flags: tuple[tuple[str, ...], ...]
    setup: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def directives(self) -> list[str]:
        """The #SBATCH lines. Slurm reads quotes as bash does, but a backslash is one even within
        quotes.
        """
        return [f"#SBATCH {shlex.join(words)}".replace("\\", "\\\\") for words in self.flags]

    def text(self) -> str:
        """Return the file's content."""
        head = [
            "#!/bin/bash",
            (
                f"# {self.title}, written by `recipes launch`. With sbatch this file is a job, with"
                " bash it runs here."
            ),
        ]
        return "\n".join([*head, *self.directives, "", *self.setup, "", *self.commands, ""])


def script_of(job: Job, folder: Path, profile: SiteProfile | None) -> Script:
    """Return the script of a job.

    Args:
        folder: where it will lie, beside its log and its exit code.
        profile: the site; without one the script asks for nothing that is the site's, and sbatch is
            given it by hand.

    Raises:
        RecipeError: the folder's name holds a line break, which no #SBATCH line can.
    """
    if "\n" in str(folder):
        raise RecipeError(
            f"a folder whose name holds a line break cannot be launched from: {str(folder)!r}"
        )
    shape = job.shape
    begin = [
        f"cd {shlex.quote(str(Path.cwd()))} || exit 5",
        f"FOLDER={shlex.quote(str(folder))} JOB={job.label}",
        (
            f"NODES={shape.nodes} PROCESSES={shape.processes}"
            f" MAX_REQUEUES={profile.values.max_requeues if profile else Profile.max_requeues}"
        ),
        (
            f"source {shlex.quote(str(project_root() / 'launch' / 'job.sh'))} || exit 5   # run,"
            " check, finish: signals, requeues, exit codes"
        ),
    ]
    if job.stage == "train":
        expected = {
            "world_size": shape.nodes * shape.processes,
            "distributed_type": shape.distributed_type,
        }
        commands = [
            f"export RECIPES_EXPECT='{json.dumps(expected)}'   # training refuses to be anything"
            " else"
        ]
        commands += [
            "# Each node ignores USR2 until its training listens, and leaves its exit code in a"
            " file: launchers lose it."
        ]
    else:
        commands = []
    srun = ("srun", *(profile.values.environment.srun if profile else ()))
    if job.is_array:
        commands += ["case $SLURM_ARRAY_TASK_ID in"]
        for index, task in enumerate(job.tasks):
            commands += [
                f"{index})   # {task.what}",
                *(f"  {line}" for line in _commands(job, task, srun)),
                "  ;;",
            ]
        commands += ["esac"]
    else:
        commands += _commands(job, job.tasks[0], srun)
    title = f"{folder.parent.name}: {job.label}"
    return Script(
        title,
        _flags(job, folder, profile),
        (*begin, "", *_environment(profile)),
        (*commands, "finish"),
    )


def _commands(job: Job, task: Task, srun: tuple[str, ...]) -> list[str]:
    """Return the lines of one task: its command, and what must succeed after it."""
    launcher = [*map(shlex.quote, task.launcher), *(MEETING_FLAGS if job.shape.nodes > 1 else ())]
    start, args = f"run {shlex.join(srun)}", list(map(shlex.quote, task.args))
    if job.stage == "train":
        leave = 'trap "" USR2; export RECIPES_EXIT_CODE_FILE="$REPORT.${SLURM_NODEID:-0}"'
        on_node = shlex.quote(
            "\n".join(["", f"  {leave}", *_folded("  exec", [*launcher, '"$@"'])])
        )
        *lines, last = f"{start} bash -c {on_node} {job.label}".split("\n")
        lines += _folded(last, args)
    else:
        lines = _folded(start, [*launcher, *args])
    if task.check:
        alone = (
            [*srun, "--nodes=1", "--ntasks=1"] if len(srun) > 1 else []
        )  # the check needs the same container
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


def _flags(job: Job, folder: Path, profile: SiteProfile | None) -> tuple[tuple[str, ...], ...]:
    """Return what sbatch is asked for, the words of a line together."""
    shape, size = job.shape, max(1, job.shape.processes)
    ask, site, signal = [f"--nodes={shape.nodes}", "--ntasks-per-node=1"], [], 300
    if profile is not None:
        values, signal = profile.values, profile.values.signal_lead_s
        ask.append(f"--cpus-per-task={size * values.cpus_per_gpu}")
        ask += [f"--mem={size * values.memory_gib_per_gpu}G"] if values.memory_gib_per_gpu else []
        ask += (
            [f"--gres={values.gres.replace('{gpus}', str(shape.gpus))}"]
            if shape.gpus and values.gres
            else []
        )
        partition, time = values.of_stage("partition", job.stage), time_limit(job, profile)
        for flag, value in (
            ("partition", partition),
            ("time", time),
            ("account", values.account),
            ("qos", values.qos),
        ):
            site += [f"--{flag}={value}"] if value else []
        site += values.extra_sbatch
    log = str(folder / job.label).replace("%", "%%") + (".%a.log" if job.is_array else ".log")
    array = (
        f"--array=0-{len(job.tasks) - 1}" + (f"%{job.throttle}" if job.throttle else "")
        if job.is_array
        else ""
    )
    lines = (
        (f"--job-name={folder.parent.name}.{job.label}",),
        tuple(ask),
        tuple(site),
        (f"--signal=B:USR2@{signal}", "--requeue", "--open-mode=append"),
        (f"--output={log}",),
        (array,) if array else (),
    )
    return tuple(line for line in lines if line)


def time_limit(job: Job, profile: SiteProfile) -> str | None:
    """Return the job's time limit: the profile's, or the plan's where that is shorter, but twice
    the signal's lead at least.
    """
    allowed = profile.values.of_stage("time", job.stage)
    if job.seconds is None:
        return allowed
    planned = max(job.seconds, 2 * profile.values.signal_lead_s)
    return allowed if allowed is not None and seconds_of(allowed) <= planned else time_of(planned)


def _environment(profile: SiteProfile | None) -> list[str]:
    """Return the lines that make the site's environment; one that fails ends the job. Values are
    quoted.
    """
    variables = {
        "RECIPES_RUNS_ROOT": str(runs_root().resolve()),
        "RECIPES_CACHE": str(cache_root().resolve()),
    }
    before: list[str] = []
    after: list[str] = []
    if profile is not None:
        values, environment = profile.values, profile.values.environment
        before += [f"module load {shlex.quote(name)}" for name in environment.modules]
        if environment.conda:
            before += [
                'eval "$("${CONDA_EXE:-conda}" shell.bash hook)"',
                f"conda activate {shlex.quote(environment.conda)}",
            ]
        if environment.venv:
            before += [
                "source"
                f" {shlex.quote(str(Path(environment.venv).expanduser() / 'bin' / 'activate'))}"
            ]
        for key, variable in (("hub", "HF_HOME"), ("temporary", "TMPDIR")):
            place = profile.directory(key)
            variables |= {variable: place} if place else {}
        variables |= {"HF_HUB_OFFLINE": "1"} if values.offline else {}
        variables |= {"VLLM": str(Path(values.vllm).expanduser())} if values.vllm else {}
        variables |= values.variables
        after = [
            *(['mkdir -p "$TMPDIR"'] if values.directories.temporary else []),
            *environment.setup,
        ]
    exports = [f"export {name}={_quoted(value)}" for name, value in variables.items()]
    must = [f"{line} || environment_failed" for line in before]
    return [*must, *exports, *(f"{line} || environment_failed" for line in after)]


def _quoted(value: str) -> str:
    """Quote for bash; `{job}` becomes the job's id."""
    parts = [shlex.quote(part) for part in value.split("{job}")]
    return '"${SLURM_JOB_ID:-$$}"'.join(
        "" if part == "''" and len(parts) > 1 else part for part in parts
    )
