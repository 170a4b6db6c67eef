"""Which keys exist (lookups in the committed JSON Schema), what became of those that upstream
renamed or removed, and what flat configs call them.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, cast

from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.kinds import SECTIONS
from recipes_lib.config.suggestions import near_names
from recipes_lib.config.upstream import RENAMES
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root


@lru_cache(maxsize=8)
def load_schema(kind: str = "recipe") -> JsonSchema:
    """Return the committed JSON Schema of a kind of file: recipe, eval or judge.

    Raises:
        RecipeError: the schema folder is not there.
    """
    path = project_root() / "schema" / f"{kind}.schema.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path} is missing", "write it with: make schema") from None


def subschema(*keys: str) -> JsonSchema | None:
    """Return the schema of a key such as `subschema("train", "learning_rate")`, or None if there is
    no such key.

    Keys of eval recipes follow `eval`, as in `subschema("eval", "generation", "temperature")`.
    """
    if keys[:1] == ("eval",):
        keys, found = keys[1:], load_schema("eval")
    else:
        found = load_schema()
    schema: JsonSchema | None = found
    for key in keys:
        schema = _resolved(found, schema or {}).get("properties", {}).get(key)
    return None if schema is None else _resolved(found, schema)


def _resolved(root: JsonSchema, schema: JsonSchema) -> JsonSchema:
    """Return a schema without references to `$defs`; of a section that may be null, the section."""
    words: dict[str, Any] = dict(schema)
    parts = [part for part in words.get("anyOf", []) if part.get("$ref")]
    reference = words.get("$ref") or (parts[0]["$ref"] if len(parts) == 1 else None)
    if reference is None:
        return schema
    whole: dict[str, Any] = dict(root)
    inner = dict(whole["$defs"][reference.rpartition("/")[2]])
    return cast(JsonSchema, {**inner, **{key: words[key] for key in words if key[0] not in "$a"}})


def section_keys(*path: str) -> list[str]:
    """Return the keys of a section, or the sections themselves."""
    return list((subschema(*path) or {}).get("properties", {}))


def dotted_names(word: str) -> list[str]:
    """Return the dotted keys a bare word such as `learning_rate` or `--lora-r` may stand for:
    exact, renamed, or the nearest.

    Example:
        >>> dotted_names("learning_rate")
        ['train.learning_rate']
    """
    plain = word.lstrip("-").rpartition(".")[2].replace("-", "_")
    if plain in RENAMES:
        return [f"train.{RENAMES[plain]}"]
    exact = [f"{section}.{plain}" for section in SECTIONS if plain in section_keys(section)]
    if exact:
        return exact
    everywhere = {key: section for section in reversed(SECTIONS) for key in section_keys(section)}
    return [f"{everywhere[near]}.{near}" for near in near_names(plain, everywhere)]


SHORT_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
