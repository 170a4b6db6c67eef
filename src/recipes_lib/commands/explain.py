"""`recipes explain`: what a key means, its type and default; a section's keys; the sections."""

from __future__ import annotations

import textwrap
from typing import Annotated

from pydantic.json_schema import JsonSchemaValue

from recipes_lib.config.documents import SECTIONS, did_you_mean, value_text
from recipes_lib.config.recipe import RecipeFile, recipe_keys
from recipes_lib.config.upstream import CLASSES, TRAIN_DEFAULTS
from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.core.terminal import aligned, next_step, say


def run(
    key: Annotated[str, "train.learning_rate, a section such as train, or nothing"] = "",
) -> int:
    """Print what is known about a key."""
    keys = recipe_keys()
    name = _full_name(key) if key else ""
    inner = {key: schema for key, schema in keys.items() if key.rpartition(".")[0] == name}
    if not inner:
        schema, (section, _, word) = keys[name], name.partition(".")
        source = f" ({CLASSES[section]})" if section in CLASSES else ""
        if section == "train" and word in TRAIN_DEFAULTS:
            source = " (project default, not TRL's)"
        say(f"{name}: {_type_text(schema)}")
        if source or "default" in schema:
            say(f"  default {value_text(schema.get('default'))}{source}")
        say(f"  {schema.get('description') or 'no documentation upstream'}")
        return ExitCode.DONE
    if name:
        say(f"{name}: {keys[name].get('description', '')}")
    rows = []
    for key, schema in inner.items():
        text = textwrap.shorten(schema.get("description") or "", 80, placeholder=" ...")
        rows.append([f"  {key.removeprefix(f'{name}.')}", text])
    say("\n".join(aligned(rows)))
    return next_step("recipes", "explain", next(iter(inner)) if name else "train")


def _full_name(word: str) -> str:
    """Return the dotted name of a key, completed if only one section has it."""
    keys, plain = recipe_keys(), word.replace("-", "_")
    ending = [key for key in keys if key == plain or key.endswith(f".{plain}")]
    if plain in keys or len(ending) == 1:
        return plain if plain in keys else ending[0]
    section, _, name = plain.rpartition(".")
    for home in [section] if section in SECTIONS else SECTIONS:
        models = RecipeFile.model_fields[home].annotation
        for model in (models, *getattr(models, "__args__", ())):
            if instead := getattr(model, "gone", {}).get(name):
                raise RecipeError(f"'{home}.{name}' is not a key of recipes", instead)
    hints = [f"did you mean {' or '.join(ending)}?"] if ending else did_you_mean(plain, keys)
    raise RecipeError(f"there is no key '{word}'", *hints, "all keys: recipes explain SECTION")


def _type_text(schema: JsonSchemaValue) -> str:
    """Return what a value must be: `integer >= 1 or null`."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type_text, schema["anyOf"])))
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    words = [f"{sign} {schema[word]:g}" for word, sign in bounds.items() if word in schema]
    kind = {"array": "list", "object": "mapping", "string": "text"}.get(schema.get("type", ""))
    return " ".join([kind or schema.get("type", "any value"), *words])
