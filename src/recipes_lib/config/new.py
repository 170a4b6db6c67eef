"""The text of a new recipe: it extends an existing one and writes out what is different."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import yaml

from recipes_lib.config.documents import Values
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import OwnRows
from recipes_lib.core.project import project_root, shown_path

Method = Literal["lora", "qlora", "full"]
_NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "bfloat16",  # FSDP shards one floating type
}


def new_recipe(
    name: str,
    target: Path,
    origin: Recipe,
    *,
    model: str | None = None,
    rows: OwnRows | None = None,
    method: Method | None = None,
) -> str:
    """Return the text of a recipe called `name` that extends `origin` and will lie at `target`.

    Args:
        model: another base model: what the origin says for its own (template, layers) is undone.
        rows: the user's own rows. Validations and checkpoints become shares of the training: the
            origin's steps were chosen for other rows.
        method: what is trained. Between adapter and full, the learning rate changes by ten.
    """
    values: Values = {"model": {}, "quantization": {}, "lora": {}, "data": {}, "train": {}}
    train, lora = origin.train, origin.lora
    if model is not None:
        values["model"]["name_or_path"] = model
        if origin.data.chat_template:
            values["data"]["chat_template"] = None
        if train.get("eos_token"):
            values["train"]["eos_token"] = None
        if lora is not None and lora.get("target_modules") != "all-linear":
            values["lora"]["target_modules"] = "all-linear"
    if rows is not None:
        values["data"]["source"] = _relative(target, rows.file)
        if origin.data.prompt_format not in rows.prompt_formats:
            values["data"]["prompt_format"] = rows.prompt_formats[0]
        if train.get("max_steps", -1) > 0:
            values["train"]["max_steps"] = -1
        if train.get("eval_strategy") == "steps":
            values["train"]["eval_steps"] = 0.2
        if train.get("save_strategy", "steps") == "steps":
            # the best model is chosen among checkpoints
            values["train"]["save_steps"] = 0.2 if train.get("load_best_model_at_end") else 0.05
        if rows.prompt_formats == ("raw",) and train.get("completion_only_loss"):
            values["train"]["completion_only_loss"] = None
    if method is not None:
        if method == "full":
            values["lora"] = None
        elif lora is None:
            values["lora"] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
        if method == "qlora":
            values["quantization"] = origin.quantization or dict(_NF4)
        elif origin.quantization is not None:
            values["quantization"] = None
        if (lora is None) != (method == "full") and (rate := train.get("learning_rate")):
            values["train"]["learning_rate"] = float(f"{rate * (10 if lora is None else 0.1):.3g}")
    values["run"] = {"name": name, "tags": []}
    written = {key: value for key, value in values.items() if value is None or value}
    extends = _relative(target, origin.path)
    about = f"# {name}: starts from {extends}. All values: recipes show {shown_path(target)}"
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True)
    return f"{schema_line(target)}\n{about}\nextends: {extends}\n{text}"


def schema_line(target: Path) -> str:
    """Return the first line of a recipe at `target`, by which editors find its schema."""
    schema = project_root() / "schema/recipe.schema.json"
    return f"# yaml-language-server: $schema={_relative(target, schema)}"


def _relative(target: Path, file: Path) -> str:
    """Return the path of a file as one that will lie at `target` must write it."""
    return Path(os.path.relpath(file.resolve(), target.resolve().parent)).as_posix()
