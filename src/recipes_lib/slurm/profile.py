"""A site profile (launch/profiles/*.yaml): what a Slurm site is like, and nothing of any recipe."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from recipes_lib.config.documents import Document, KeyPath, did_you_mean, dotted, read
from recipes_lib.config.parsing import Section, parse
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.project import project_root
from recipes_lib.jobs.jobs import Job, Stage
from recipes_lib.slurm.client import run_slurm
from recipes_lib.study.needs import Host

# Wherever the package lies: the shipped profiles are found by name.
NEW_PROFILE = "recipes new MY-SITE --from launch/profiles/example"
# The folder with the files of a launch, in that of its run.
SCHEDULER = "slurm"
Flag = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]+$")]
Flags = dict[Flag, str | int | bool | None]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
# What `recipes launch` decides itself, for each job.
_OURS = {
    "nodes", "ntasks", "ntasks-per-node", "array", "dependency", "output", "error", "job-name",
    "signal", "requeue", "no-requeue", "open-mode", "parsable", "wrap", "wait",
}  # fmt: skip
# Flags that say which nodes of a partition are wanted, or by which right: a stage with a partition
# of its own has only those that it names.
_OF_A_PARTITION = ("constraint", "nodelist", "exclude", "qos", "reservation")
# Variables that are those of this process too, while it launches.
_FOLDERS = ("RECIPES_RUNS_ROOT", "RECIPES_CACHE", "HF_HOME")


class Profile(Section):
    """One Slurm site."""

    kind: ClassVar[str] = "profile"
    _document: Document  # the file with the place of each value

    sbatch: Flags
    """sbatch flags for every job, under their long names (partition, account, gres, time, ...).
    `{gpus}` and `{processes}` are their numbers on a node; true is a flag without a value, null
    omits it. GPU flags are left out of jobs that need no GPU; a profile without GPU flags means a
    site without GPUs."""
    stages: dict[Stage, Flags] = {}
    """Flags for one stage (train, eval, report), which replace those of `sbatch`. A stage with its
    own partition takes no constraint, exclude, nodelist, qos and reservation from there."""
    srun: Flags = {}
    """Flags of srun for every step, under their long names (cpu-bind, mpi, container-image)."""
    setup: list[str] = []
    """Lines of bash that every job runs first (module load cuda); each must succeed."""
    prefix: list[str] = []
    """Words before every command, for a container: [apptainer, exec, --nv, image.sif]."""
    env: dict[Variable, str] = {}
    """Variables for every job. `~` and `$USER` are those of the login node, `{job}` is the job id.
    Login and compute nodes must both see RECIPES_RUNS_ROOT, RECIPES_CACHE and HF_HOME."""
    offline: bool = True
    """Compute nodes have no network (HF_HUB_OFFLINE=1): run `recipes prefetch` first."""
    vllm: str | None = None
    """The vllm program in its own environment; a job starts it as the judge that an evaluation
    expects at 127.0.0.1."""
    signal_lead_s: int = Field(300, ge=10)
    """Seconds before the time limit at which a training is asked to save: longer than a step, an
    evaluation batch and a save."""
    max_requeues: int = Field(20, ge=0)
    """How often a stopped job is requeued automatically."""
    max_concurrent_arms: int | None = Field(None, ge=1)
    """Arms of a study that train at the same time; null means no limit."""

    @property
    def scheduler(self) -> str:
        """Name of the folder with a launch's files in that of its run."""
        return SCHEDULER

    @property
    def python(self) -> tuple[str, ...]:
        """The container's or the environment's Python, else the one that submits."""
        if self.setup or self.prefix:
            return tuple(self.prefix) + ("python",)
        return (sys.executable,)

    @property
    def has_gpus(self) -> bool:
        """Whether there are flags that only a job with GPUs gets."""
        return self.flags("train", 1, 1) != self.flags("train", 0, 1)

    @property
    def largest_array(self) -> int | None:
        """How many tasks a job may have; None where Slurm cannot be asked."""
        try:
            configuration = run_slurm(["scontrol", "show", "config"]).stdout
        except EnvironmentFault:
            return None
        # the largest index is one less, and the first index is 0
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", configuration, re.M)
        return int(found[1]) if found else None

    @property
    def host(self) -> Host:
        """What a job of this site will see and have, as far as it is known here."""
        environment: dict[str, str] = {}
        if self.sbatch.get("export") != "NONE":
            environment.update(os.environ)
        environment.update(self.variables())
        set_there: set[str] = set()
        for line in self.setup:
            set_there.update(re.findall(r"\b([A-Za-z_]\w*)=", line))
        return Host(
            environment=environment,
            set_there=frozenset(set_there),
            is_here=False,
            own_python=not (self.setup or self.prefix),
            starts_judges=self.vllm is not None,
        )

    def error(self, what: str, *hints: str) -> RecipeError:
        """Return an error placed at the flags of sbatch."""
        return self._document.error("sbatch", what, *hints)

    def doubts(self, jobs: Sequence[Job]) -> Iterator[str]:
        """Yield a warning for flags that Slurm may accept and the user hardly means."""
        if self.has_gpus:
            for job in jobs:
                partition = self._all_flags(job.stage).get("partition")
                if job.stage != "report" and not job.uses_gpus and partition:
                    what = f"{job.label} asks for no GPU and goes to partition {partition}"
                    hint = f"if that is for GPU jobs, set stages.{job.stage}.partition"
                    yield f"warning: {what}: {hint}"

    def flags(self, stage: Stage, gpus: int, processes: int) -> list[str]:
        """Return the flags of sbatch for a job of a stage, with so many of each on a node."""
        return flag_words(self._all_flags(stage), gpus, processes)

    def _all_flags(self, stage: Stage) -> Flags:
        shared = dict(self.sbatch)
        own = self.stages.get(stage, {})
        if own.get("partition", shared.get("partition")) != shared.get("partition"):
            for name in _OF_A_PARTITION:
                shared.pop(name, None)
        return shared | own

    def variables(self) -> dict[str, str]:
        """Return the variables of a job; `{job}` stays."""
        variables: dict[str, str] = {}
        for name, value in self.env.items():
            text = os.path.expanduser(os.path.expandvars(value))  # noqa: PTH111 (also URLs)
            unset = re.search(r"\$(\w+|\{\w+\})", text)
            if unset:  # as $USER in a cron job: the job would take the text as it is
                what = f"env.{name}: the variable {unset[0]} is not set here"
                hint = "export it before the launch, or write its value"
                raise self._document.error(("env", name), what, hint)
            variables[name] = text
        return variables

    def enter(self) -> None:
        """Use the site's folders in this process, before the Hub's library reads its variable."""
        for name, value in self.variables().items():
            if name in _FOLDERS:
                os.environ[name] = value


def flag_words(flags: Flags, gpus: int, processes: int) -> list[str]:
    """Return flags as words; those about GPUs only where there are some."""
    words = []
    for name, value in flags.items():
        is_of_gpus = "gpu" in name or "{gpus}" in str(value)
        if value is None or value is False or (is_of_gpus and not gpus):
            continue
        if value is True:
            words.append(f"--{name}")
            continue
        text = str(value).replace("{gpus}", str(gpus)).replace("{processes}", str(processes))
        words.append(f"--{name}={text}")
    return words


def known_profiles() -> dict[str, Path]:
    """Return the profiles in launch/profiles/; those of the working directory come first."""
    profiles: dict[str, Path] = {}
    for folder in (project_root() / "launch/profiles", Path("launch/profiles")):
        profiles |= {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return profiles


def load_profile(name: str) -> Profile:
    """Load and check a profile, given by its name in launch/profiles/ or as a path."""
    profiles = known_profiles()
    path = profiles.get(name)
    if Path(name).suffix in (".yaml", ".yml"):
        path = Path(name)
    if path is None:
        what = f"there is no profile '{name}' in launch/profiles/"
        hint = f"there are {', '.join(profiles)}; for a new site: {NEW_PROFILE}"
        raise RecipeError(what, *did_you_mean(name, profiles), hint)
    document = read(path)
    profile = parse(Profile, document, _rules)
    profile._document = document
    return profile


def _rules(profile: Profile, document: Document) -> Iterator[RecipeError]:
    """Yield the flags that would break a chain; what a site really has only its Slurm knows."""
    tables: dict[KeyPath, Flags] = {("sbatch",): profile.sbatch}
    tables |= {("stages", stage): flags for stage, flags in profile.stages.items()}
    for section, flags in tables.items():
        for name in flags.keys() & _OURS:
            key = section + (name,)
            yield document.error(key, f"{dotted(key)} is set by recipes launch")
