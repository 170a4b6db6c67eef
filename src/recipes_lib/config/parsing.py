"""From a `Document` to a pydantic model, or everything that is wrong with it at once."""

import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from recipes_lib.config.documents import (
    MAIN_KEYS,
    SHORT_NAMES,
    Document,
    KeyPath,
    did_you_mean,
    dotted,
    value_text,
    wrong_kind,
)
from recipes_lib.core.errors import RecipeError, RecipeErrors

_MAX_NAMES = 20  # that a message lists


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
        use_attribute_docstrings=True,
    )
    gone: ClassVar[Mapping[str, str]] = {}
    kind: ClassVar[str] = ""  # of a whole file: its name among `documents.KINDS`


M = TypeVar("M", bound=BaseModel)
Rule = Callable[[M, Document], Iterable[RecipeError]]  # yields what is wrong between keys


def parse(model: type[M], document: Document, *rules: Rule[M]) -> M:
    """Return a document as `model`, or raise all that is wrong, at file and line."""
    expected = getattr(model, "kind", "")
    if expected and document.kind not in ("", expected):
        raise wrong_kind(document, expected)
    value, errors = judge(model, document, *rules)
    if value is None or errors:
        raise RecipeErrors(errors)
    return value


def judge(
    model: type[M], document: Document, *rules: Rule[M]
) -> tuple[M | None, list[RecipeError]]:
    """Return what `parse` does, and everything that is wrong: rules judge what the model takes."""
    document.values = _absolute(model, document, document.values, ())
    value, refused = _validated(model, document.values)
    errors = list(document.problems)
    for path, details in refused.items():
        errors.append(document.error(path, *_sentence(model, path, details)))
    if refused:
        # the rules judge what is left without the values of a wrong type
        value, _ = _validated(model, _without(document.values, refused))
    if value is not None:
        for rule in rules:
            errors += rule(value, document)
    return value, errors


def _absolute(kind: Any, document: Document, value: Any, at: KeyPath) -> Any:
    """Return a value of the type `kind`, in which paths are made absolute in place."""
    arguments = typing.get_args(kind)
    marks = [part for part in arguments if isinstance(part, IsPath)]
    if marks and value and isinstance(value, str):
        return document.absolute(at, value, keep_missing=marks[0].unless(value))
    if isinstance(value, list) and typing.get_origin(kind) is list:
        for index, item in enumerate(value):
            value[index] = _absolute(arguments[0], document, item, at + (index,))
    elif isinstance(value, dict) and typing.get_origin(kind) is dict:
        for key, item in value.items():
            value[key] = _absolute(arguments[1], document, item, at + (key,))
    elif isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, BaseModel):
        for key in value.keys() & kind.model_fields.keys():
            inner = kind.model_fields[key].rebuild_annotation()
            value[key] = _absolute(inner, document, value[key], at + (key,))
    # what stands inside an Annotated, or the alternatives of a union
    for inner in arguments:
        value = _absolute(inner, document, value, at)
    return value


def _validated(model: type[M], values: Any) -> tuple[M | None, dict[KeyPath, list[Any]]]:
    """Return the values as a model, or None and what it refuses, by key (inside a union too)."""
    try:
        return model.model_validate(values), {}
    except ValidationError as error:
        details = error.errors(include_url=False)
    refused: dict[KeyPath, list[Any]] = {}
    around: set[KeyPath] = set()  # paths of the mappings and lists around what is refused
    for detail in details:
        path: KeyPath = ()
        inner = values
        for step in detail["loc"]:  # pydantic puts the alternatives of a union between the keys
            is_key = isinstance(inner, dict) and step in inner
            if is_key or (isinstance(inner, list) and isinstance(step, int)):
                around.add(path)
                path += (step,)
                inner = inner[step]
        if detail["type"] == "missing":
            around.add(path)
            path += (detail["loc"][-1],)
        refused.setdefault(path, []).append(detail)
    around.discard(())
    return None, {path: wrong for path, wrong in refused.items() if path not in around}


def _without(values: Any, paths: Iterable[KeyPath]) -> Any:
    """Return nested mappings without the values at `paths`; a list with a bad item goes whole."""
    if not isinstance(values, dict):
        return values
    remaining = {}
    for key, value in values.items():
        inner = [path[1:] for path in paths if path[0] == key]
        if () not in inner and not (inner and isinstance(value, list)):
            remaining[key] = _without(value, inner)
    return remaining


def _sentence(model: type[BaseModel], path: KeyPath, details: list[Any]) -> list[str]:
    """Return what is wrong with a key, then hints."""
    name = dotted(path)
    kind = details[0]["type"]
    if kind == "missing":
        return [f"{name} is missing"]
    if any(detail["type"] == "extra_forbidden" for detail in details):
        return _unknown(model, path)
    if kind == "model_type":  # a plain mapping has no keys of ours
        hint = f"its keys: recipes explain {name}"
        if name in MAIN_KEYS:
            value = value_text(details[0]["input"], 60)
            hint = f"write {name}.{MAIN_KEYS[name]}={value}, or in YAML below {name}:; {hint}"
        return [f"{name} is a section, not a value", hint]
    what = " or ".join(dict.fromkeys(detail["msg"] for detail in details))
    what = what.replace("or Input should be", "or").replace("Value error, ", "")
    what = what.partition(" or instance of ")[0]
    if what.count("'") > 2 * _MAX_NAMES:
        what = f"not one of the choices (recipes explain {name})"
    return [f"{name}: {what}, got {value_text(details[0]['input'], 60)}"]


def _unknown(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Return that a key does not exist, and what to write instead."""
    sections: list[type[BaseModel]] = [model]  # that the value may be; several of a union
    for step in path[:-1]:
        inner: list[type[BaseModel]] = []
        for section in sections:
            if step in section.model_fields:
                inner += _models_in(section.model_fields[str(step)].annotation)
        sections = inner or sections  # an item of a list is of the models around it
    name = dotted(path)
    key = str(path[-1]).replace("-", "_")
    keys: list[str] = []
    for section in sections:
        gone = getattr(section, "gone", {})
        if key in gone:
            return [f"'{name}' cannot be set here", gone[key]]
        keys += section.model_fields
    what = f"unknown key '{name}'"
    for home, field in model.model_fields.items():
        if any(key in section.model_fields for section in _models_in(field.annotation)):
            return [what, f"it belongs to {home}: write {home}.{key}"]
    if len(path) == 1 and key in SHORT_NAMES:
        return [what, f"write {SHORT_NAMES[key]}"]
    near = did_you_mean(key, keys, lambda key: dotted(path[:-1] + (key,)))
    if near:
        return [what] + near
    if len(keys) < _MAX_NAMES:
        return [what, f"keys: {', '.join(keys)}"]
    return [what, f"keys: recipes explain {dotted(path[:-1])}"]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)
