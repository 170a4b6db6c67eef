"""A site profile (launch/profiles/*.yaml): what a Slurm site is like, and nothing of any recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes_lib.config.documents import Document, KeyPath, did_you_mean, dotted, read
from recipes_lib.config.parsing import Section, parse
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root
from recipes_lib.study.needs import Site

STAGES = ("train", "eval", "report")
# Wherever the package lies: the shipped profiles are found by name.
NEW_PROFILE = "recipes new MY-SITE --from launch/profiles/example"
Flag = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]+$")]
Flags = dict[Flag, str | int | bool | None]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
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
    _document: Document | None = None

    sbatch: Flags
    """sbatch flags for every job, under their long names (partition, account, gres, time, ...).
    `{gpus}` and `{processes}` are their numbers on a node; true is a flag without a value, null
    omits it. GPU flags are left out of jobs that need no GPU; a profile without GPU flags means a
    site without GPUs."""
    stages: dict[Literal["train", "eval", "report"], Flags] = {}
    """Flags for one stage (train, eval, report), which replace those of `sbatch`."""
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

    def flags(self, stage: str, gpus: int, processes: int) -> list[str]:
        """Return the flags of sbatch for a job of a stage, with so many of each on a node."""
        words = []
        for name, value in {**self.sbatch, **self.stage_flags(stage)}.items():
            if value is None or value is False or (not gpus and _is_about_gpus(name, value)):
                continue
            text = str(value).replace("{gpus}", str(gpus)).replace("{processes}", str(processes))
            words.append(f"--{name}" if value is True else f"--{name}={text}")
        return words

    def stage_flags(self, stage: str) -> Flags:
        """Return the flags that replace those of `sbatch` in a stage."""
        by_stage = {str(name): flags for name, flags in self.stages.items()}
        return by_stage.get(stage, {})

    def flag(self, stage: str, name: str) -> str | int | bool | None:
        """Return one flag's value in a stage."""
        return {**self.sbatch, **self.stage_flags(stage)}.get(name)

    def variables(self) -> dict[str, str]:
        """Return the variables of a job; `{job}` stays. One that names a variable which is not set
        here, say $USER in a cron job, is an error: the job would take the text as it is.
        """
        variables: dict[str, str] = {}
        for name, value in self.env.items():
            text = os.path.expanduser(os.path.expandvars(value))  # noqa: PTH111 (also URLs)
            if unset := re.search(r"\$(\w+|\{\w+\})", text):
                what = f"env.{name}: the variable {unset[0]} is not set here"
                hint = "export it before the launch, or write its value"
                raise self.document.error(("env", name), what, hint)
            variables[name] = text
        return variables

    def site(self) -> Site:
        """Return what a job of this site will see and have, as far as it is known here."""
        environment = {} if self.sbatch.get("export") == "NONE" else dict(os.environ)
        set_there: set[str] = set()
        for line in self.setup:
            set_there.update(re.findall(r"\b([A-Za-z_]\w*)=", line))
        return Site(
            environment={**environment, **self.variables()},
            set_there=frozenset(set_there),
            is_here=False,
            own_python=not (self.setup or self.prefix),
            starts_judges=self.vllm is not None,
        )

    def enter(self) -> None:
        """Use the site's folders in this process, before the Hub's library reads its variable."""
        variables = self.variables()
        os.environ.update({name: variables[name] for name in _FOLDERS if name in variables})

    @property
    def document(self) -> Document:
        """The file with the place of each value."""
        assert self._document is not None
        return self._document

    def error(self, what: str, *hints: str) -> RecipeError:
        """Return an error placed at the flags of sbatch."""
        return self.document.error("sbatch", what, *hints)


def _is_about_gpus(name: str, value: object) -> bool:
    return "gpu" in name or "{gpus}" in str(value)


def known_profiles() -> dict[str, Path]:
    """Return the profiles in launch/profiles/; those of the working directory come first."""
    folders = (project_root() / "launch/profiles", Path("launch/profiles"))
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def load_profile(name: str) -> Profile:
    """Load and check a profile, given by its name in launch/profiles/ or as a path."""
    known = known_profiles()
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else known.get(name)
    if path is None:
        raise RecipeError(
            f"there is no profile '{name}' in launch/profiles/",
            *did_you_mean(name, known),
            f"there are {', '.join(known)}; for a new site: {NEW_PROFILE}",
        )
    document = read(path)
    profile = parse(Profile, document, _rules)
    profile._document = document
    return profile


def _rules(profile: Profile, document: Document) -> Iterator[RecipeError]:
    """Yield the flags that would break a chain; what a site really has only its Slurm knows."""
    tables: dict[KeyPath, Flags] = {("sbatch",): profile.sbatch}
    tables |= {("stages", stage): flags for stage, flags in profile.stages.items()}
    for place, flags in tables.items():
        for name in flags.keys() & {*_OURS}:
            what = f"{dotted((*place, name))} is set by recipes launch"
            yield document.error((*place, name), what)
