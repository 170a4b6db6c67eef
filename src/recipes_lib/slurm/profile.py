"""A site profile, read and checked: every unknown, missing or impossible value in one line with its
place. Needs no torch.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.loader import Document
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.validation import KindRules, describe, dotted, load, shown
from recipes_lib.config.yaml_source import KeyPath
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root
from recipes_lib.planning.cards import CARDS, card_named
from recipes_lib.slurm.sections import STAGES, DirectoriesSection, EnvironmentSection, Profile

if TYPE_CHECKING:
    from jsonschema import ValidationError

_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+))?(?::(?P<seconds>\d+))?|(?P<plain>\d+(?::\d+){0,2}))\Z"
)
_WORD = re.compile(r"[^\s-]\S*\Z")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
# Flags of sbatch that the project sets itself; a second one would win or contradict.
_OURS = {
    "--parsable",
    "--test-only",
    "--wrap",
    "--array",
    "--dependency",
    "--kill-on-invalid-dep",
    "--output",
    "--error",
    "--open-mode",
    "--job-name",
    "--nodes",
    "--ntasks",
    "--ntasks-per-node",
    "--signal",
    "--requeue",
    "--no-requeue",
    "--chdir",
    "--hold",
    "--gpus-per-task",
    "--ntasks-per-gpu",
    "--ntasks-per-core",
    "--ntasks-per-socket",
}
_KEYS_FOR = {
    "--partition": "partition",
    "--time": "time",
    "--account": "account",
    "--qos": "qos",
    "--gres": "gres",
    "--gpus": "gres",
    "--gpus-per-node": "gres",
    "--cpus-per-task": "cpus_per_gpu",
    "--cpus-per-gpu": "cpus_per_gpu",
    "--mem": "memory_gib_per_gpu",
    "--mem-per-cpu": "memory_gib_per_gpu",
    "--mem-per-gpu": "memory_gib_per_gpu",
}
_SHORT_FLAGS = {
    "p": "--partition",
    "t": "--time",
    "A": "--account",
    "q": "--qos",
    "c": "--cpus-per-task",
    "G": "--gpus",
    "N": "--nodes",
    "n": "--ntasks",
    "o": "--output",
    "e": "--error",
    "a": "--array",
    "J": "--job-name",
    "d": "--dependency",
    "D": "--chdir",
    "H": "--hold",
}
# The placeholders a folder may hold: one that stayed as it is would become a folder of that name.
_PLACEHOLDERS = {"temporary": ("{user}", "{job}")}


@dataclass(frozen=True)
class SiteProfile:
    """A profile and the file it was read from."""

    name: str
    values: Profile
    document: Document

    def error(self, key: str, what: str, *hints: str) -> RecipeError:
        """Return an error placed where a dotted key was written."""
        return self.document.error(tuple(key.split(".")), what, *hints)

    def directory(self, key: str) -> str | None:
        """Return a folder of `directories`, `{user}` replaced and `~` expanded."""
        value = getattr(self.values.directories, key)
        return (
            None
            if value is None
            else str(Path(value.replace("{user}", getpass.getuser())).expanduser())
        )

    def enter(self) -> None:
        """Use the site's folders in this process; before the Hub's library is imported, which reads
        its variable once.
        """
        for key, variable in (
            ("runs", "RECIPES_RUNS_ROOT"),
            ("hub", "HF_HOME"),
            ("cache", "RECIPES_CACHE"),
        ):
            folder = self.directory(key)
            if folder:
                os.environ[variable] = folder


def profile_path(name: str) -> Path:
    """Return the file of a profile: a name in launch/profiles/, or a path.

    Raises:
        RecipeError: there is no such profile; the message lists those that exist.
    """
    given = Path(name)
    if given.suffix in (".yaml", ".yml"):
        return given
    path = next(
        (folder / f"{name}.yaml" for folder in _folders() if (folder / f"{name}.yaml").is_file()),
        None,
    )
    if path is None:
        names = profile_names()
        raise RecipeError(
            f"there is no profile '{name}' in launch/profiles/",
            *did_you_mean(name, names),
            f"there are {', '.join(names) or 'none'}; a new site: copy launch/profiles/example.yaml"
            " and fill in six values",
        )
    return (
        path
        if given.is_absolute() or not path.is_relative_to(Path.cwd())
        else path.relative_to(Path.cwd())
    )


def profile_names() -> list[str]:
    """Return the names of the profiles here."""
    return sorted({entry.stem for folder in _folders() for entry in folder.glob("*.yaml")})


def _folders() -> list[Path]:
    return list(
        dict.fromkeys(
            folder.resolve()
            for folder in (Path("launch/profiles"), project_root() / "launch/profiles")
        )
    )


def load_profile(name: str) -> SiteProfile:
    """Load and check a profile, given by its name in launch/profiles/ or as a path.

    Raises:
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    path = profile_path(name)
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
    match = _TIME.match(time)
    if not match:
        raise ValueError(time)
    if match["days"] is not None:
        return (
            int(match["days"]) * 86400
            + int(match["hours"]) * 3600
            + int(match["minutes"] or 0) * 60
            + int(match["seconds"] or 0)
        )
    parts = [int(part) for part in match["plain"].split(":")]
    hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return hours * 3600 + minutes * 60 + seconds


def time_of(seconds: int) -> str:
    """Return seconds as Slurm writes a time limit, rounded up to minutes.

    Example:
        >>> time_of(5401), time_of(129600)
        ('01:31:00', '1-12:00:00')
    """
    minutes = -(-seconds // 60)
    days, hours = divmod(minutes // 60, 24)
    return f"{f'{days}-' if days else ''}{hours:02d}:{minutes % 60:02d}:00"


class ProfileRules(KindRules):
    """Rules of site profiles; what a site really has only its Slurm knows (recipes launch
    --test-only).
    """

    def unknown(self, document: Document, path: KeyPath, known: list[str]) -> RecipeError:
        """Return the error for a key that does not exist here."""
        above = dotted(path[:-1])
        near = did_you_mean(str(path[-1]), known, f"{above}." if above else "")
        return document.error(
            path,
            f"unknown key '{dotted(path)}'",
            *near,
            f"keys of {above or 'a profile'}: {', '.join(known)}",
        )

    def missing(self, document: Document, path: KeyPath, schema: dict[str, Any]) -> RecipeError:
        """Return the error for a key that nobody wrote, with what it is."""
        help = schema["properties"][path[-1]]["description"]
        return document.error(
            path,
            f"{path[-1]} is missing: {help if help[1].isupper() else help[0].lower() + help[1:]}",
        )

    def wrong(self, document: Document, path: KeyPath, error: ValidationError) -> RecipeError:
        """Return the error for a value that the schema refuses."""
        hints = []
        if path[0] == "time" and isinstance(error.instance, int | float):
            hints.append('quote it: YAML reads a plain 24:00:00 as a number; write "24:00:00"')
        elif path[0] == "variables":
            hints.append(f'quote it: "{shown(error.instance)}"')
        elif path == ("environment",) and error.instance is None:
            hints.append("write environment: {} for the Python that submits")
        return document.error(
            path,
            f"{dotted(path)} must be {describe(error.schema)}, got {shown(error.instance)}",
            *hints,
        )

    def between_keys(self, document: Document) -> Iterator[RecipeError]:
        """Yield what a schema cannot say."""
        values = document.values
        gres = values["gres"]
        if gres is not None and "{gpus}" not in gres:
            yield document.error(
                ("gres",),
                f"gres must contain {{gpus}}, their number: got {gres}",
                "for example gpu:{gpus}",
            )
        for path, word in (
            (("gres",), gres if gres and "{gpus}" in gres else None),
            (("account",), values.get("account")),
            (("qos",), values.get("qos")),
            *_per_stage(values, "partition"),
        ):
            if word is not None and not _WORD.match(word):
                yield document.error(
                    path, f"{dotted(path)} must be one word that is no flag, got {shown(word)}"
                )
        for key in ("partition", "time"):
            for stage in STAGES if isinstance(values[key], dict) else ():
                if stage not in values[key]:
                    yield document.error(
                        (key,), f"{key}.{stage} is missing", "write null for the site's default"
                    )
        for path, time in _per_stage(values, "time"):
            if time is None:
                continue
            try:
                limit = seconds_of(time)
            except ValueError:
                yield document.error(
                    path,
                    f"{dotted(path)} is no time limit: {time}",
                    'for example "08:00:00" or "1-12:00:00"',
                )
                continue
            lead = values.get("signal_lead_s", Profile.signal_lead_s)
            if path[-1] in ("time", "train") and lead * 2 > limit:
                what = (
                    f"{dotted(path)} is {limit} s and signal_lead_s {lead} s: a training would be"
                    " asked to stop before it is halfway"
                )
                yield document.error(path, what, "lengthen the time or shorten signal_lead_s")
        environment = values["environment"]
        if environment.get("conda") and environment.get("venv"):
            yield document.error(
                ("environment", "venv"), "environment has both conda and venv; keep one"
            )
        try:
            card_named(values.get("gpu") or CARDS[0].name)
        except RecipeError as error:
            yield document.error(("gpu",), error.what.removeprefix("--"), *error.hints)
        for key, folder in values.get("directories", {}).items():
            known = _PLACEHOLDERS.get(key, ("{user}",))
            for word in sorted(set(re.findall(r"\{[^}]*\}", folder or "")) - set(known))[:1]:
                what = f"directories.{key}: {word} is not filled in"
                yield document.error(("directories", key), what, f"what is: {', '.join(known)}")
        for name in values.get("variables", {}):
            if not _VARIABLE.match(name):
                yield document.error(
                    ("variables", name), f"'{name}' is no name of an environment variable"
                )
        yield from _extra_flags(document, values.get("extra_sbatch", []))


def _extra_flags(document: Document, flags: list[str]) -> Iterator[RecipeError]:
    """Yield flags of extra_sbatch that are no flags, or that something else sets."""
    for index, word in enumerate(flags):
        path: KeyPath = ("extra_sbatch", index)
        flag = word.partition("=")[0]
        flag = _SHORT_FLAGS.get(flag[1:2], flag)
        if not word.startswith("-"):
            hint = "a flag with a value is one word: --constraint=h100"
            yield document.error(path, f"extra_sbatch: '{word}' is no flag of sbatch", hint)
        elif flag in _KEYS_FOR:
            yield document.error(
                path, f"extra_sbatch: {flag} has a key of its own: {_KEYS_FOR[flag]}"
            )
        elif flag in _OURS:
            yield document.error(
                path, f"extra_sbatch: {flag} is set by recipes launch", "remove it"
            )


def _per_stage(values: dict[str, Any], key: str) -> Iterator[tuple[KeyPath, str | None]]:
    """Yield the paths and values of a key that may be written per stage."""
    value = values[key]
    if isinstance(value, dict):
        yield from (((key, stage), value[stage]) for stage in STAGES if stage in value)
    else:
        yield (key,), value
