"""Stage 1 of checking a recipe: structure, types, choices and renames, without torch, everything at once.

The rules are the committed JSON Schema; this module turns its verdicts into lines a person can act on. What the schema cannot say
about combinations of keys is in `combinations`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from recipes_lib.errors import RecipeError
from recipes_lib.recipe.combinations import check_combinations
from recipes_lib.recipe.constraints import NOT_IN_RECIPES
from recipes_lib.recipe.credentials import find_credentials
from recipes_lib.recipe.kinds import SECTIONS, kind_named
from recipes_lib.recipe.loader import Document
from recipes_lib.recipe.renames import RENAMES
from recipes_lib.recipe.suggestions import did_you_mean, near_names
from recipes_lib.recipe.vocabulary import dotted_names, load_schema, subschema
from recipes_lib.recipe.yaml_source import KeyPath

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator, ValidationError

_TYPES = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "a mapping",
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
_MOST_CHOICES = 16


def validate(document: Document, expected: str | None = None) -> list[RecipeError]:
    """Return everything wrong with a recipe or base; warnings are added to the document.

    Args:
        expected: the kind that was asked for; another kind is the only error then.
    """
    if expected and document.kind.name != expected:
        return [_wrong_kind(document, expected)]
    found: dict[KeyPath, RecipeError] = {}
    found.update(find_credentials(document))
    for error in _validator(document.kind.name).iter_errors(document.values):
        for path, translated in _translate(document, error):
            found.setdefault(path, translated)
    for path, translated in check_combinations(document):
        if not any(known[: len(path)] == path for known in found):
            found[path] = translated
    unread = [problem.what for problem in document.problems]  # a value that could not be read: its stand-in says nothing
    errors = (error for path, error in found.items() if not any(what.startswith(f"{_dotted(path)}: ") for what in unread))
    return [*document.problems, *errors]


def check_flat(document: Document, full: bool = False) -> list[RecipeError]:
    """A flat TRL file is legal YAML, but nothing here runs it."""
    del full
    return [_wrong_kind(document, "recipe")]


def _wrong_kind(document: Document, expected: str) -> RecipeError:
    """Return the error for a file of another kind than was asked for."""
    wanted = kind_named(expected)
    what = f"is {document.kind.title}" + ("" if document.kind.title.endswith("recipe") else f", not {wanted.title if wanted else expected}")
    return RecipeError(what, document.kind.use, file=document.file)


@lru_cache(maxsize=2)
def _validator(kind: str) -> Draft202012Validator:
    """Return the validator of recipes or of bases."""
    schema = load_schema()
    return strict_validator(schema if kind == "recipe" else schema["$defs"]["document"])


def strict_validator(schema: dict[str, Any]) -> Draft202012Validator:
    """Return a validator of a schema for which a bool is no number, 4.0 is no integer, and numbers are finite."""
    from jsonschema import Draft202012Validator, validators

    def is_integer(_: Any, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def is_number(_: Any, value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    checker = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": is_integer, "number": is_number})
    return validators.extend(Draft202012Validator, type_checker=checker)(schema)


def _translate(document: Document, error: ValidationError, above: KeyPath = ()) -> list[tuple[KeyPath, RecipeError]]:
    """Turn one error of jsonschema into ours, each with its key path.

    Args:
        above: path of the value that was validated, where that is not the whole document.
    """
    path: KeyPath = (*above, *error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {})
        unknown = [(*path, key) for key in error.instance if key not in known]
        inside = [pair for key in unknown for pair in _inside_renamed(document, key, error.instance[key[-1]])]
        return [(key, _unknown_key(document, key, list(known))) for key in unknown] + inside
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        return [((*path, key), _missing(document, (*path, key))) for key in missing]
    inner = [context for context in error.context or () if len(context.absolute_path) > len(error.absolute_path)]
    if inner:
        return [pair for context in inner for pair in _translate(document, context, above)]
    return [(path, wrong_value(document, path, error))]


def _inside_renamed(document: Document, path: KeyPath, value: Any) -> list[tuple[KeyPath, RecipeError]]:
    """Return what is wrong inside a mapping whose key was renamed, so that it need not be found in a second round."""
    rename = RENAMES.get(str(path[-1]))
    schema = subschema(*rename.new.split(".")) if rename and rename.new and isinstance(value, dict) else None
    found = _validator("base").evolve(schema=schema).iter_errors(value) if schema else ()
    return [pair for problem in found for pair in _translate(document, problem, path)]


def _missing(document: Document, path: KeyPath) -> RecipeError:
    """Return the error for a required key that nobody wrote."""
    needs = {"model": "model.name_or_path", "data": "data.source"}
    what = f"section '{path[0]}' is missing; it needs {needs[str(path[0])]}" if len(path) == 1 else f"{_dotted(path)} is missing"
    return document.error(path, what, f"what it is: recipes explain {needs.get(str(path[-1]), _dotted(path))}")


def _unknown_key(document: Document, path: KeyPath, known: list[str]) -> RecipeError:
    """Return the error for a key that does not exist here: moved, renamed, misspelt, or in the wrong section."""
    key, dotted = str(path[-1]), _dotted(path)
    plain = key.replace("-", "_")
    section = str(path[0]) if len(path) > 1 else ""
    reason = NOT_IN_RECIPES.get(section, {}).get(plain) if len(path) == 2 else None
    if reason:
        return document.error(path, f"'{dotted}' cannot be set in a recipe", reason)
    if plain in RENAMES and len(path) <= 2:
        rename = RENAMES[plain]
        migrate = "a whole old file: recipes migrate OLD.yaml --output NEW.yaml"
        return document.error(path, rename.message(dotted), *([rename.note] if rename.note else []), migrate)
    if len(path) == 1:
        return document.error(path, f"unknown section '{key}'", *_section_hint(plain))
    everything = f"all keys: recipes explain {_dotted(path[:-1])}"
    if plain in known or near_names(plain, known):
        return document.error(path, f"unknown key '{dotted}'", *did_you_mean(plain, known, f"{_dotted(path[:-1])}."), everything)
    elsewhere = dotted_names(plain)
    if any(name.rpartition(".")[2] == plain for name in elsewhere):
        return document.error(path, f"unknown key '{dotted}'", f"{plain} belongs to {elsewhere[0].partition('.')[0]}: write {elsewhere[0]}")
    return document.error(path, f"unknown key '{dotted}'", *(f"did you mean {name}?" for name in elsewhere[:1]), everything)


def _section_hint(key: str) -> list[str]:
    """Return hints for an unknown top-level key."""
    misspelt = did_you_mean(key, SECTIONS)
    if misspelt:
        return misspelt
    homes = [name for name in dotted_names(key) if key in name]
    return [f"it belongs to {homes[0].partition('.')[0]}: write {homes[0]}"] if homes else [f"sections: {', '.join(SECTIONS)}"]


def wrong_value(document: Document, path: KeyPath, error: ValidationError) -> RecipeError:
    """Return the error for a value of the wrong type or outside the choices."""
    schema, value = error.schema, error.instance
    if not path:
        return RecipeError("holds no mapping", file=document.file)
    if len(path) == 1:
        return document.error(
            path, f"section '{path[0]}' must be a mapping of keys, got {shown(value)}", f"all keys: recipes explain {path[0]}"
        )
    choices = _choices(schema)
    hints = []
    if isinstance(value, str):
        short = _SHORT_NAMES.get(value)
        hints = [f"use {short}"] if short in choices else did_you_mean(value, [choice for choice in choices if isinstance(choice, str)])
        if _is_quoted_number(value, schema):
            hints = [f"remove the quotes: {value}"]
    spelling = {False: "no", True: "yes"}.get(value) if isinstance(value, bool) else None
    if spelling in choices:
        hints.append(
            f'a plain {spelling} is read as {shown(value)}; quote it: "{spelling}" (on the command line: {_dotted(path)}=\'"{spelling}"\')'
        )
    if len(choices) > _MOST_CHOICES:
        hints.append(f"all {len(choices)} choices: recipes explain {_dotted(path)}")
    return document.error(path, f"{_dotted(path)} must be {describe(schema)}, got {shown(value)}", *hints)


def _is_quoted_number(text: str, schema: dict[str, Any]) -> bool:
    """Whether a number is wanted and the text is one."""
    types = schema.get("type", [])
    wanted = {"number", "integer"}.isdisjoint([types] if isinstance(types, str) else types)
    try:
        return (not wanted and math.isfinite(float(text))) or any(_is_quoted_number(text, part) for part in schema.get("anyOf", ()))
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
        return ("one of " if len(choices) > 1 else "") + ", ".join(str(shown(choice)).strip("'") for choice in choices)
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    bounds = " and ".join(f"{sign} {schema[word]}" for word, sign in _BOUNDS.items() if word in schema)
    words = []
    for name in types:
        word = "null" if name == "null" else _TYPES[name]
        if name == "array" and isinstance(schema.get("items"), dict) and schema["items"].get("type") == "string":
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


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
