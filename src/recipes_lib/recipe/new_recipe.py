"""The text of a new recipe: it extends an existing one and writes out the six values people change."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes_lib.recipe.project import project_root, shown_path
from recipes_lib.recipe.recipe import Recipe
from recipes_lib.recipe.yaml_text import join_lines, yaml_lines

_REMARKS = {
    "model.name_or_path": "the base model: a Hub id or a local folder",
    "data.source": "your rows: a file or folder (relative to this file) or a Hub id",
    "lora.r": "rank of the adapter; keep lora_alpha / r when you change it",
    "train.learning_rate": "a LoRA usually wants 1e-4 to 3e-4, full fine-tuning a tenth of that",
    "train.num_train_epochs": "passes over the data",
    "train.completion_only_loss": "these rows are one text each: the loss is on all of it",
    "run.global_batch_size": "examples per optimizer step over all processes",
}


@dataclass(frozen=True)
class Rows:
    """How somebody's data file is to be read.

    Args:
        file: the file or folder.
        prompt_formats: those that can read its rows, best first.
        columns: our name -> the file's, where they differ.
        whole_text: whether a row is one text, so that no completion can carry the loss alone.
        delimiter: between the columns of a text file, where its ending does not tell.
    """

    file: Path
    prompt_formats: tuple[str, ...]
    columns: dict[str, str] = field(default_factory=dict)
    whole_text: bool = False
    delimiter: str | None = None


def new_recipe(name: str, target: Path, origin: Recipe, rows: Rows | None) -> str:
    """Return the text of a recipe called `name` that starts from `origin` and will lie at `target`.

    Args:
        rows: the user's own rows, or None to keep the data of `origin`.
    """
    values = _values(name, target, origin, rows)
    folder = target.resolve().parent
    schema = Path(os.path.relpath(project_root() / "schema" / "recipe.schema.json", folder)).as_posix()
    launch = f"accelerate launch --config_file accelerate_configs/{origin.launch.accelerate}.yaml -m recipes_lib.train {shown_path(target)}"
    lines = yaml_lines(values, lambda path: _REMARKS.get(".".join(map(str, path)), ""))
    extends = Path(os.path.relpath(origin.path.resolve(), folder)).as_posix()
    head = [
        f"# yaml-language-server: $schema={schema}",
        f"# {name}: starts from {extends}; what is not written here comes from there (recipes show {shown_path(target)})",
        f"#   {launch}",
        *([f"extends: {extends}"] if _may_be_extended(origin) else []),
    ]
    return "\n".join([*head, join_lines(lines), ""])


def _values(name: str, target: Path, origin: Recipe, rows: Rows | None) -> dict[str, Any]:
    """Return the values the new file writes."""
    values: dict[str, Any] = {} if _may_be_extended(origin) else origin.written_values()
    values["model"] = {**values.get("model", {}), "name_or_path": origin.model.name_or_path}
    section: dict[str, Any] = {**values.get("data", {}), "source": _source(target, origin, rows)}
    if rows is not None:
        if origin.data.prompt_format not in rows.prompt_formats:
            section["prompt_format"] = rows.prompt_formats[0]
        if rows.columns:
            section["columns"] = rows.columns
        if rows.delimiter:
            section["delimiter"] = rows.delimiter
    values["data"] = section
    if origin.lora is not None:
        values["lora"] = {**values.get("lora", {}), "r": origin.lora.get("r", 8), "lora_alpha": origin.lora.get("lora_alpha", 8)}
    train = {key: origin.train.get(key, default) for key, default in (("learning_rate", 2e-5), ("num_train_epochs", 3))}
    if rows is not None and rows.whole_text and origin.train.get("completion_only_loss"):
        train["completion_only_loss"] = None
    values["train"] = {**values.get("train", {}), **train}
    batch = origin.run.global_batch_size or origin.train.get("per_device_train_batch_size", 8) * origin.train.get(
        "gradient_accumulation_steps", 1
    )
    values["run"] = {"name": name, "global_batch_size": batch, "tags": []}
    return values


def _may_be_extended(origin: Recipe) -> bool:
    """Whether another level of `extends` is allowed: the origin itself uses at most one."""
    return origin.levels < 2


def _source(target: Path, origin: Recipe, rows: Rows | None) -> Any:
    """Return `data.source` as the new file must write it: local paths relative to its own folder."""
    if rows is not None:
        return Path(os.path.relpath(rows.file.resolve(), target.resolve().parent)).as_posix()
    source = origin.data.source
    if isinstance(source, str) and (origin.base_dir / source).exists() and not Path(source).is_absolute():
        return Path(os.path.relpath((origin.base_dir / source).resolve(), target.resolve().parent)).as_posix()
    return source
