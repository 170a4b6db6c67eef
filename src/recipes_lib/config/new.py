"""The text of a new recipe: one that extends another, or what a flat TRL config (ScriptArguments,
ModelConfig and SFTConfig in one mapping) becomes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml

from recipes_lib.config.documents import SECTIONS, Document, Values, read, value_text, wrong_kind
from recipes_lib.config.recipe import QuantizationSection, Recipe
from recipes_lib.config.upstream import RENAMES, LoraSection, TrainSection
from recipes_lib.core.errors import RecipeErrors
from recipes_lib.core.project import project_root
from recipes_lib.core.terminal import is_secret_name

Method = Literal["lora", "qlora", "full"]
_NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "bfloat16",  # FSDP shards one floating type
}
# Key of a flat TRL config -> key of a recipe.
MOVES = {
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "dataset_name": "data.source",
    "dataset_mixture": "data.source",
    "dataset_config": "data.subset",
    "dataset_train_split": "data.source_split",
    "dataset_text_field": "data.columns",
    "chat_template": "data.chat_template",
    "system_prompt": "data.system_prompt",
    "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "run_name": "run.name",
    "output_dir": "run.name",
    **{old: f"train.{new}" for old, new in RENAMES.items()},
}
# TRL's defaults where PEFT's are others. Source: trl.ModelConfig.
LORA_DEFAULTS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}


def new_recipe(
    name: str,
    target: Path,
    origin: Recipe,
    *,
    model: str | None = None,
    rows: tuple[Path, tuple[str, ...]] | None = None,
    method: Method | None = None,
) -> str:
    """Return the text of a recipe called `name` that extends `origin` and will lie at `target`.

    Args:
        rows: the user's own, and the prompt formats that can read them. Steps become shares of the
            training.
    """
    values: Values = {"model": {}, "quantization": {}, "lora": {}, "data": {}, "train": {}}
    train, lora = origin.train, origin.lora
    if model is not None:
        folder = Path(model).expanduser()
        values["model"]["name_or_path"] = _relative(target, folder) if folder.is_dir() else model
        values["data"] |= {"chat_template": None} if origin.data.chat_template else {}
        values["train"] |= {"eos_token": None} if train.get("eos_token") else {}
        values["lora"] |= {"target_modules": "all-linear"} if lora else {}
    if rows is not None:
        file, formats = rows
        values["data"]["source"] = _relative(target, file)
        if origin.data.prompt_format not in formats:
            values["data"]["prompt_format"] = formats[0]
        if formats == ("raw",) and train.get("completion_only_loss"):
            values["train"]["completion_only_loss"] = None
        values["train"] |= {"max_steps": -1, "eval_steps": 0.2, "save_steps": 0.2}
    if method is not None:
        if method == "full":
            values["lora"] = None
        elif lora is None:
            values["lora"] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
        if method == "qlora" or origin.quantization is not None:
            values["quantization"] = (origin.quantization or _NF4) if method == "qlora" else None
        if (lora is None) != (method == "full") and (rate := train.get("learning_rate")):
            values["train"]["learning_rate"] = float(f"{rate * (10 if lora is None else 0.1):.3g}")
    values["run"] = {"name": name, "tags": []}
    written = {key: value for key, value in values.items() if value is None or value}
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True)
    return f"{schema_line(target)}\nextends: {_relative(target, origin.path)}\n{text}"


def schema_line(target: Path) -> str:
    """Return the first line of a recipe at `target`, by which editors find its schema."""
    schema = project_root() / "schema/recipe.schema.json"
    return f"# yaml-language-server: $schema={_relative(target, schema)}"


def _relative(target: Path, file: Path) -> str:
    """Return the path of a file as one that will lie at `target` must write it."""
    return Path(os.path.relpath(file.resolve(), target.resolve().parent)).as_posix()


# Migration: each key moves to its section with its comments, or becomes a comment at the end.


def migrate(path: Path, head: str) -> tuple[str, list[str]]:
    """Return the recipe of a flat TRL config, below `head`, and a line for each change."""
    flat = read(path)
    if flat.kind != "flat":
        raise wrong_kind(flat, "flat")
    if flat.problems:
        raise RecipeErrors(flat.problems)
    texts: dict[str, list[str]] = {}  # key of the recipe -> its lines, with comments
    left, changes = list[str](), list[str]()
    values: Values = {}
    lines = flat.text.split("\n")
    first = min(flat.origin((key,)).line or 0 for key in flat.values)
    above = [line for line in lines[: first - 1] if line.startswith("#")]
    for key, value in flat.values.items():
        own, following = _lines_of(flat, key)
        home, place = home_of(key), flat.origin((key,))
        why = _why_left_out(key, home, flat.values)
        if why or home in texts:
            why = why or "another key of this file already sets it"
            shown = [f"{key}: (not copied)"] if is_secret_name(key) else own
            left += [*above, f"# {why}:", *(f"#   {line}" for line in shown)]
            changes.append(f"{place}: {key} left out; {why}")
        else:
            values[home] = new = _todays(key, value)
            name = home.partition(".")[2]
            if new == value and own[0].startswith(key):
                texts[home] = [*above, f"{name}{own[0].removeprefix(key)}", *own[1:]]
            else:
                comments = [part for line in own for part in re.findall(r"\s(#.*)", line)]
                texts[home] = [*above, *comments, f"{name}: {value_text(new)}"]
            changes.append(f"{place}: {key} -> {home}")
        above = following
    for home, (value, why) in _added(flat.values, values).items():
        if home not in texts:
            texts[home] = [f"# {why}", f"{home.partition('.')[2]}: {value_text(value)}"]
            changes.append(f"added {home}: {value_text(value)}; {why}")
    text = [head]
    for section in SECTIONS:
        inner = [line for key in texts if key.startswith(f"{section}.") for line in texts[key]]
        text += ["", f"{section}:"] if inner else []
        text += [f"  {line}" if line else "" for line in inner]
    text += ["", "# Left out by `recipes migrate`:", *left] if left else []
    return "\n".join([*text, *above]) + "\n", changes


def home_of(key: str) -> str:
    """Return the dotted key of a recipe that a flat key becomes; empty for none."""
    if key in MOVES:
        return MOVES[key]
    if key in TrainSection.model_fields:
        return f"train.{key}"
    if key in QuantizationSection.model_fields:
        return f"quantization.{key}"
    names = (key, key.removeprefix("lora_")) if key.startswith(("lora_", "use_")) else ()
    return next((f"lora.{name}" for name in names if name in LoraSection.model_fields), "")


def _lines_of(flat: Document, key: str) -> tuple[list[str], list[str]]:
    """Return the lines of a key, and the comments between it and the next one."""
    lines, start = flat.text.split("\n"), flat.origin((key,)).line or 0
    starts = [flat.origin((name,)).line or 0 for name in flat.values] + [len(lines) + 1]
    end = min(line for line in starts if line > start)
    own = lines[start - 1 : end - 1]
    size = next(n for n in range(len(own), 0, -1) if n == 1 or own[n - 1][:1] not in ("", "#"))
    return own[:size], [line for line in own[size:] if line]


def _why_left_out(key: str, home: str, flat: Values) -> str:
    loads = flat.get("load_in_4bit") or flat.get("load_in_8bit")
    if is_secret_name(key):
        return "a secret does not belong in a recipe; use hf auth login"
    if home.startswith("lora.") and not flat.get("use_peft"):
        return "TRL ignores it without use_peft"
    if home.startswith("quantization.") and not loads:
        return "nothing is quantized"
    known = {"use_peft": "the section lora replaces it", **TrainSection.gone}
    return "" if home else known.get(key, "a recipe has no such key")


def _todays(key: str, value: Any) -> Any:
    """Return a value in the form that is read today."""
    if key == "dataset_mixture":
        parts = value.get("datasets") if isinstance(value, dict) else value
        return [_source(part) for part in parts] if isinstance(parts, list) else parts
    if key in ("run_name", "output_dir"):
        return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(value)).name).strip("-._")[:100]
    if key == "lora_target_modules":
        return "all-linear" if value == ["all-linear"] else value
    # ffd is the name of bfd before TRL 0.20
    return {"text": value} if key == "dataset_text_field" else "bfd" if value == "ffd" else value


def _source(part: Any) -> Any:
    """Return a part of a mixture of the alignment handbook as one of ours."""
    if not isinstance(part, dict):
        return part
    names = {"id": "source", "config": "subset", "split": "source_split", "weight": "weight"}
    return {ours: part[name] for name, ours in names.items() if part.get(name) not in (None, 1)}


def _added(flat: Values, values: Values) -> dict[str, tuple[object, str]]:
    """Return what TRL fills in where the class behind a section fills in something else, and why:
    by key of the recipe.
    """
    added: dict[str, tuple[object, str]] = {}
    if flat.get("use_peft"):
        why = "TRL's default; PEFT's differs"
        added |= {f"lora.{key}": (value, why) for key, value in LORA_DEFAULTS.items()}
    if flat.get("load_in_4bit"):
        added["quantization.bnb_4bit_quant_type"] = ("nf4", "TRL's default")
        if (dtype := values.get("model.dtype")) in ("bfloat16", "float16", "float32"):
            why = "TRL computes in the model's dtype"
            added["quantization.bnb_4bit_compute_dtype"] = (dtype, why)
    rows = "raw" if "dataset_text_field" in flat else "chat"
    why = "for messages; for prompt and completion write raw, without completion_only_loss"
    added["data.prompt_format"] = (rows, why)
    if rows == "chat" and not flat.get("assistant_only_loss"):
        why = "TRL learns every token of messages; true learns only the answers"
        added["train.completion_only_loss"] = (False, why)
    evaluates = values.get("train.eval_strategy") not in ("no", None)
    split = {"validation": 0.1} if evaluates else {"method": "none"}
    added["data.split"] = (split, "rows are held out only if the config evaluates")
    return added
