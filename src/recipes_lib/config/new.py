"""The text of a new recipe that extends another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml

from recipes_lib.config.documents import Values, relative_path
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.project import project_root

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
        values["model"]["name_or_path"] = (
            relative_path(target, folder) if folder.is_dir() else model
        )
        values["data"] |= {"chat_template": None} if origin.data.chat_template else {}
        values["train"] |= {"eos_token": None} if train.get("eos_token") else {}
        values["lora"] |= {"target_modules": "all-linear"} if lora else {}
    if rows is not None:
        file, formats = rows
        values["data"]["source"] = relative_path(target, file)
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
    return f"{schema_line(target)}\nextends: {relative_path(target, origin.path)}\n{text}"


def schema_line(target: Path) -> str:
    """Return the first line of a recipe at `target`, by which editors find its schema."""
    schema = project_root() / "schema/recipe.schema.json"
    return f"# yaml-language-server: $schema={relative_path(target, schema)}"
