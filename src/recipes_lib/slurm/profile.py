"""A site profile (launch/profiles/*.yaml): what a Slurm site is like, and nothing of any recipe.

What sbatch understands stands under its own names and is passed on; sbatch itself refuses what the
site does not have. Needs no torch.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from recipes_lib.config.documents import Document, did_you_mean, read
from recipes_lib.config.parsing import Section, parse
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root

STAGES = ("train", "eval", "report")
Flags = dict[str, str | int | bool | None]
# What `recipes launch` decides itself, for each job.
_OURS = (
    *("nodes", "ntasks", "ntasks-per-node", "array", "dependency", "output", "error", "job-name"),
    *("signal", "requeue", "no-requeue", "open-mode", "parsable", "wrap", "wait"),
)
# Variables that are those of this process too, while it launches.
_FOLDERS = ("RECIPES_RUNS_ROOT", "RECIPES_CACHE", "HF_HOME")


class Profile(Section):
    """One Slurm site."""

    kind: ClassVar[str] = "profile"
    gone: ClassVar = {
        "partition": "write sbatch.partition, or stages.train.partition",
        "time": "write sbatch.time, or stages.train.time",
        "gres": "write sbatch.gres",
        "account": "write sbatch.account",
        "qos": "write sbatch.qos",
        "cpus_per_gpu": "write sbatch.cpus-per-gpu, or cpus-per-task without GPUs",
        "memory_gib_per_gpu": "write sbatch.mem-per-gpu: 64G",
        "extra_sbatch": "write each flag under sbatch",
        "environment": "write its lines under setup, the words before a command under prefix",
        "variables": "write env",
        "directories": "write env.RECIPES_RUNS_ROOT, env.HF_HOME, env.TMPDIR",
        "gpu": "remove it: a job asks for the time that is written here",
    }

    sbatch: Flags
    """Flags of sbatch under their long names (partition, account, gres, time, constraint, ...),
    for every job. `{gpus}` is the number of GPUs of a node, `{processes}` of processes. true is a
    flag without a value; null leaves a flag out. Flags about GPUs are left out of jobs that need
    none; a site without such a flag has no GPUs."""
    stages: dict[str, Flags] = {}
    """Flags of one stage (train, eval, report), which replace those of `sbatch`."""
    setup: list[str] = []
    """Lines of bash that every job runs first: module load, source .venv/bin/activate. Each must
    succeed."""
    prefix: list[str] = []
    """Words before every command, for a container: [apptainer, exec, --nv, image.sif]."""
    srun: list[str] = []
    """Words for srun, which starts every command: [--container-image=/images/recipes.sqsh]."""
    env: dict[str, str] = {}
    """Environment variables of every job. `{user}` is the user's name, `{job}` the job's id.
    RECIPES_RUNS_ROOT, RECIPES_CACHE and HF_HOME are used here too: login and compute nodes must
    both see them."""
    offline: bool = True
    """Compute nodes have no network: jobs use what `recipes prefetch` fetched
    (HF_HUB_OFFLINE=1)."""
    vllm: str | None = None
    """The vllm program, of an environment of its own. A job starts the judge with it that an
    evaluation expects at 127.0.0.1."""
    signal_lead_s: int = Field(300, ge=10)
    """Seconds before the time limit at which a training is asked to save: more than a step, an
    evaluation batch and a save."""
    max_requeues: int = Field(20, ge=0)
    """How often a job that was stopped is queued again by itself."""
    max_concurrent_arms: int | None = Field(None, ge=1)
    """Arms of a study that train at the same time; null is no limit."""

    def flags(self, stage: str, gpus: int, processes: int) -> list[str]:
        """Return the flags of sbatch for a job of a stage.

        Args:
            stage: train, eval or report.
            gpus: GPUs on each node; 0 leaves out what is about GPUs.
            processes: processes on each node.
        """
        words = []
        for name, value in {**self.sbatch, **self.stages.get(stage, {})}.items():
            if value is None or value is False or (not gpus and _is_about_gpus(name, value)):
                continue
            text = str(value).replace("{gpus}", str(gpus)).replace("{processes}", str(processes))
            words.append(f"--{name}" if value is True else f"--{name}={text}")
        return words

    @property
    def has_gpus(self) -> bool:
        """Whether jobs of this site can have GPUs."""
        flags = [*self.sbatch.items(), *(one for f in self.stages.values() for one in f.items())]
        return any(_is_about_gpus(name, value) for name, value in flags if value)

    def variables(self) -> dict[str, str]:
        """Return the variables of a job, `{user}` filled in and `~` expanded; `{job}` stays."""
        user = getpass.getuser()
        values = {name: value.replace("{user}", user) for name, value in self.env.items()}
        return {
            name: str(Path(value).expanduser()) if value.startswith("~") else value
            for name, value in values.items()
        }


def _is_about_gpus(name: str, value: object) -> bool:
    return "gpu" in name or "{gpus}" in str(value)


@dataclass(frozen=True)
class SiteProfile:
    """A profile and the file it was read from."""

    name: str
    values: Profile
    document: Document

    def error(self, key: str, what: str, *hints: str) -> RecipeError:
        """Return an error placed where a key was written."""
        return self.document.error(key, what, *hints)

    def enter(self) -> None:
        """Use the site's folders in this process; before the Hub's library is imported, which reads
        its variable once.
        """
        variables = self.values.variables()
        os.environ.update({name: variables[name] for name in _FOLDERS if name in variables})


def profile_names() -> list[str]:
    """Return the names of the profiles here."""
    return sorted(_shipped())


def _shipped() -> dict[str, Path]:
    """The profiles in launch/profiles/ by name; those of the working directory come first."""
    folders = (project_root() / "launch/profiles", Path("launch/profiles"))
    return {file.stem: file for folder in folders for file in folder.glob("*.yaml")}


def load_profile(name: str) -> SiteProfile:
    """Load and check a profile, given by its name in launch/profiles/ or as a path.

    Raises:
        RecipeError: there is no such profile; the message lists those that exist.
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else _shipped().get(name)
    if path is None:
        names = profile_names()
        raise RecipeError(
            f"there is no profile '{name}' in launch/profiles/",
            *did_you_mean(name, names),
            f"there are {', '.join(names) or 'none'}",
            "a new site: copy launch/profiles/example.yaml",
        )
    document = read(path)
    return SiteProfile(path.stem, parse(Profile, document, _rules), document)


def _rules(profile: Profile, document: Document) -> Iterator[RecipeError]:
    """Yield what pydantic cannot say; what a site really has only its Slurm knows."""
    for name in profile.stages:
        if name not in STAGES:
            yield document.error(("stages", name), f"no stage '{name}'", f"stages: {STAGES}")
    tables = {"sbatch": profile.sbatch, **{f"stages.{one}": f for one, f in profile.stages.items()}}
    for place, flags in tables.items():
        for name, value in flags.items():
            key = (*place.split("."), name)
            if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
                what = f"{place}: '{name}' is not the long name of a flag"
                yield document.error(key, what, "write it as sbatch does, without dashes: gres")
            elif name in _OURS:
                yield document.error(key, f"{place}.{name} is set by recipes launch", "remove it")
            elif "\n" in str(value):
                yield document.error(key, f"{place}.{name} holds a line break")
    for name in profile.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield document.error(("env", name), f"'{name}' is not a name of a variable")
    own = profile.stages.get("train", {}).get("time")
    limit = seconds_of(str(own if own is not None else profile.sbatch.get("time")))
    if limit is not None and profile.signal_lead_s * 2 > limit:
        key = ("sbatch", "time") if own is None else ("stages", "train", "time")
        what = (
            f"signal_lead_s ({profile.signal_lead_s}) is more than half of a training's {limit} s"
        )
        yield document.error(key, what, "lengthen the time or shorten signal_lead_s")


def seconds_of(time: str) -> int | None:
    """Return a time limit of Slurm in seconds; None for no limit (UNLIMITED), or where it is not
    written as Slurm's manual says, which sbatch itself refuses.

    Example:
        >>> seconds_of("1-12:00:00"), seconds_of("90"), seconds_of("01:30:00"), seconds_of("UNLIMITED")
        (129600, 5400, 5400, None)
    """  # noqa: E501
    match = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", time)
    if not match:
        return None
    parts = [int(part) for part in match[2].split(":")]
    if match[1] is None and len(parts) < 3:  # one or two numbers are minutes and seconds
        parts.insert(0, 0)
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(match[1] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def profile_schema() -> dict[str, object]:
    """Return the JSON Schema of a profile."""
    return Profile.model_json_schema()
