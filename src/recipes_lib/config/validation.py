"""One loader and one check for every kind of YAML file: read, schema, and what the kind adds.

`load` is the way in for recipes, evals, judges, studies, profiles, published numbers and accelerate
configs. The rules are the committed JSON Schemas; this module turns their verdicts into lines a
person can act on. A kind adds words and rules (`KindRules`), and no parser.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.credentials import find_credentials
from recipes_lib.config.kinds import KINDS, kind_named
from recipes_lib.config.loader import Document, load_document
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.vocabulary import load_schema
from recipes_lib.config.yaml_source import KeyPath
from recipes_lib.core.errors import RecipeError, RecipeErrors

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator, ValidationError

PlacedError = tuple[KeyPath, RecipeError]
_TYPES = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "a mapping",
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_SHORT_NAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "half": "float16",
    "float": "float32",
}
_MOST_CHOICES = 16


class KindRules:
    """What a kind of file adds to the check that all kinds have in common: its own words, and rules
    that no schema can say.
    """

    has_schema = True

    def whole(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values with every short form written out, as the schema is asked
        about them.
        """
        return values

    def unknown(self, document: Document, path: KeyPath, known: list[str]) -> RecipeError:
        """Return the error for a key that does not exist here."""
        prefix = f"{dotted(path[:-1])}." if len(path) > 1 else ""
        what = f"unknown key '{dotted(path)}'" if len(path) > 1 else f"unknown section '{path[0]}'"
        near = did_you_mean(str(path[-1]).replace("-", "_"), known, prefix)
        return document.error(path, what, *near, f"keys here: {', '.join(known)}")

    def inside_unknown(
        self, document: Document, path: KeyPath, value: Any
    ) -> Iterator[PlacedError]:
        """Yield what is wrong inside the value of an unknown key whose meaning can be guessed."""
        yield from ()

    def missing(self, document: Document, path: KeyPath, schema: dict[str, Any]) -> RecipeError:
        """Return the error for a required key that nobody wrote; `schema` is that of the mapping it
        should stand in.
        """
        return document.error(path, f"{dotted(path)} is missing")

    def wrong(self, document: Document, path: KeyPath, error: ValidationError) -> RecipeError:
        """Return the error for a value of the wrong type or outside the choices."""
        return wrong_value(document, path, error)

    def between_keys(self, document: Document) -> Iterator[RecipeError]:
        """Yield what is wrong between keys, once the schema accepts each of them."""
        yield from ()

    def at_once(self, document: Document) -> Iterator[PlacedError]:
        """Yield what is wrong whatever the schema says, each with the key to blame; the schema's
        own verdict on that key wins.
        """
        yield from ()

    def further(self, document: Document, full: bool, sound: bool) -> list[RecipeError]:
        """Return what only `recipes check` asks; `sound` says that the values can be used."""
        return []


def load(path: str | Path, kind: str, overrides: Sequence[str] = ()) -> Document:
    """Load and check a file of one kind.

    Args:
        kind: name of the kind that is asked for.
        overrides: `section.key=value` words from the command line.

    Raises:
        RecipeError: no such file, no YAML, or a file of another kind.
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    document = load_document(path, overrides, keep_going=True)
    if document.kind.name != kind:
        raise wrong_kind(document, kind)
    if errors := validate(document):
        raise RecipeErrors(errors)
    return document


def validate(document: Document) -> list[RecipeError]:
    """Return everything wrong with a file by itself; warnings are added to the document."""
    return _validate(document)[0]


def _validate(document: Document) -> tuple[list[RecipeError], bool]:
    """Return what is wrong with a file, and whether its values can be used all the same (a key that
    stands there twice).
    """
    rules = document.kind.rules()
    found: dict[KeyPath, RecipeError] = {}
    if rules.has_schema:
        found.update(find_credentials(document))
        for error in _validator(document.kind.name).iter_errors(rules.whole(document.values)):
            for path, translated in translate(rules, document, error):
                found.setdefault(path, translated)
    for path, translated in rules.at_once(document):
        if not any(known[: len(path)] == path for known in found):
            found[path] = translated
    unread = [
        problem.what for problem in document.problems
    ]  # a value that could not be read: its stand-in says nothing
    errors = [
        error
        for path, error in found.items()
        if not any(what.startswith(f"{dotted(path)}: ") for what in unread)
    ]
    if not found:
        errors += rules.between_keys(document)
    return [*document.problems, *errors], not found and not errors


def check(document: Document, full: bool) -> list[RecipeError]:
    """Return what `recipes check` finds in a file; `full` asks upstream's classes and the model's
    files too.
    """
    errors, sound = _validate(document)
    return errors + document.kind.rules().further(document, full and not errors, sound)


def wrong_kind(document: Document, expected: str) -> RecipeError:
    """Return the error for a file of another kind than was asked for."""
    title, wanted = document.kind.title, kind_named(expected)
    plain = wanted is None or (
        expected == "recipe" and title.endswith("recipe")
    )  # the title says it
    use = [document.kind.use] if expected != "accelerate" else []
    return RecipeError(
        f"is {title}" if plain or wanted is None else f"is {title}, not {wanted.title}",
        *use,
        file=document.file,
    )


@lru_cache(maxsize=len(KINDS))
def _validator(kind: str) -> Draft202012Validator:
    """Return a validator of a kind: a bool is no number, 4.0 is no integer, and numbers
    are finite.
    """
    from jsonschema import Draft202012Validator, validators

    def is_integer(_: Any, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def is_number(_: Any, value: Any) -> bool:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )

    schema = load_schema()["$defs"]["document"] if kind == "base" else load_schema(kind)
    checker = Draft202012Validator.TYPE_CHECKER.redefine_many(
        {"integer": is_integer, "number": is_number}
    )
    return validators.extend(Draft202012Validator, type_checker=checker)(schema)


def validator_of(schema: dict[str, Any]) -> Draft202012Validator:
    """Return the validator of a part of the recipe's schema."""
    return _validator("base").evolve(schema=schema)


def translate(
    rules: KindRules, document: Document, error: ValidationError, above: KeyPath = ()
) -> Iterator[PlacedError]:
    """Turn one error of jsonschema into ours, each with its key path.

    Args:
        above: path of the value that was validated, where that is not the whole document.
    """
    path: KeyPath = (*above, *error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = list(error.schema.get("properties", {}))
        unknown = [(*path, key) for key in error.instance if key not in known]
        yield from ((key, rules.unknown(document, key, known)) for key in unknown)
        for key in unknown:
            yield from rules.inside_unknown(document, key, error.instance[key[-1]])
    elif error.validator == "required":
        for key in (key for key in error.validator_value if key not in error.instance):
            yield (*path, key), rules.missing(document, (*path, key), error.schema)
    elif inner := [
        one
        for one in error.context or ()
        if len(one.absolute_path) > len(error.absolute_path) or _is_mapping(error, one)
    ]:
        for one in inner:
            yield from translate(rules, document, one, above)
    else:
        yield path, rules.wrong(document, path, error)


def _is_mapping(error: ValidationError, context: ValidationError) -> bool:
    """Whether the value is a mapping, and `context` says what the alternative with named keys has
    against it.
    """
    return (
        isinstance(error.instance, dict)
        and "properties" in error.schema[error.validator][context.schema_path[0]]
    )


def wrong_value(document: Document, path: KeyPath, error: ValidationError) -> RecipeError:
    """Return the error for a value of the wrong type or outside the choices."""
    schema, value = error.schema, error.instance
    if not path:
        return RecipeError("holds no mapping", file=document.file)
    if len(path) == 1:
        return document.error(
            path,
            f"section '{path[0]}' must be a mapping of keys, got {shown(value)}",
            f"all keys: recipes explain {path[0]}",
        )
    choices = _choices(schema)
    hints = []
    if isinstance(value, str):
        short = _SHORT_NAMES.get(value)
        hints = (
            [f"use {short}"]
            if short in choices
            else did_you_mean(value, [choice for choice in choices if isinstance(choice, str)])
        )
        if _is_quoted_number(value, schema):
            hints = [f"remove the quotes: {value}"]
    spelling = {False: "no", True: "yes"}.get(value) if isinstance(value, bool) else None
    if spelling in choices:
        hints.append(
            f'a plain {spelling} is read as {shown(value)}; quote it: "{spelling}" (on the command'
            f" line: {dotted(path)}='\"{spelling}\"')"
        )
    if len(choices) > _MOST_CHOICES:
        hints.append(f"all {len(choices)} choices: recipes explain {dotted(path)}")
    return document.error(
        path, f"{dotted(path)} must be {describe(schema)}, got {shown(value)}", *hints
    )


def _is_quoted_number(text: str, schema: dict[str, Any]) -> bool:
    """Whether a number is wanted and the text is one."""
    types = schema.get("type", [])
    wanted = {"number", "integer"}.isdisjoint([types] if isinstance(types, str) else types)
    try:
        return (not wanted and math.isfinite(float(text))) or any(
            _is_quoted_number(text, part) for part in schema.get("anyOf", ())
        )
    except ValueError:
        return False


def describe(schema: dict[str, Any]) -> str:
    """Return what a value must be, in words.

    Example:
        >>> describe({"type": ["integer", "null"], "minimum": 1})
        'a whole number >= 1 or null'
    """
    if "title" in schema:
        return str(schema["title"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(describe(part) for part in schema["anyOf"]))
    if "const" in schema:
        return shown(schema["const"])
    if "enum" in schema:
        choices = schema["enum"]
        if len(choices) > _MOST_CHOICES:
            return f"one of {len(choices)} choices"
        return ("one of " if len(choices) > 1 else "") + ", ".join(
            str(shown(choice)).strip("'") for choice in choices
        )
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    bounds = " and ".join(
        f"{sign} {schema[word]}" for word, sign in _BOUNDS.items() if word in schema
    )
    words = []
    for name in types:
        word = "null" if name == "null" else _TYPES[name]
        if (
            name == "array"
            and isinstance(schema.get("items"), dict)
            and schema["items"].get("type") == "string"
        ):
            word = "a list of names"
        if name == "array" and schema.get("minItems"):
            word += " that is not empty"
        words.append(f"{word} {bounds}" if bounds and name in ("integer", "number") else word)
    if "pattern" in schema:
        return f"text like {schema['pattern']}"
    return " or ".join(words) or "another value"


def shown(value: Any) -> str:
    """Return a value as a short piece of YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _choices(schema: dict[str, Any]) -> list[Any]:
    """Return all values an enumeration offers, those of its alternatives included."""
    inner = [choice for part in schema.get("anyOf", []) for choice in _choices(part)]
    return [*schema.get("enum", []), *schema.get("items", {}).get("enum", []), *inner]


def dotted(path: KeyPath) -> str:
    """Return a key path as it is written on the command line."""
    return ".".join(map(str, path))
