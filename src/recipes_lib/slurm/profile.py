"""A site profile (launch/profiles/*.yaml): what a Slurm site is like, and nothing of any recipe.

Each field is a key of the file and each `help` its documentation; the JSON Schema and the checks
are generated from here. Needs no torch.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.loader import Document
from recipes_lib.config.schema import fields_of, file_schema
from recipes_lib.config.sections import key
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.validation import KindRules, describe, dotted, load, shown
from recipes_lib.config.yaml_source import KeyPath
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root
from recipes_lib.planning.cards import CARDS, card_named

if TYPE_CHECKING:
    from jsonschema import ValidationError

STAGES = ("train", "eval", "report")
_PER_STAGE = ("partition", "time")


@dataclass(frozen=True, kw_only=True)
class EnvironmentSection:
    """How a job finds Python and this project. Nothing set: the Python that submitted it."""

    modules: list[str] = key("Modules to load, in this order.", factory=list)
    conda: str | None = key("Conda environment to activate: its name or its folder.")
    venv: str | None = key("Virtual environment to activate: its folder.")
    container: list[str] = key(
        "Words put before every command, for example [apptainer, exec, --nv, image.sif].",
        factory=list,
    )
    srun: list[str] = key(
        "Words for srun, which starts every command of a job:"
        " [--container-image=/images/recipes.sqsh, --container-mounts=/scratch] for a container of"
        " pyxis and enroot.",
        factory=list,
    )
    setup: list[str] = key("Further lines of bash, run last.", factory=list)


@dataclass(frozen=True, kw_only=True)
class DirectoriesSection:
    """Where the site wants large files; `{user}` is the user's name. Absent: as in the shell that
    submits.
    """

    runs: str | None = key(
        "Folder of the runs (RECIPES_RUNS_ROOT); login and compute nodes must both see it."
    )
    cache: str | None = key("Folder of materialised models (RECIPES_CACHE).")
    hub: str | None = key("Folder of the Hub's cache (HF_HOME), which `recipes prefetch` fills.")
    temporary: str | None = key("Scratch of a job (TMPDIR); `{job}` is the job id.")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One site. The first six keys must be written; null is a value: the site's default, or for
    gres a cluster without GPUs.
    """

    partition: str | dict[str, str | None] | None = key(
        "Partition, or one per stage: {train: a, eval: b, report: c}.", MISSING
    )
    time: str | dict[str, str | None] | None = key(
        'Time limit, or one per stage, quoted: "08:00:00" or "1-12:00:00". A plan that is shorter'
        " wins for training.",
        MISSING,
    )
    gres: str | None = key(
        "What asks for GPUs, `{gpus}` their number per node: gpu:{gpus} or gpu:h100-47:{gpus}.",
        MISSING,
    )
    cpus_per_gpu: int = key(
        "CPU cores per GPU, or per process on a cluster without GPUs.", MISSING, minimum=1
    )
    memory_gib_per_gpu: int | None = key(
        "Host memory in GiB per GPU, or per process without GPUs.", MISSING, minimum=1
    )
    environment: EnvironmentSection = key(
        "How a job finds Python and this project; {} is the Python that submitted it.", MISSING
    )
    account: str | None = key("Account the jobs are charged to.")
    qos: str | None = key("Quality of service.")
    gpu: str | None = key(
        "Card for the estimate of the training time, a name of `recipes plan --gpu`."
    )
    vllm: str | None = key(
        "The vllm program, of an environment of its own. A job starts the judge with it that an"
        " evaluation expects at 127.0.0.1; null: no job does."
    )
    signal_lead_s: int = key(
        "Seconds before the time limit at which a training is asked to save: more than a step, an"
        " evaluation batch and a save.",
        300,
        minimum=10,
    )
    max_requeues: int = key(
        "How often a job that was stopped is queued again by itself.", 20, minimum=0
    )
    max_concurrent_arms: int | None = key(
        "Arms of a study that train at the same time; null is no limit.", minimum=1
    )
    offline: bool = key(
        "Compute nodes have no network: jobs use what `recipes prefetch` fetched"
        " (HF_HUB_OFFLINE=1).",
        True,
    )
    variables: dict[str, str] = key(
        "Environment variables of every job, NCCL's for example.", factory=dict
    )
    directories: DirectoriesSection = key(
        "Where the site wants large files.", factory=DirectoriesSection
    )
    extra_sbatch: list[str] = key(
        "Further flags of sbatch, one word each: [--constraint=h100, --exclusive].", factory=list
    )

    def of_stage(self, key: str, stage: str) -> str | None:
        """Return the value of a key for a stage; `partition` and `time` may have one for each."""
        value = getattr(self, key)
        return value.get(stage) if key in _PER_STAGE and isinstance(value, dict) else value


def profile_schema() -> JsonSchema:
    """Return the JSON Schema of a profile."""
    properties = fields_of(Profile)
    value: JsonSchema = {"type": ["string", "null"]}
    for name in _PER_STAGE:
        stages: JsonSchema = {"type": "object", "additionalProperties": False}
        properties[name] = {
            "description": properties[name]["description"],
            "anyOf": [value, {**stages, "properties": dict.fromkeys(STAGES, value)}],
        }
    required = [
        field.name for field in fields(Profile) if field.default is field.default_factory is MISSING
    ]
    return file_schema("profile", "A site profile", required=required, properties=properties)


@dataclass(frozen=True)
class SiteProfile:
    """A profile and the file it was read from."""

    name: str
    values: Profile
    document: Document

    def error(self, key: str, what: str, *hints: str) -> RecipeError:
        """Return an error placed where a key was written."""
        return self.document.error((key,), what, *hints)

    def directory(self, key: str) -> str | None:
        """Return a folder of `directories`, `{user}` replaced and `~` expanded."""
        value = getattr(self.values.directories, key)
        return value and str(Path(value.replace("{user}", getpass.getuser())).expanduser())

    def enter(self) -> None:
        """Use the site's folders in this process; before the Hub's library is imported, which reads
        its variable once.
        """
        variables = {"runs": "RECIPES_RUNS_ROOT", "hub": "HF_HOME", "cache": "RECIPES_CACHE"}
        for name, variable in variables.items():
            if folder := self.directory(name):
                os.environ[variable] = folder


def _shipped() -> dict[str, Path]:
    """The profiles in launch/profiles/ by name; those of the working directory come first."""
    folders = (project_root() / "launch/profiles", Path("launch/profiles"))
    return {file.stem: file for folder in folders for file in folder.glob("*.yaml")}


def profile_names() -> list[str]:
    """Return the names of the profiles here."""
    return sorted(_shipped())


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
            f"there are {', '.join(names) or 'none'}; a new site: copy launch/profiles/example.yaml"
            " and fill in six values",
        )
    document = load(path, "profile")
    values = dict(document.values)
    values["environment"] = EnvironmentSection(**values["environment"])
    values["directories"] = DirectoriesSection(**values.get("directories", {}))
    return SiteProfile(path.stem, Profile(**values), document)


def seconds_of(time: str) -> int:
    """Return a Slurm time limit in seconds.

    Raises:
        ValueError: it is not one.

    Example:
        >>> seconds_of("1-12:00:00"), seconds_of("90"), seconds_of("01:30:00")
        (129600, 5400, 5400)
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", time)
    if not match:
        raise ValueError(time)
    parts = [int(part) for part in match[2].split(":")]
    if match[1] is None and len(parts) < 3:  # one or two numbers are minutes and seconds
        parts.insert(0, 0)
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(match[1] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def time_of(seconds: int) -> str:
    """Return seconds as Slurm writes a time limit, rounded up to minutes.

    Example:
        >>> time_of(5401), time_of(129600)
        ('01:31:00', '1-12:00:00')
    """
    minutes = -(-seconds // 60)
    days, hours = divmod(minutes // 60, 24)
    return f"{f'{days}-' if days else ''}{hours:02d}:{minutes % 60:02d}:00"


# The keys of a profile that stand for flags of sbatch, as `short:long`; a second flag would win or
# contradict. Empty: recipes launch sets them itself.
_FLAGS_OF = {
    "partition": "p:partition",
    "time": "t:time",
    "account": "A:account",
    "qos": "q:qos",
    "gres": "gres G:gpus gpus-per-node",
    "cpus_per_gpu": "c:cpus-per-task cpus-per-gpu",
    "memory_gib_per_gpu": "mem mem-per-cpu mem-per-gpu",
    "": "N:nodes n:ntasks o:output e:error a:array J:job-name d:dependency D:chdir H:hold parsable"
    " test-only wrap kill-on-invalid-dep open-mode ntasks-per-node ntasks-per-gpu ntasks-per-core"
    " ntasks-per-socket gpus-per-task signal requeue no-requeue",
}
_FLAGS = [
    (key, *word.rpartition(":")[::2]) for key, words in _FLAGS_OF.items() for word in words.split()
]


class ProfileRules(KindRules):
    """Rules of site profiles; what a site really has only its Slurm knows (recipes launch
    --test-only).
    """

    def unknown(self, document: Document, path: KeyPath, known: list[str]) -> RecipeError:
        """Return the error for a key that does not exist here."""
        above = dotted(path[:-1])
        return document.error(
            path,
            f"unknown key '{dotted(path)}'",
            *did_you_mean(str(path[-1]), known, f"{above}." if above else ""),
            f"keys of {above or 'a profile'}: {', '.join(known)}",
        )

    def missing(self, document: Document, path: KeyPath, schema: JsonSchema) -> RecipeError:
        """Return the error for a key that nobody wrote, with what it is."""
        help = schema["properties"][str(path[-1])]["description"]
        first = help[0] if help[1].isupper() else help[0].lower()
        return document.error(path, f"{path[-1]} is missing: {first}{help[1:]}")

    def wrong(self, document: Document, path: KeyPath, error: ValidationError) -> RecipeError:
        """Return the error for a value that the schema refuses."""
        hints = []
        if path[0] == "time" and isinstance(error.instance, int | float):
            hints.append('quote it: YAML reads a plain 24:00:00 as a number; write "24:00:00"')
        elif path[0] == "variables":
            hints.append(f'quote it: "{shown(error.instance)}"')
        elif path == ("environment",) and error.instance is None:
            hints.append("write environment: {} for the Python that submits")
        what = f"{dotted(path)} must be {describe(error.schema)}, got {shown(error.instance)}"
        return document.error(path, what, *hints)

    def between_keys(self, document: Document) -> Iterator[RecipeError]:
        """Yield what a schema cannot say."""
        values, error = document.values, document.error
        gres = values["gres"]
        if gres is not None and "{gpus}" not in gres:
            what = f"gres must contain {{gpus}}, their number: got {gres}"
            yield error(("gres",), what, "for example gpu:{gpus}")
            gres = None
        words = [(("gres",), gres), *(((name,), values.get(name)) for name in ("account", "qos"))]
        for path, word in [*words, *_written(values, "partition")]:
            if word is not None and not re.fullmatch(r"[^\s-]\S*", word):
                what = f"{dotted(path)} must be one word that is no flag, got {shown(word)}"
                yield error(path, what)
        for name in _PER_STAGE:
            for stage in STAGES if isinstance(values[name], dict) else ():
                if stage not in values[name]:
                    hint = "write null for the site's default"
                    yield error((name,), f"{name}.{stage} is missing", hint)
        lead = values.get("signal_lead_s", Profile.signal_lead_s)
        for path, time in _written(values, "time"):
            try:
                limit = seconds_of(time) if time is not None else None
            except ValueError:
                hint = 'for example "08:00:00" or "1-12:00:00"'
                yield error(path, f"{dotted(path)} is no time limit: {time}", hint)
                continue
            if limit is not None and path[-1] in ("time", "train") and lead * 2 > limit:
                what = (
                    f"{dotted(path)} is {limit} s and signal_lead_s {lead} s: a training would be"
                    " asked to stop before it is halfway"
                )
                yield error(path, what, "lengthen the time or shorten signal_lead_s")
        environment = values["environment"]
        if environment.get("conda") and environment.get("venv"):
            what = "environment has both conda and venv; keep one"
            yield error(("environment", "venv"), what)
        try:
            card_named(values.get("gpu") or CARDS[0].name)
        except RecipeError as unknown:
            yield error(("gpu",), unknown.what.removeprefix("--"), *unknown.hints)
        for name, folder in values.get("directories", {}).items():
            known = ["{user}", *(["{job}"] if name == "temporary" else [])]
            strange = sorted(set(re.findall(r"\{[^}]*\}", folder or "")) - set(known))
            if strange:
                what = f"directories.{name}: {strange[0]} is not filled in"
                yield error(("directories", name), what, f"what is: {', '.join(known)}")
        for name in values.get("variables", {}):
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                what = f"'{name}' is no name of an environment variable"
                yield error(("variables", name), what)
        for index, word in enumerate(values.get("extra_sbatch", [])):
            if problem := _flag_problem(word):
                yield error(("extra_sbatch", index), *problem)


def _written(values: dict[str, Any], key: str) -> Iterator[tuple[KeyPath, str | None]]:
    """Yield the paths and values of a key that may be written per stage."""
    value = values[key]
    if isinstance(value, dict):
        yield from (((key, stage), value[stage]) for stage in STAGES if stage in value)
    else:
        yield (key,), value


def _flag_problem(word: str) -> list[str]:
    """Return why a word of extra_sbatch cannot be taken, and what to do: it is no flag, or
    something else sets it.
    """
    if not word.startswith("-"):
        hint = "a flag with a value is one word: --constraint=h100"
        return [f"extra_sbatch: '{word}' is no flag of sbatch", hint]
    for name, short, long in _FLAGS:
        if word.partition("=")[0] == f"--{long}" or (short and word[1:2] == short):
            if name:
                return [f"extra_sbatch: --{long} has a key of its own: {name}"]
            return [f"extra_sbatch: --{long} is set by recipes launch", "remove it"]
    return []
