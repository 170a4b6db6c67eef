"""Reading YAML: the values of a file and of all that it extends, and where each was written.

Every YAML file of a project goes through two calls: `read` here, then `parse` in `parsing`. This
module does without pydantic, so that verbs that only list files start quickly.

YAML is read as YAML 1.2 reads it: `no`, `010` and `1:30` are text; `2e-5` is a number.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root, recipe_path, shown_path
from recipes_lib.core.terminal import holds_secret

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "command line"
SECTIONS = ("model", "quantization", "lora", "data", "train", "run", "launch")
_SHARED = ("model", "data")  # sections of other programs too
NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?\Z")
_INTEGER = re.compile(r"[-+]?(?:0|[1-9]\d*)\Z")
_MAX_DIGITS = 30  # more are text; no key takes such a number
_MAX_VALUES = 10_000  # with aliases expanded; a recipe has some hundred
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_YAML_1_1 = yaml.constructor.SafeConstructor()
_PLAIN_TAGS = ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value")
_WORDS: dict[str, bool | float | None] = {"": None, "~": None, "null": None}
_WORDS |= {"true": True, "false": False, ".nan": float("nan")}
_WORDS |= {".inf": float("inf"), "+.inf": float("inf"), "-.inf": -float("inf")}
_SECRET = "looks like a secret; a recipe must not hold one"
_SECRET_HINT = (
    "log in with 'hf auth login' or export the variable in the shell; if this was committed, revoke"
    " the token"
)


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file (or "command line") and a line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass
class Document:
    """The merged values of a file, what it extends and the command line.

    `origins` has the place of every key and list item, `replaced` the values that were overwritten,
    `problems` what is wrong with single keys and values as YAML (a duplicate key); `parse` reports
    them with everything else. Rules add to `warnings`.
    """

    path: Path
    values: Any = None
    text: str = ""
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    replaced: dict[KeyPath, Any] = field(default_factory=dict)
    problems: list[RecipeError] = field(default_factory=list)
    warnings: list[RecipeError] = field(default_factory=list)

    @property
    def file(self) -> str:
        """The path as a user would type it."""
        return shown_path(self.path)

    @property
    def kind(self) -> str:
        """The name of the file's kind."""
        return kind_of(self.values, self.text, self.file).name

    def origin(self, key: str | KeyPath) -> Origin:
        """Return the place of a key (`"lora.r"` or `("lora", "r")`), else of the nearest above."""
        path = tuple(key.split(".")) if isinstance(key, str) else key
        above = (path[:length] for length in range(len(path), 0, -1))
        return next((self.origins[key] for key in above if key in self.origins), Origin(self.file))

    def error(self, key: str | KeyPath, what: str, *hints: str) -> RecipeError:
        """Return an error at the place of a key."""
        origin = self.origin(key)
        return RecipeError(what, *hints, file=origin.file, line=origin.line)

    def warn(self, key: str | KeyPath, what: str, *hints: str) -> None:
        """Add a warning at the place of a key."""
        self.warnings.append(self.error(key, f"warning: {what}", *hints))

    def absolute(self, key: str | KeyPath, name: str, *, keep_missing: bool = False) -> str:
        """Return the absolute path of the file `name` that a key names: looked for beside the file
        that wrote the key, then in the working directory and the project.

        Args:
            key: the key.
            name: what it holds.
            keep_missing: whether a name that is nowhere stays as it is; else it is taken to be
                beside its file.
        """
        origin = self.origin(key).file
        beside = Path.cwd() if origin == COMMAND_LINE else Path(origin).parent
        places = [
            folder / Path(name).expanduser() for folder in (beside, Path.cwd(), project_root())
        ]
        place = next(filter(os.path.exists, places), None)
        if place is None and keep_missing:
            return name
        place = place or places[0]
        # links among the folders are followed, for the sake of `..`; the file keeps its name
        return str(place.parent.resolve() / place.name)


def read(path: str | Path, overrides: Sequence[str] = (), *, yaml_1_1: bool = False) -> Document:
    """Read a YAML file, what it extends and `section.key=value` words.

    Mappings merge key by key, lists and scalars replace, `null` sets null. Several parents are
    applied in the order given, each file once.

    Args:
        path: the file, or the short name of a shipped recipe.
        overrides: from the command line.
        yaml_1_1: read `no` as false, as the programs do that the file is really for.

    Raises:
        RecipeError: no such file, no YAML, a circle of `extends`, a malformed override.
    """
    path = recipe_path(path)
    document = Document(path)
    for part in [*_with_parents(path, (), set(), yaml_1_1), *map(_override, overrides)]:
        document.problems += part.problems
        document.text = part.text or document.text
        if isinstance(part.values, dict) and isinstance(document.values, dict):
            _merge(document, part, document.values, part.values, ())
        else:
            document.values, document.origins = part.values, part.origins
    return document


def _with_parents(
    path: Path, below: tuple[Path, ...], done: set[Path], yaml_1_1: bool
) -> list[Document]:
    """Return the files that `path` extends, then itself, each once."""
    part, real = _read_file(path, yaml_1_1), path.resolve()
    names = part.values.pop("extends", []) if isinstance(part.values, dict) else []
    parts: list[Document] = []
    for name in map(str, names if isinstance(names, list) else [names]):
        parent = path.parent / name if (path.parent / name).is_file() else recipe_path(name)
        if not parent.is_file():
            missing = no_such_file(path.parent / name)
            what = f"extends a file that does not exist: {missing.file}"
            raise part.error("extends", what, *missing.hints)
        circle = [*below, real]
        if parent.resolve() in circle:
            names_of = " -> ".join(step.name for step in (*circle, parent.resolve()))
            raise part.error("extends", f"extends goes in a circle: {names_of}")
        if parent.resolve() not in done:
            parts += _with_parents(parent, (*below, real), done, yaml_1_1)
    done.add(real)
    return [*parts, part]


def _merge(
    document: Document, part: Document, into: dict[str, Any], new: dict[str, Any], at: KeyPath
) -> None:
    """Write the values of `part` over those of `document`."""
    for key, value in new.items():
        path = (*at, key)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            if part.file != COMMAND_LINE:
                document.origins[path] = part.origins[path]
            _merge(document, part, into[key], value, path)
            continue
        if key in into and into[key] != value:
            document.replaced[path] = into[key]
        into[key] = value
        kept = {known: place for known, place in document.origins.items() if not _in(path, known)}
        fresh = {known: place for known, place in part.origins.items() if _in(path, known)}
        document.origins = kept | fresh


def _in(path: KeyPath, known: KeyPath) -> bool:
    return known[: len(path)] == path


# One file


def _read_file(path: Path, yaml_1_1: bool) -> Document:
    document = Document(path)
    document.text = _text_of(path, document.file)
    try:
        node = yaml.compose(document.text, Loader=_LOADER)
    except yaml.YAMLError as error:
        what, line = _refusal(error)
        raise RecipeError(what, file=document.file, line=line) from None
    if node is not None:
        document.values = _Builder(document, yaml_1_1).build(node, ())
    for number, row in enumerate(document.text.split("\n"), start=1):
        if holds_secret(row.partition("#")[2]):  # of values the builder says it
            what = f"this comment {_SECRET}"
            problem = RecipeError(what, _SECRET_HINT, file=document.file, line=number)
            document.problems.append(problem)
    return document


def _refusal(error: yaml.YAMLError) -> tuple[str, int | None]:
    """Return what PyYAML says about a text, and the line."""
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    mark, start = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
    if start:
        what += f" {getattr(error, 'context', '')} that begins on line {start.line + 1}"
    return f"YAML: {what}", mark.line + 1 if mark else None


def _text_of(path: Path, file: str) -> str:
    try:
        if path.exists() and not path.is_file():
            what = "is a folder" if path.is_dir() else "is a pipe or a device"
            raise RecipeError(f"{what}, not a YAML file", file=file)
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise no_such_file(path) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        what = f"is not UTF-8 text (byte 0x{error.object[error.start]:02x}); save it as UTF-8"
        raise RecipeError(what, file=file, line=line) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        what = (getattr(error, "strerror", None) or str(error)).lower()
        raise RecipeError(f"cannot be read: {what}", file=file) from None


def no_such_file(path: Path) -> RecipeError:
    """Return the error for a file that does not exist, with those of similar name."""
    if path.suffix:
        # the folder and the ending alone make two names similar
        near = [file for file in path.parent.glob("*") if did_you_mean(path.stem, [file.stem])]
        names = [shown_path(file) for file in near]
        return RecipeError("no such file", *did_you_mean(str(path), names), file=shown_path(path))
    folder = project_root() / "recipes"
    files = folder.rglob("[!_]*.yaml")
    names = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
    hints = [*did_you_mean(str(path), names), "all recipes: recipes ls"]
    return RecipeError("no such file or recipe", *hints, file=shown_path(path))


class _Builder:
    """Builds plain values from PyYAML's nodes; notes where each is and what is wrong."""

    def __init__(self, document: Document, yaml_1_1: bool = False) -> None:
        self.document = document
        self.file = document.file
        self.yaml_1_1 = yaml_1_1
        self.count = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """Return the value of a node."""
        self.count += 1
        if self.count > _MAX_VALUES:
            raise self.error(node, f"aliases expand to more than {_MAX_VALUES:,} values")
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN_TAGS:
            raise self.error(node, "tags are not allowed in recipes")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        items = []
        for index, item in enumerate(node.value):
            self.document.origins[*path, index] = self.place(item)
            items.append(self.build(item, (*path, index)))
        return items

    def mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        """Return a mapping; keys are text as written."""
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.document.problems.append(self.error(key_node, "a key must be plain text"))
                continue
            key, place = key_node.value, self.place(key_node)
            if key in values:
                lines = f"lines {self.document.origins[*path, key].line} and {place.line}"
                what = f"duplicate key '{dotted((*path, key))}': {lines}"
                self.document.problems.append(self.error(key_node, what))
            self.document.origins[*path, key] = place
            values[key] = self.build(value_node, (*path, key))
        return values

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        """Return a scalar as YAML 1.2 reads it."""
        text = node.value
        if "${" in text and "{%" not in text:
            what = f"{dotted(path)}: no interpolation in recipes: {text!r} would be taken literally"
            hint = "write the value itself; share values with 'extends'"
            self.document.problems.append(self.error(node, what, hint))
        if holds_secret(text):
            what = f"'{dotted(path)}' {_SECRET}"
            self.document.problems.append(self.error(node, what, _SECRET_HINT))
        if node.style:  # quoted
            return text
        if NUMBER.match(text) and len(text) <= _MAX_DIGITS:
            return int(text) if _INTEGER.match(text) else float(text)
        if self.yaml_1_1:
            return _YAML_1_1.construct_object(node)
        return _WORDS.get(text.lower(), text)

    def place(self, node: yaml.Node) -> Origin:
        """Return where a node is."""
        return Origin(self.file, None if self.file == COMMAND_LINE else node.start_mark.line + 1)

    def error(self, node: yaml.Node, what: str, *hints: str) -> RecipeError:
        """Return an error at a node."""
        place = self.place(node)
        return RecipeError(what, *hints, file=place.file, line=place.line)


def _override(word: str) -> Document:
    """Return the document that holds the one value of `section.key=value`."""
    name, separator, text = word.removeprefix("--").partition("=")
    keys = name.split(".")
    if not separator or not all(keys):
        raise RecipeError(f"'{word}' is not section.key=value", file=COMMAND_LINE)
    document = Document(Path(COMMAND_LINE))
    try:
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        what, _ = _refusal(error)
        raise RecipeError(f"{name}: {what}", file=COMMAND_LINE) from None
    value = None if node is None else _Builder(document).build(node, tuple(keys))
    for length in range(len(keys), 0, -1):
        document.origins[tuple(keys[:length])] = Origin(COMMAND_LINE)
        value = {keys[length - 1]: value}
    document.values = value
    return document


# Words


def dotted(path: KeyPath) -> str:
    """Return a key path as it is written on the command line."""
    return ".".join(map(str, path))


def value_text(value: Any) -> str:
    """Return a value as YAML on one line.

    Example:
        >>> value_text({"r": 8, "names": ["a", "no"]})
        "{r: 8, names: [a, 'no']}"
    """
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**9, sort_keys=False, allow_unicode=True
    )
    # no other white space is stripped: a value may begin or end with it
    return text.strip("\n").removesuffix("\n...")


def did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> list[str]:
    """Return the hint `did you mean X?` as a list of one line, or of none; hyphens, underscores and
    case do not count.

    Args:
        prefix: put before the name, for example `train.`.

    Example:
        >>> did_you_mean("learning-rte", ["learning_rate", "seed"], "train.")
        ['did you mean train.learning_rate?']
    """
    plain = {name.replace("-", "_").lower(): name for name in names}
    word = word.replace("-", "_").lower()
    near = difflib.get_close_matches(word, plain, 1, cutoff=0.65) if len(word) > 2 else []
    return [f"did you mean {prefix}{plain[name]}?" for name in near]


# Kinds of files


@dataclass(frozen=True)
class Kind:
    """One kind of YAML file: `keys` are top-level keys that give it away, `use` says what to do
    with it.
    """

    name: str
    title: str
    keys: tuple[str, ...] = ()
    use: str = ""


_NEW = "nothing here reads it; start a recipe: recipes new NAME --from quickstart/lora-r8"
_MIGRATE = "turn it into a recipe: recipes migrate IN.yaml --output OUT.yaml"
_BASE = Kind("base", "a base that recipes extend", (), "name it in a recipe's extends")
# The first that has a key of the file is its kind.
KINDS = (
    Kind("eval", "an eval recipe", ("suite", "generation"), "run it: recipes eval EVAL RUN"),
    Kind(
        "study",
        "a study",
        ("question", "factors", "arms", "seeds", "evals", "primary", "tune"),
        "run it: recipes study run STUDY",
    ),
    Kind("profile", "a site profile", ("sbatch", "stages", "setup", "srun", "max_requeues")),
    Kind("judge", "a judge", ("judge", "thresholds")),
    Kind("lm_eval_task", "a task of lm-eval", ("task", "output_type", "doc_to_text")),
    Kind("recipe", "a recipe", ("extends", *(key for key in SECTIONS if key not in _SHARED))),
    Kind("foreign", "an axolotl config", ("base_model", "sequence_len"), _NEW),
    Kind("foreign", "a LLaMA-Factory config", ("finetuning_type", "cutoff_len"), _NEW),
    Kind("foreign", "a DPO or GRPO config", ("beta", "num_generations", "reward_funcs"), _NEW),
    Kind("foreign", "an oumi config", ("peft",), _NEW),
    Kind("foreign", "a torchtune config", ("tokenizer", "optimizer", "checkpointer"), _NEW),
    Kind("recipe", "a recipe", _SHARED),
    _BASE,
    Kind("accelerate", "an accelerate config", ("compute_environment", "distributed_type")),
    Kind(
        "flat", "a flat TRL config", ("model_name_or_path", "dataset_name", "output_dir"), _MIGRATE
    ),
)
_SCHEMA_LINE = re.compile(
    r"^# *yaml-language-server: *\$schema=(?:.*/)?([\w-]+)\.schema\.json", re.M
)


def kind_by_keys(values: dict[str, Any]) -> Kind | None:
    """Return the kind that a file's top-level keys give away."""
    return next((known for known in KINDS if values.keys() & {*known.keys}), None)


def kind_of(values: Any, text: str, file: str) -> Kind:
    """Return the kind of a file: by its first comment, `# yaml-language-server:
    $schema=.../<kind>.schema.json`, else by its top-level keys; a recipe whose name starts with `_`
    is a base.

    Raises:
        RecipeError: the file is empty, holds no mapping, or is of no known kind.
    """
    if not isinstance(values, dict) or not values:
        what = "holds no mapping of keys" if values else "is empty"
        raise RecipeError(what, f"a recipe has {', '.join(SECTIONS)}", file=file)
    if named := _SCHEMA_LINE.search(text):
        what = f"schema '{named[1]}'"
        kind = next((known for known in KINDS if known.name == named[1]), None)
    else:
        what = f"its top-level keys are {', '.join(list(values)[:6])}"
        kind = kind_by_keys(values)
    if kind is None:
        hint = f"a recipe has {', '.join(SECTIONS)}"
        raise RecipeError(f"unknown kind of file: {what}", hint, file=file)
    return _BASE if kind.name == "recipe" and Path(file).name.startswith("_") else kind


def wrong_kind(kind: Kind, expected: str, file: str) -> RecipeError:
    """Return the error for a file of another kind than was asked for."""
    wanted = next(known.title for known in KINDS if known.name == expected)
    return RecipeError(f"is {kind.title}, not {wanted}", *filter(None, [kind.use]), file=file)
