"""From a `Document` to a pydantic model, or everything that is wrong with it at once."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from recipes_lib.config.documents import (
    Document,
    KeyPath,
    did_you_mean,
    dotted,
    kind_of,
    value_text,
    wrong_kind,
)
from recipes_lib.core.errors import ExitCode, RecipeError, RecipeErrors

Schema = dict[str, Any]  # a JSON Schema
_MAX_CHOICES = 16
_MAX_KEYS = 30


@dataclass(frozen=True)
class IsPath:
    """Marks a field as a path that `parse` makes absolute."""

    unless: Callable[[str], bool] = lambda name: False  # of a Hub id: if there is no such file


FilePath = Annotated[str, IsPath()]


class Section(BaseModel):
    """A mapping in a YAML file: a field is a key, the text under it its help. Unknown keys are
    refused, true is no number and "16" is not 16. `gone` has what to write instead of former keys.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,  # most files have few of the sections
    )
    gone: ClassVar[Mapping[str, str]] = {}
    kind: ClassVar[str] = ""  # of a whole file: its name among `documents.KINDS`

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> Schema:
        """Return the JSON Schema; pydantic would read the texts in every verb, 10 ms a class."""
        schema = super().model_json_schema(*args, **kwargs)
        for model in {cls, *_models_below(cls)}:
            part = schema if model is cls else schema["$defs"].get(model.__name__, {})
            for name, text in _texts(model):
                part.get("properties", {}).get(name, {}).setdefault("description", text)
        return schema


M = TypeVar("M", bound=BaseModel)
Rule = Callable[[M, Document], Iterable[RecipeError]]


def parse(model: type[M], document: Document, *rules: Rule[M]) -> M:
    """Return a document as `model`, or raise everything that is wrong, each at its file and line.

    Args:
        model: the kind of file; its `FilePath` fields become absolute.
        rules: what must hold between keys; each yields errors, or adds warnings to the document.
    """
    if expected := getattr(model, "kind", ""):
        kind = kind_of(document, expected)
        if kind.name != expected:
            raise wrong_kind(kind, expected, document.file)
    value, errors = judge(model, document, *rules)
    if value is None or errors:
        failure = RecipeErrors(errors)
        if all(error.exit_code == ExitCode.DATA for error in errors):
            failure.exit_code = ExitCode.DATA
        raise failure
    return value


def judge(
    model: type[M], document: Document, *rules: Rule[M], partial: bool = False
) -> tuple[M | None, list[RecipeError]]:
    """Return what `parse` does, and everything that is wrong: rules judge what the model takes. In
    a partial document, a base that recipes extend, required keys may be missing.
    """
    document.values = _absolute(model, document, document.values, ())
    value, refused = _validated(model, document.values)
    errors = [*document.problems]
    for path, details in refused.items():
        if not (partial and details[0]["type"] == "missing"):
            what, *hints = _sentence(model, path, details)
            errors.append(document.error(path, what, *hints))
    if refused:
        value, _ = _validated(model, _without(document.values, refused))
    if value is not None:
        blamed = {(error.file, error.line) for error in errors}
        more = [error for rule in rules for error in rule(value, document)]
        errors += [error for error in more if (error.file, error.line) not in blamed]
    return value, errors


def _absolute(kind: Any, document: Document, value: Any, at: KeyPath) -> Any:
    """Return a value of the type `kind` with the paths in it made absolute."""
    arguments = typing.get_args(kind)
    mark = next((part for part in arguments if isinstance(part, IsPath)), None)
    if mark and value and isinstance(value, str):
        return document.absolute(at, value, keep_missing=mark.unless(value))
    if isinstance(value, list) and typing.get_origin(kind) is list:
        items = enumerate(value)
        return [_absolute(arguments[0], document, item, (*at, index)) for index, item in items]
    if isinstance(value, dict) and _is_model(kind):
        fields = {key: known for key, known in kind.model_fields.items() if key in value}
        return value | {
            key: _absolute(known.rebuild_annotation(), document, value[key], (*at, key))
            for key, known in fields.items()
        }
    for inner in arguments:
        value = _absolute(inner, document, value, at)
    return value


def _validated(model: type[M], values: Any) -> tuple[M | None, dict[KeyPath, list[Any]]]:
    """Return the values as a model, or None and what it refuses, by key; of a union, what is wrong
    with a part of the value, where an alternative says so.
    """
    refused: dict[KeyPath, list[Any]] = {}
    try:
        return model.model_validate(values), refused
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path: list[str | int] = []
            inner = values
            for step in detail["loc"]:  # pydantic puts the alternatives of a union between the keys
                is_key = isinstance(inner, dict) and step in inner
                if is_key or (isinstance(inner, list) and isinstance(step, int)):
                    inner = inner[step]
                    path.append(step)
            path += detail["loc"][-1:] if detail["type"] == "missing" else ()
            refused.setdefault(tuple(path), []).append(detail)
    parts = {path[:length] for path in refused for length in range(1, len(path))}
    return None, {path: details for path, details in refused.items() if path not in parts}


def _without(values: Any, paths: Iterable[KeyPath]) -> Any:
    """Return nested mappings without the values at `paths`; a list with a bad item goes whole."""
    if not isinstance(values, dict):
        return values
    kept = {}
    for key, value in values.items():
        inner = [path[1:] for path in paths if path[0] == key]
        if () not in inner and not (inner and isinstance(value, list)):
            kept[key] = _without(value, inner)
    return kept


def _sentence(model: type[BaseModel], path: KeyPath, details: list[Any]) -> list[str]:
    """Return what is wrong with a key, then hints."""
    name, value = dotted(path), details[0]["input"]
    kinds = {detail["type"] for detail in details}
    if "missing" in kinds:
        return [f"{name} is missing"]
    if "extra_forbidden" in kinds:
        return _unknown(model, path)
    got = value_text(value, 60)
    if kinds == {"model_type"}:
        return [f"section '{name}' must be a mapping of keys, got {got}"]
    details = [detail for detail in details if "pattern" not in detail["type"]] or details
    messages = [detail["msg"].removeprefix("Value error, ") for detail in details]
    must = " must be" if messages[0].startswith(("Input should be ", "List should have ")) else ":"
    texts = [text.removeprefix("Input should be ").replace("None", "null") for text in messages]
    texts = [text.replace("List should have", "a list of").split(" after val")[0] for text in texts]
    texts = [text.replace("a valid dictionary", "a mapping {key: value}") for text in texts]
    texts = [re.sub(r"\d{20,}", lambda long: f"{float(long[0]):g}", text) for text in texts]
    what = f"{name}{must} {' or '.join(dict.fromkeys(texts))}"
    hints = []
    expected = [each["ctx"]["expected"] for each in details if each["type"] == "literal_error"]
    choices = re.findall(r"'([^']*)'", " ".join(expected))
    if len(choices) > _MAX_CHOICES:
        what = f"{name} must be one of {len(choices)} choices"
        hints.append(f"all choices: recipes explain {name}")
    if isinstance(value, str):
        hints = [*did_you_mean(value, choices), *hints]
        if kinds & {"int_type", "float_type"} and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value):
            hints.append(f"remove the quotes: {value}" if len(value) < 30 else "it is too long")
    if value is False and {"no", "NO"} & {*choices}:
        hints.append("a plain no is read as false here; quote it")
    return [what if "value_error" in kinds else f"{what}, got {got}", *hints]


def _unknown(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Return that a key does not exist, and what to write instead."""
    models: list[type[BaseModel]] = [model]
    for step in path[:-1]:
        fields = [known.model_fields[step] for known in models if step in known.model_fields]
        if fields:  # else an item of a list, or a key of a mapping of models
            models = [inner for known in fields for inner in _models_in(known.annotation)]
    key, name, prefix = str(path[-1]).replace("-", "_"), dotted(path), dotted((*path[:-1], ""))
    for section in models:
        if remedy := getattr(section, "gone", {}).get(key):
            return [f"'{name}' cannot be set here", remedy]
    keys = [known for section in models for known in section.model_fields]
    what = f"unknown key '{name}'" if len(path) > 1 else f"unknown section or key '{name}'"
    ends = [known for known in keys if known.endswith(f"_{key}")]  # epochs: num_train_epochs
    near = did_you_mean(ends[0] if ends else key, keys, prefix)
    for section_name, known in model.model_fields.items() if not near else ():
        if any(key in home.model_fields for home in _models_in(known.annotation)):
            return [what, f"it belongs to {section_name}: write {section_name}.{key}"]
    all_keys = f"all keys: recipes explain {dotted(path[:-1])}"
    return [what, *(near or [f"keys: {', '.join(keys)}" if len(keys) < _MAX_KEYS else all_keys])]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation mentions."""
    if _is_model(annotation):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)


def _models_below(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield the models of a model's fields, and theirs."""
    for known in model.model_fields.values():
        for inner in _models_in(known.annotation):
            yield from (inner, *_models_below(inner))


def _texts(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield the fields of a model with the text under each."""
    for cls in model.__mro__:
        if cls in (BaseModel, Section, object):
            return
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        except OSError:  # made by `create_model`, with its descriptions
            continue
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                yield ast.unparse(field.target), " ".join(ast.literal_eval(text.value).split())
