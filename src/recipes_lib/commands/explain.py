"""recipes explain: what a key means, its type and default; a section's keys; the sections."""

from __future__ import annotations

import argparse
import shutil
import textwrap

from recipes_lib.config.constraints import NOT_IN_RECIPES
from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.kinds import SECTIONS
from recipes_lib.config.sections import TRAIN_DEFAULTS
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.validation import describe
from recipes_lib.config.vocabulary import RENAMES, dotted_names, section_keys, subschema
from recipes_lib.config.yaml_text import value_text
from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.core.terminal import next_step, say

_CLASS = {
    "train": "trl.SFTConfig",
    "lora": "peft.LoraConfig",
    "quantization": "transformers.BitsAndBytesConfig",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    what = "train.learning_rate, a section such as train, or nothing for the sections"
    parser.add_argument("key", metavar="KEY", nargs="?", help=what)


def run(args: argparse.Namespace) -> int:
    """Print what is known about a key.

    Raises:
        RecipeError: there is no such key.
    """
    if args.key is None:
        _list("", list(SECTIONS))
        next_step("recipes explain train")
        return ExitCode.DONE
    key = _full_name(args.key)
    keys = section_keys(*key.split("."))
    schema = subschema(*key.split(".")) or {}
    if keys:
        say(f"{key}: {schema.get('description', '')}")
        _list(f"{key}.", keys)
        next_step(f"recipes explain {key}.{keys[0]}")
    else:
        _explain(key, schema)
        next_step(f"recipes explain {key.rpartition('.')[0]}")
    return ExitCode.DONE


def _full_name(key: str) -> str:
    """Return the dotted name of a key, completed where only one section has it.

    Raises:
        RecipeError: no such key; says what it was renamed to, why it is not there, or what is near.
    """
    plain = key.replace("-", "_")
    if subschema(*plain.split(".")) is not None:
        return plain
    section, _, name = plain.rpartition(".")
    if name in RENAMES:
        rename = RENAMES[name]
        now = f"recipes explain {rename.new}" if rename.new else ""
        raise RecipeError(rename.message(key), *filter(None, (rename.note, now)))
    reasons = [
        f"{home}.{name}: {words[name]}"
        for home, words in NOT_IN_RECIPES.items()
        if name in words and section in ("", home)
    ]
    if reasons:
        raise RecipeError(f"'{key}' is not a recipe's business", *reasons)
    near = dotted_names(name) if not section or section not in SECTIONS else []
    if not section and len(near) == 1 and near[0].rpartition(".")[2] == name:
        return near[0]
    hints = [f"did you mean {' or '.join(near)}?"] if near else []
    if section and not near:
        hints = did_you_mean(name, section_keys(*section.split(".")), f"{section}.")
    known = f"all keys: recipes explain {section if section in SECTIONS else ''}".rstrip()
    raise RecipeError(f"there is no key '{key}'", *hints, known)


def _list(prefix: str, keys: list[str]) -> None:
    width = max(len(key) for key in keys)
    room = max(30, shutil.get_terminal_size().columns - width - 5)
    for key in keys:
        text = (subschema(*f"{prefix}{key}".split(".")) or {}).get("description", "")
        short = textwrap.shorten(text, room, placeholder=" ...")
        say(f"  {key:<{width}}  {short}".rstrip())


def _explain(key: str, schema: JsonSchema) -> None:
    section, _, name = key.partition(".")
    choices = schema.get("enum", [])
    say(f"{key}: {describe(schema)}")
    if len(choices) > 1 and "choices" in describe(schema):
        _wrapped(", ".join(str(choice) for choice in choices if choice is not None))
    default = TRAIN_DEFAULTS.get(name) if section == "train" else None
    if default:
        why = f"project default, not TRL's: {default.reason}"
        _wrapped(f"default {value_text(default.value)} ({why})")
    elif "default" in schema:
        upstream = f" ({_CLASS[section]})" if section in _CLASS else ""
        _wrapped(f"default {value_text(schema['default'])}{upstream}")
    _wrapped(schema.get("description", "no documentation upstream"))


def _wrapped(text: str) -> None:
    """Print an indented paragraph that fits the terminal."""
    width = min(120, max(40, shutil.get_terminal_size().columns))
    lines = textwrap.wrap(text, width - 2, break_on_hyphens=False)
    say("\n".join(f"  {line}" for line in lines))
