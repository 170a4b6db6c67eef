"""One loader and one check for every kind of YAML file: read, schema, and what the kind adds.

`load` is the way in for recipes, evals, judges, studies, profiles, published numbers and accelerate
configs. The rules are the committed JSON Schemas; this module turns their verdicts into lines a
person can act on. A kind adds words and rules (`KindRules`), and no parser.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.json_schema import JsonSchema, types_of
from recipes_lib.config.kinds import KINDS, wrong_kind
from recipes_lib.config.loader import Document, load_document
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.vocabulary import SHORT_DTYPES, load_schema
from recipes_lib.config.yaml_source import KeyPath
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.core.redaction import holds_secret, is_secret_name, mask_secrets

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
    "null": "null",
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_MOST_CHOICES = 16
_SECRET_HINT = (
    "log in with 'hf auth login' or export the variable in the shell; if this was committed, revoke"
    " the token"
)


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

    def missing(self, document: Document, path: KeyPath, schema: JsonSchema) -> RecipeError:
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
        raise wrong_kind(document.kind, kind, document.file)
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
    # of a value that could not be read its stand-in says nothing
    unread = [problem.what for problem in document.problems]
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


@lru_cache(maxsize=len(KINDS))
def _validator(kind: str) -> Draft202012Validator:
    """Return a validator of a kind: a bool is no number, 4.0 is no integer, and numbers
    are finite.
    """
    from jsonschema import Draft202012Validator, validators

    def is_integer(_: Any, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def is_number(_: Any, value: Any) -> bool:
        is_one = isinstance(value, int | float) and not isinstance(value, bool)
        return is_one and math.isfinite(value)

    schema = load_schema(kind)
    types = {"integer": is_integer, "number": is_number}
    checker = Draft202012Validator.TYPE_CHECKER.redefine_many(types)
    return validators.extend(Draft202012Validator, type_checker=checker)(schema)


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
    elif inner := [one for one in error.context or () if _says_more(error, one)]:
        for one in inner:
            yield from translate(rules, document, one, above)
    else:
        yield path, rules.wrong(document, path, error)


def _says_more(error: ValidationError, context: ValidationError) -> bool:
    """Whether an alternative's error is about a part of the value; of a mapping, also what the
    alternative with named keys has against it.
    """
    if len(context.absolute_path) > len(error.absolute_path):
        return True
    alternative = error.schema[error.validator][context.schema_path[0]]
    return isinstance(error.instance, dict) and "properties" in alternative


def wrong_value(document: Document, path: KeyPath, error: ValidationError) -> RecipeError:
    """Return the error for a value of the wrong type or outside the choices."""
    schema, value = error.schema, error.instance
    if not path:
        return RecipeError("holds no mapping", file=document.file)
    if len(path) == 1:
        what = f"section '{path[0]}' must be a mapping of keys, got {shown(value)}"
        explained = document.kind.name in ("recipe", "base")
        hints = [f"all keys: recipes explain {path[0]}"] if explained else []
        return document.error(path, what, *hints)
    choices, name, hints = _choices(schema), dotted(path), []
    if isinstance(value, str):
        short = SHORT_DTYPES.get(value)
        hints = did_you_mean(value, [choice for choice in choices if isinstance(choice, str)])
        if short in choices:
            hints = [f"use {short}"]
        if _is_quoted_number(value, schema):
            hints = [f"remove the quotes: {value}"]
    spelling = {False: "no", True: "yes"}.get(value) if isinstance(value, bool) else None
    if spelling in choices:
        hints.append(
            f'a plain {spelling} is read as {shown(value)}; quote it: "{spelling}" (on the command'
            f" line: {name}='\"{spelling}\"')"
        )
    if len(choices) > _MOST_CHOICES:
        hints.append(f"all {len(choices)} choices: recipes explain {name}")
    return document.error(path, f"{name} must be {describe(schema)}, got {shown(value)}", *hints)


def _is_quoted_number(text: str, schema: JsonSchema) -> bool:
    """Whether a number is wanted and the text is one."""
    no_number = {"number", "integer"}.isdisjoint(types_of(schema))
    try:
        return (not no_number and math.isfinite(float(text))) or any(
            _is_quoted_number(text, part) for part in schema.get("anyOf", ())
        )
    except ValueError:
        return False


def describe(schema: JsonSchema) -> str:
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
        names = ", ".join(shown(choice).strip("'") for choice in choices)
        return f"one of {names}" if len(choices) > 1 else names
    bounds = " and ".join(
        f"{sign} {value}"
        for word, sign in _BOUNDS.items()
        if (value := schema.get(word)) is not None
    )
    words = []
    for name in types_of(schema):
        word, items = _TYPES[name], schema.get("items")
        if name == "array" and isinstance(items, dict) and items.get("type") == "string":
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


def _choices(schema: JsonSchema) -> list[Any]:
    """Return all values an enumeration offers, those of its alternatives included."""
    inner = [choice for part in schema.get("anyOf", []) for choice in _choices(part)]
    return [*schema.get("enum", []), *schema.get("items", {}).get("enum", []), *inner]


def dotted(path: KeyPath) -> str:
    """Return a key path as it is written on the command line."""
    return ".".join(map(str, path))


def find_credentials(document: Document) -> dict[KeyPath, RecipeError]:
    """Return an error for every key or value that looks like a secret; the value is never repeated
    in the message.
    """
    errors: dict[KeyPath, RecipeError] = {}
    for path, value in walk(document.values):
        key = str(path[-1]).replace("-", "_")
        holds = value not in (None, "") and not isinstance(value, dict | list | bool)
        # the schema has train.eos_token
        named = is_secret_name(key) and holds
        if named or (isinstance(value, str) and holds_secret(value)):
            what = f"'{mask_secrets(dotted(path))}' looks like a secret; a recipe must not hold one"
            errors[path] = document.error(path, what, _SECRET_HINT)
    lines = {(found.file, found.line) for found in errors.values()}
    what, file = "this line holds what looks like a secret", document.file
    for number, line in enumerate(document.text.split("\n"), start=1):
        if holds_secret(line) and (file, number) not in lines:
            errors["", number] = RecipeError(what, _SECRET_HINT, file=file, line=number)
    return errors


def walk(values: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every key path below plain values, with its value."""
    items: Iterable[tuple[str | int, Any]] = enumerate(values if isinstance(values, list) else ())
    if isinstance(values, dict):
        items = values.items()
    for key, value in items:
        yield (*path, key), value
        yield from walk(value, (*path, key))
