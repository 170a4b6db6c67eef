"""Every YAML file of a project goes through two calls: `read`, then `parse`.

`read(path, overrides)` returns a `Document`: the values of the file and of all that it extends, and
the file and line of each. `parse(Model, document)` returns the file as a pydantic model, or raises
everything that is wrong with it at once, each error at its file and line. What a key means is the
model's business; a file's kind is `kinds`'.

YAML is read as YAML 1.2 reads it: `no`, `010` and `1:30` are text; `2e-5` is a number.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from recipes_lib.config.kinds import kind_of, wrong_kind
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.core.project import project_root, recipe_path, shown_path
from recipes_lib.core.terminal import holds_secret

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "command line"
_MAX_BYTES = 1_000_000
_MAX_VALUES = 10_000  # with aliases expanded; a recipe has some hundred
_MAX_CHOICES = 16
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_YAML_1_1 = yaml.constructor.SafeConstructor()
_TAGS = ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value")
_WORDS: dict[str, bool | float | None] = {"": None, "~": None, "null": None}
_WORDS |= {"true": True, "false": False}
_WORDS |= {".inf": float("inf"), "+.inf": float("inf"), "-.inf": -float("inf")}
_WORDS |= {".nan": float("nan")}
_INTEGER = re.compile(r"[-+]?(?:0|[1-9]\d*)\Z")
_NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?\Z")
# pydantic's words -> those of people who write YAML
_PLAIN_WORDS = (
    ("a valid integer", "a whole number"),
    ("a valid number", "a number"),
    ("a valid boolean", "true or false"),
    ("a valid string", "text"),
    ("a valid list", "a list"),
    ("a valid dictionary.*", "a mapping"),
    ("List should have at least 1 item.*", "a list that is not empty"),
    ("String should match pattern", "text like"),
    ("greater than or equal to", ">="),
    ("less than or equal to", "<="),
    ("greater than", ">"),
    ("less than", "<"),
)
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

    @classmethod
    def of(cls, text: str) -> Origin:
        """Return the origin that `str` wrote."""
        file, _, line = text.rpartition(":")
        return cls(file, int(line)) if file and line.isdigit() else cls(text)


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
        """The kind of file, as in `kinds`."""
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
        found = next(filter(os.path.exists, places), None)
        if found is None and keep_missing:
            return name
        place = found or places[0]
        normal = Path(os.path.abspath(place))  # noqa: PTH100 (resolve would follow links)
        same = normal.exists() and normal.samefile(place)  # a/link/.. need not be a
        return str(normal if same or found is None else place.absolute())


@dataclass(frozen=True)
class IsPath:
    """Marks a field as a path that `parse` makes absolute: `file: FilePath | None = None`.

    Args:
        unless: says of a text that it need not be a path (a Hub id): it is one if there is a file
            of that name.
    """

    unless: Callable[[str], bool] = lambda name: False


FilePath = Annotated[str, IsPath()]


class Section(BaseModel):
    """A mapping in a YAML file: field = key, its description = the key's help.

    Unknown keys are refused, true is no number and "16" is not 16. `gone` says of keys that do not
    exist what to write instead.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
    gone: ClassVar[Mapping[str, str]] = {}
    kind: ClassVar[str] = ""  # of a whole file: its name in `kinds`


class QuickSection(Section):
    """A section whose keys have their text in `Field(description=...)`: reading docstrings under
    fields takes 10 ms a class, and every verb loads these.
    """

    model_config = ConfigDict(use_attribute_docstrings=False)


M = TypeVar("M", bound=BaseModel)
Rule = Callable[[M, Document], Iterable[RecipeError]]


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
    for part in [*_with_parents(path, (), {}, yaml_1_1), *map(_override, overrides)]:
        if isinstance(part.values, dict):
            part.values.pop("extends", None)
            if document.values is None:
                document.values = {}
            _merge(document, part, document.values, part.values, ())
        else:
            document.values = part.values
        document.problems += part.problems
        document.text = part.text or document.text
    return document


def parse(model: type[M], document: Document, *rules: Rule[M]) -> M:
    """Return a document as `model`.

    Args:
        model: the kind of file; its `FilePath` fields become absolute.
        rules: what must hold between keys; each yields errors, or adds warnings to the document.

    Raises:
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    if expected := getattr(model, "kind", ""):
        found = kind_of(document.values, document.text, document.file)
        if found.name != expected:
            raise wrong_kind(found, expected, document.file)
    value, errors = judge(model, document, *rules)
    if value is None or errors:
        raise RecipeErrors(errors)
    return value


def judge(
    model: type[M], document: Document, *rules: Rule[M], partial: bool = False
) -> tuple[M | None, list[RecipeError]]:
    """Return a document as `model`, and everything that is wrong with it; `parse` without raising.

    Values that the model refuses are left out for the rules, which judge the rest.

    Args:
        model: as for `parse`.
        document: as for `parse`.
        rules: as for `parse`.
        partial: whether required keys may be missing, as in a base that recipes extend.
    """
    if not isinstance(document.values, dict) or not document.values:
        what = "is empty" if not document.values else "holds no mapping of keys"
        return None, [RecipeError(what, file=document.file)]
    errors = [*document.problems, *_secrets(document)]
    _make_paths_absolute(model, document, document.values, ())
    found = list(_wrong(model, document))
    errors += [error for _, kind, error in found if not (partial and kind == "missing")]
    value = _valid(model, _without(document.values, [path for path, _, _ in found]))
    if value is not None:
        blamed = {(error.file, error.line) for error in errors}
        more = [error for rule in rules for error in rule(value, document)]
        errors += [error for error in more if (error.file, error.line) not in blamed]
    return value, errors


def dotted(path: KeyPath) -> str:
    """Return a key path as it is written on the command line."""
    return ".".join(map(str, path))


def shown(value: Any) -> str:
    """Return a value as a short piece of YAML."""
    if value is None or isinstance(value, bool | float):
        return yaml.safe_dump(value).split("\n")[0]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------- reading


def _with_parents(
    path: Path, stack: tuple[Path, ...], done: dict[Path, Document], yaml_1_1: bool
) -> list[Document]:
    """Return the files that `path` extends, then itself, each once."""
    part, here = _read_file(path, yaml_1_1), Path(os.path.realpath(path))
    parents = part.values.get("extends", []) if isinstance(part.values, dict) else []
    stack, before = (*stack, here), []
    for index, name in enumerate(parents if isinstance(parents, list) else [parents]):
        at = ("extends", index) if isinstance(parents, list) else ("extends",)
        if not isinstance(name, str) or not name or "\0" in name:
            raise part.error(at, "extends must be a file name or a list of file names")
        parent = path.parent / name
        parent = parent if parent.is_file() else recipe_path(name)
        if not parent.is_file():
            what = f"extends a file that does not exist: {shown_path(path.parent / name)}"
            raise part.error(at, what, *no_such_file(path.parent / name).hints)
        if (real := Path(os.path.realpath(parent))) in stack:
            circle = " -> ".join(step.name for step in (*stack[stack.index(real) :], real))
            raise part.error(at, f"extends goes in a circle: {circle}")
        if real not in done:
            before += _with_parents(parent, stack, done, yaml_1_1)
    done[here] = part
    return [*before, part]


def _read_file(path: Path, yaml_1_1: bool) -> Document:
    document = Document(path)
    document.text = _text_of(path, document.file)
    try:
        nodes = _compose(document.text)
    except yaml.YAMLError as error:
        marks = [getattr(error, name, None) for name in ("problem_mark", "context_mark")]
        if any(word in str(getattr(error, "context", "")) for word in ("quoted scalar", "flow")):
            marks.reverse()  # where it was opened, not where the file ended
        mark = marks[0] or marks[1]
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        context = f" {getattr(error, 'context', None) or ''}".rstrip()
        line = mark.line + 1 if mark else None
        raise RecipeError(f"YAML: {what}{context}", file=document.file, line=line) from None
    except RecursionError:
        raise RecipeError("YAML is nested too deeply", file=document.file) from None
    builder = _Builder(document, yaml_1_1)
    document.values = builder.build(nodes, ()) if nodes is not None else None
    return document


@lru_cache(maxsize=256)
def _compose(text: str) -> yaml.Node | None:
    return yaml.compose(text, Loader=_LOADER)


def _text_of(path: Path, file: str) -> str:
    try:
        if path.exists() and not path.is_file():
            what = "is a folder" if path.is_dir() else "is a pipe or a device"
            raise RecipeError(f"{what}, not a YAML file", file=file)
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError("is larger than 1 MB: not a recipe", file=file)
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise no_such_file(path) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        what = f"is not UTF-8 text (byte 0x{error.object[error.start]:02x}); save it as UTF-8"
        raise RecipeError(what, file=file, line=line) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        what = (getattr(error, "strerror", None) or str(error)).lower()
        raise RecipeError(f"cannot be read: {what}", file=file) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise RecipeError("contains NUL bytes: not a text file", file=file, line=line)
    return text


def no_such_file(path: Path) -> RecipeError:
    """Return the error for a file that does not exist, with those of similar name."""
    file = shown_path(path)
    if path.suffix == "":
        folder = project_root() / "recipes"
        names = [
            recipe.relative_to(folder).with_suffix("").as_posix()
            for recipe in (*folder.glob("[!_]*.yaml"), *folder.glob("*/[!_]*.yaml"))
        ]
        ending = sorted(name for name in names if name.endswith(f"/{path}"))
        near = [f"did you mean {' or '.join(ending)}?"] if ending else did_you_mean(file, names)
        return RecipeError("no such file or recipe", *near, "all recipes: recipes ls", file=file)
    if not path.parent.is_dir():
        hint = f"the folder {path.parent} does not exist"
        return RecipeError("no such file", hint, file=file)
    names = [entry.name for entry in path.parent.iterdir()]
    prefix = "" if path.parent == Path() else f"{shown_path(path.parent)}/"
    return RecipeError("no such file", *did_you_mean(path.name, names, prefix), file=file)


class _Builder:
    """Builds plain values from PyYAML's nodes; notes where each stands and what is wrong."""

    def __init__(self, document: Document, yaml_1_1: bool = False) -> None:
        self.document = document
        self.yaml_1_1 = yaml_1_1
        self.count = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """Return the value of a node."""
        self.count += 1
        if self.count > _MAX_VALUES:
            what = f"aliases expand to more than {_MAX_VALUES:,} values"
            raise self.error(node, what)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in _TAGS:
            raise self.error(node, "tags are not allowed in recipes")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.place(item, (*path, index))
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        return self.mapping(node, path)

    def mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        """Return a mapping; keys are text as written."""
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.document.problems.append(self.error(key_node, "a key must be plain text"))
                continue
            key = key_node.value
            if key in values:
                lines = f"lines {self.document.origins[*path, key].line} and {_line(key_node)}"
                what = f"duplicate key '{dotted((*path, key))}': {lines}"
                self.document.problems.append(self.error(key_node, what))
            if key == "<<":
                what = "merge keys (<<) are not allowed; use 'extends' to share values"
                self.document.problems.append(self.error(key_node, what))
                continue
            self.place(key_node, (*path, key))
            values[key] = self.build(value_node, (*path, key))
        return values

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        """Return a scalar as YAML 1.2 reads it."""
        text = node.value
        if "${" in text and "{%" not in text:
            what = f"{dotted(path)}: no interpolation in recipes: {text!r} would be taken literally"
            hint = "write the value itself; share values with 'extends'"
            self.document.problems.append(self.error(node, what, hint))
        if node.style:  # quoted
            return text
        if _NUMBER.match(text) and len(text) > 30:
            what = f"{dotted(path)}: {text[:20]}... is not a number that fits in 64 bits"
            raise self.error(node, what)
        if self.yaml_1_1 and not _NUMBER.match(text):
            return _YAML_1_1.construct_object(node)
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        if _INTEGER.match(text):
            return int(text)
        return float(text) if _NUMBER.match(text) else text

    def place(self, node: yaml.Node, path: KeyPath) -> None:
        """Note where a key or a list item stands."""
        on_command_line = self.document.file == COMMAND_LINE
        line = None if on_command_line else _line(node)
        self.document.origins[path] = Origin(self.document.file, line)

    def error(self, node: yaml.Node, what: str, *hints: str) -> RecipeError:
        """Return an error at a node."""
        line = None if self.document.file == COMMAND_LINE else _line(node)
        return RecipeError(what, *hints, file=self.document.file, line=line)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _override(word: str) -> Document:
    """Return the document that holds the one value of `section.key=value`."""
    name, separator, text = word.removeprefix("--").partition("=")
    keys = name.split(".")
    if not separator or not all(keys):
        raise RecipeError(f"'{word}' is not section.key=value", file=COMMAND_LINE)
    document = Document(Path(COMMAND_LINE))
    try:
        nodes = _compose(text)
    except yaml.YAMLError as error:
        what = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{name}: YAML: {what}", file=COMMAND_LINE) from None
    value = _Builder(document).build(nodes, tuple(keys)) if nodes is not None else None
    for length in range(len(keys), 0, -1):
        document.origins[tuple(keys[:length])] = Origin(COMMAND_LINE)
        value = {keys[length - 1]: value}
    document.values = value
    return document


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
        for stale in [known for known in document.origins if known[: len(path)] == path]:
            del document.origins[stale]
        if key in into and into[key] != value:
            document.replaced[path] = into[key]
        into[key] = value
        document.origins |= {
            known: origin for known, origin in part.origins.items() if known[: len(path)] == path
        }


# ---------------------------------------------------------------- judging


def _valid(model: type[M], values: Any) -> M | None:
    try:
        return model.model_validate(values)
    except ValidationError:
        return None


def _wrong(model: type[M], document: Document) -> Iterator[tuple[KeyPath, str, RecipeError]]:
    """Yield what the model refuses: the key, the kind of error, and the error at its place.

    A union is refused once per alternative: where an alternative has something against a part of
    the value, what the others say about the whole is left out.
    """
    try:
        model.model_validate(document.values)
        return
    except ValidationError as refused:
        found: dict[KeyPath, list[Any]] = {}
        for detail in refused.errors(include_url=False):
            found.setdefault(_key_path(detail, document.values), []).append(detail)
    for path, details in found.items():
        inside = any(len(other) > len(path) and other[: len(path)] == path for other in found)
        if inside and path:
            continue
        what, *hints = _sentence(model, path, details)
        yield path, details[0]["type"], document.error(path, what, *hints)


def _key_path(detail: Any, values: Any) -> KeyPath:
    """Return the key that an error is about; pydantic puts the alternatives of a union between."""
    path: list[str | int] = []
    for step in detail["loc"]:
        inside = isinstance(values, dict) and step in values
        inside |= isinstance(values, list) and isinstance(step, int) and step < len(values)
        if inside:
            values = values[step]
            path.append(step)
    return (*path, detail["loc"][-1]) if detail["type"] == "missing" else tuple(path)


def _sentence(model: type[BaseModel], path: KeyPath, details: list[Any]) -> list[str]:
    """Return what is wrong with a key, then hints."""
    detail, name = details[0], dotted(path)
    kinds = {one["type"] for one in details}
    if detail["type"] == "missing":
        return [f"{name} is missing"]
    if "extra_forbidden" in kinds:
        return _unknown(model, path)
    if not path:
        return ["holds no mapping of keys"]
    if "model_type" in kinds and len(path) == 1 and len(details) == 1:
        return [f"section '{name}' must be a mapping of keys, got {shown(detail['input'])}"]
    choices: list[str] = []
    parts: list[str] = []
    for one in details:
        if one["type"] == "literal_error":
            choices += re.findall(r"'([^']*)'", one["ctx"]["expected"])
        message = one["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        for theirs, ours in _PLAIN_WORDS:
            message = re.sub(theirs, ours, message)
        parts.append(message)
    value, hints = detail["input"], []
    if len(choices) > _MAX_CHOICES:
        parts = [f"one of {len(choices)} choices"]
        hints.append(f"all choices: recipes explain {name}")
    if isinstance(value, str):
        hints = [*did_you_mean(value, choices), *hints]
        if _NUMBER.match(value) and any("number" in part or "-1" in part for part in parts):
            hints = [f"remove the quotes: {value}"]
    if value is False and {"no", "NO"} & {*choices}:
        hints.append("a plain no is read as false here; quote it")
    if detail["type"] == "value_error":
        return [f"{name}: {'; '.join(dict.fromkeys(parts))}", *hints]
    return [f"{name} must be {' or '.join(dict.fromkeys(parts))}, got {shown(value)}", *hints]


def _unknown(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Return that a key does not exist, and what to write instead."""
    models = _models_at(model, path[:-1])
    key, name, prefix = str(path[-1]), dotted(path), dotted((*path[:-1], ""))
    for one in models:
        if remedy := getattr(one, "gone", {}).get(key.replace("-", "_")):
            return [f"'{name}' cannot be set here", remedy]
    keys = [known for one in models for known in one.model_fields]
    what = f"unknown key '{name}'" if len(path) > 1 else f"unknown section or key '{name}'"
    near = did_you_mean(key.replace("-", "_"), keys, prefix)
    for section, known in model.model_fields.items() if not near else ():
        if any(key in home.model_fields for home in _models_in(known.annotation)):
            return [what, f"it belongs to {section}: write {section}.{key}"]
    return [what, *(near or ([f"keys here: {', '.join(keys)}"] if len(keys) <= 30 else []))]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)


def _models_at(model: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """Return the models that a mapping at `path` may be."""
    models: list[type[BaseModel]] = [model]
    for step in path:
        fields = [one.model_fields[step] for one in models if step in one.model_fields]
        if fields:  # else an item of a list, or a key of a mapping of models
            models = [one for known in fields for one in _models_in(known.annotation)]
    return models


def _make_paths_absolute(
    model: type[BaseModel], document: Document, values: Any, at: KeyPath
) -> None:
    if isinstance(values, list):
        for index, item in enumerate(values):
            _make_paths_absolute(model, document, item, (*at, index))
    for key, known in model.model_fields.items() if isinstance(values, dict) else ():
        marks = [*_marks_in(known.annotation), *known.metadata]
        mark = next((mark for mark in marks if isinstance(mark, IsPath)), None)
        value, path = values.get(key), (*at, key)
        if mark and isinstance(value, str):
            values[key] = _absolute(mark, document, path, value)
        elif mark and isinstance(value, list):
            values[key] = [
                _absolute(mark, document, (*path, index), item) if isinstance(item, str) else item
                for index, item in enumerate(value)
            ]
        for inner in _models_in(known.annotation):
            _make_paths_absolute(inner, document, values.get(key), path)


def _absolute(mark: IsPath, document: Document, path: KeyPath, name: str) -> str:
    return document.absolute(path, name, keep_missing=mark.unless(name)) if name else name


def _marks_in(annotation: Any) -> Iterator[Any]:
    """Yield what is annotated inside a type such as `FilePath | None`."""
    if typing.get_origin(annotation) is Annotated:
        yield from typing.get_args(annotation)[1:]
    for inner in typing.get_args(annotation):
        yield from _marks_in(inner)


def _without(values: Any, paths: list[KeyPath]) -> Any:
    """Return the values without those at `paths`."""
    if not isinstance(values, dict):
        return values
    inner = {path[0]: [p[1:] for p in paths if p[:1] == path[:1]] for path in paths if path}
    return {
        key: _without(value, inner.get(key, []))
        for key, value in values.items()
        if () not in inner.get(key, [])
    }


def _secrets(document: Document) -> Iterator[RecipeError]:
    """Yield an error for whatever looks like a secret, which is never repeated."""
    what = "looks like a secret; a recipe must not hold one"
    lines = set()
    for path, value in _leaves(document.values, ()):
        if isinstance(value, str) and holds_secret(value):
            lines.add(document.origin(path))
            yield document.error(path, f"'{dotted(path)}' {what}", _SECRET_HINT)
    for number, line in enumerate(document.text.split("\n"), start=1):
        if holds_secret(line) and Origin(document.file, number) not in lines:
            error = RecipeError(f"this line {what}", _SECRET_HINT, file=document.file, line=number)
            yield error


def _leaves(values: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    pairs: Iterable[tuple[Any, Any]] = enumerate(values) if isinstance(values, list) else ()
    if isinstance(values, dict):
        pairs = values.items()
    elif not isinstance(values, list):
        yield path, values
    for key, value in pairs:
        yield from _leaves(value, (*path, key))
