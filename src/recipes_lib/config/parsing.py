"""From a `Document` to a pydantic model: `parse` returns the file, or raises everything that is
wrong with it at once, each error at its file and line. What a key means is the model's business.
"""

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
    NUMBER,
    Document,
    KeyPath,
    did_you_mean,
    dotted,
    kind_of,
    value_text,
    wrong_kind,
)
from recipes_lib.core.errors import RecipeError, RecipeErrors

_MAX_CHOICES = 16
_MAX_KEYS = 30


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
    """A mapping in a YAML file: field = key, the text under it = the key's help.

    Unknown keys are refused, true is no number and "16" is not 16. `gone` says of keys that do not
    exist what to write instead.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
    gone: ClassVar[Mapping[str, str]] = {}
    kind: ClassVar[str] = ""  # of a whole file: its name among `documents.KINDS`

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the JSON Schema, in which the text under a field is its description. The texts are
        read from the source here and not by pydantic: that takes 10 ms a class, in every verb.
        """
        schema = super().model_json_schema(*args, **kwargs)
        for model in [cls, *_models_below(cls)]:
            part = schema if model is cls else schema["$defs"].get(model.__name__, {})
            for name, text in _texts(model):
                part.get("properties", {}).get(name, {}).setdefault("description", text)
        return schema


M = TypeVar("M", bound=BaseModel)
Rule = Callable[[M, Document], Iterable[RecipeError]]


def parse(model: type[M], document: Document, *rules: Rule[M]) -> M:
    """Return a document as `model`.

    Args:
        model: the kind of file; its `FilePath` fields become absolute.
        rules: what must hold between keys; each yields errors, or adds warnings to the document.

    Raises:
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    if expected := getattr(model, "kind", ""):
        kind = kind_of(document.values, document.text, document.file)
        if kind.name != expected:
            raise wrong_kind(kind, expected, document.file)
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
        what = "holds no mapping of keys" if document.values else "is empty"
        return None, [RecipeError(what, file=document.file)]
    _make_paths_absolute(model, document, document.values, ())
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


def _validated(model: type[M], values: Any) -> tuple[M | None, dict[KeyPath, list[Any]]]:
    """Return the values as a model, or None and what it refuses, by key.

    A union is refused once per alternative: where an alternative has something against a part of
    the value, what the others say about the whole is left out.
    """
    refused: dict[KeyPath, list[Any]] = {}
    try:
        return model.model_validate(values), refused
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            refused.setdefault(_key_path(detail, values), []).append(detail)
    parts = {path[:length] for path in refused for length in range(1, len(path))}
    return None, {path: details for path, details in refused.items() if path not in parts}


def _key_path(detail: Any, values: Any) -> KeyPath:
    """Return the key that an error is about; pydantic puts the alternatives of a union between."""
    path: list[str | int] = []
    for step in detail["loc"]:
        is_key = isinstance(values, dict) and step in values
        if is_key or (isinstance(values, list) and isinstance(step, int) and step < len(values)):
            values = values[step]
            path.append(step)
    return (*path, detail["loc"][-1]) if detail["type"] == "missing" else tuple(path)


def _without(values: Any, paths: Iterable[KeyPath]) -> Any:
    """Return nested mappings without the values at `paths`; a list with a bad item goes whole."""
    if not isinstance(values, dict):
        return values
    inner: dict[Any, list[KeyPath]] = {}
    for path in paths:
        inner.setdefault(path[0], []).append(path[1:])
    return {
        key: _without(value, inner.get(key, ()))
        for key, value in values.items()
        if () not in inner.get(key, ()) and not (key in inner and isinstance(value, list))
    }


def _sentence(model: type[BaseModel], path: KeyPath, details: list[Any]) -> list[str]:
    """Return what is wrong with a key, then hints."""
    name, value = dotted(path), details[0]["input"]
    kinds = {detail["type"] for detail in details}
    if "missing" in kinds:
        return [f"{name} is missing"]
    if "extra_forbidden" in kinds:
        return _unknown(model, path)
    if kinds == {"model_type"}:
        return [f"section '{name}' must be a mapping of keys, got {_short(value)}"]
    said, hints = [detail["msg"].removeprefix("Value error, ") for detail in details], []
    messages = [text.removeprefix("Input should be ").replace("None", "null") for text in said]
    must = " must be" if said[0].startswith("Input should be ") else ":"
    what = f"{name}{must} {' or '.join(dict.fromkeys(messages))}"
    choices = [
        choice
        for detail in details
        if detail["type"] == "literal_error"
        for choice in re.findall(r"'([^']*)'", detail["ctx"]["expected"])
    ]
    if len(choices) > _MAX_CHOICES:
        what = f"{name} must be one of {len(choices)} choices"
        hints.append(f"all choices: recipes explain {name}")
    if isinstance(value, str):
        hints = [*did_you_mean(value, choices), *hints]
        if NUMBER.match(value) and any("valid" in text or "-1" in text for text in messages):
            hints.append(f"remove the quotes: {value}" if len(value) < 30 else "it is too long")
    if value is False and {"no", "NO"} & {*choices}:
        hints.append("a plain no is read as false here; quote it")
    return [what if "value_error" in kinds else f"{what}, got {_short(value)}", *hints]


def _unknown(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Return that a key does not exist, and what to write instead."""
    models = _models_at(model, path[:-1])
    key, name, prefix = str(path[-1]).replace("-", "_"), dotted(path), dotted((*path[:-1], ""))
    for section in models:
        if remedy := getattr(section, "gone", {}).get(key):
            return [f"'{name}' cannot be set here", remedy]
    keys = [known for section in models for known in section.model_fields]
    what = f"unknown key '{name}'" if len(path) > 1 else f"unknown section or key '{name}'"
    near = did_you_mean(key, keys, prefix)
    for section_name, known in model.model_fields.items() if not near else ():
        if any(key in home.model_fields for home in _models_in(known.annotation)):
            return [what, f"it belongs to {section_name}: write {section_name}.{key}"]
    return [what, *(near or ([f"keys here: {', '.join(keys)}"] if len(keys) < _MAX_KEYS else []))]


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str | list | dict) else value_text(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)


def _models_below(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield the models of a model's fields, and theirs."""
    for known in model.model_fields.values():
        for inner in _models_in(known.annotation):
            yield inner
            yield from _models_below(inner)


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


def _models_at(model: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """Return the models that a mapping at `path` may be."""
    models: list[type[BaseModel]] = [model]
    for step in path:
        fields = [known.model_fields[step] for known in models if step in known.model_fields]
        if fields:  # else an item of a list, or a key of a mapping of models
            models = [inner for known in fields for inner in _models_in(known.annotation)]
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
        path = (*at, key)
        if mark and key in values:
            values[key] = _absolute(mark, document, path, values[key])
        for inner in _models_in(known.annotation):
            _make_paths_absolute(inner, document, values.get(key), path)


def _absolute(mark: IsPath, document: Document, path: KeyPath, value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(mark, document, (*path, index), item) for index, item in enumerate(value)]
    if not isinstance(value, str) or not value:
        return value
    return document.absolute(path, value, keep_missing=mark.unless(value))


def _marks_in(annotation: Any) -> Iterator[Any]:
    """Yield what is annotated inside a type such as `FilePath | None`."""
    if typing.get_origin(annotation) is Annotated:
        yield from typing.get_args(annotation)[1:]
    for inner in typing.get_args(annotation):
        yield from _marks_in(inner)
