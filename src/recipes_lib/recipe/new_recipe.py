"""The text of a new recipe: it extends an existing one and writes out the six values people change."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes_lib.errors import DataError
from recipes_lib.recipe.project import project_root, shown_path
from recipes_lib.recipe.recipe import Recipe
from recipes_lib.recipe.yaml_text import join_lines, yaml_lines

_REMARKS = {
    "model.name_or_path": "the base model: a Hub id or a local folder",
    "data.source": "your rows: a file or folder (relative to this file) or a Hub id",
    "lora.r": "rank of the adapter; keep lora_alpha / r when you change it",
    "train.learning_rate": "a LoRA usually wants 1e-4 to 3e-4, full fine-tuning a tenth of that",
    "train.num_train_epochs": "passes over the data",
    "run.global_batch_size": "examples per optimizer step over all processes",
}
# Names that files use for ours, best first.
_SYNONYMS = {
    "instruction": ("instruction", "question", "query", "input_text"),
    "response": ("response", "output", "answer", "completion", "target"),
    "context": ("context", "input"),
}


@dataclass(frozen=True)
class Rows:
    """What the first row of a data file tells: which prompt formats can read it (none: not known), and our names for its columns."""

    prompt_formats: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)


def new_recipe(name: str, target: Path, origin: Recipe, data: Path | None) -> str:
    """Return the text of a recipe called `name` that starts from `origin` and will lie at `target`.

    Args:
        data: the user's data file, or None to keep the data of `origin`.

    Raises:
        DataError: the file cannot be read, or its columns are not understood.
    """
    values = _values(name, target, origin, data)
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


def _values(name: str, target: Path, origin: Recipe, data: Path | None) -> dict[str, Any]:
    """Return the values the new file writes."""
    values: dict[str, Any] = {} if _may_be_extended(origin) else origin.written_values()
    values["model"] = {**values.get("model", {}), "name_or_path": origin.model.name_or_path}
    section: dict[str, Any] = {**values.get("data", {}), "source": _source(target, origin, data)}
    if data is not None:
        rows = first_row(data)
        if rows.prompt_formats and origin.data.prompt_format not in rows.prompt_formats:
            section["prompt_format"] = rows.prompt_formats[0]
        if rows.columns:
            section["columns"] = rows.columns
    values["data"] = section
    if origin.lora is not None:
        values["lora"] = {**values.get("lora", {}), "r": origin.lora.get("r", 8), "lora_alpha": origin.lora.get("lora_alpha", 8)}
    train = {key: origin.train.get(key, default) for key, default in (("learning_rate", 2e-5), ("num_train_epochs", 3))}
    values["train"] = {**values.get("train", {}), **train}
    batch = origin.run.global_batch_size or origin.train.get("per_device_train_batch_size", 8) * origin.train.get(
        "gradient_accumulation_steps", 1
    )
    values["run"] = {"name": name, "global_batch_size": batch, "tags": []}
    return values


def _may_be_extended(origin: Recipe) -> bool:
    """Whether another level of `extends` is allowed: the origin itself uses at most one."""
    return origin.levels < 2


def _source(target: Path, origin: Recipe, data: Path | None) -> Any:
    """Return `data.source` as the new file must write it: local paths relative to its own folder."""
    if data is not None:
        return Path(os.path.relpath(data.resolve(), target.resolve().parent)).as_posix()
    source = origin.data.source
    if isinstance(source, str) and (origin.base_dir / source).exists() and not Path(source).is_absolute():
        return Path(os.path.relpath((origin.base_dir / source).resolve(), target.resolve().parent)).as_posix()
    return source


def first_row(data: Path) -> Rows:
    """Guess from the first row how to read a data file.

    Formats that need a library to read (parquet, arrow, folders) are left to `data.columns`.

    Raises:
        DataError: no such file, no row, or columns that mean nothing to us.
    """
    if data.is_dir() or data.suffix not in (".jsonl", ".json", ".csv", ".tsv"):
        if not data.exists():
            raise DataError("no such file", file=data)
        return Rows()
    row = _read_first(data)
    for prompt_formats, needed in ((("chat",), {"messages"}), (("raw", "chat"), {"prompt", "completion"}), (("raw",), {"text"})):
        if needed <= row.keys() and "response" not in row:
            return Rows(prompt_formats)
    if "conversations" in row:
        return Rows(("chat",), {"messages": "conversations"})
    columns = {ours: next((name for name in names if name in row), "") for ours, names in _SYNONYMS.items()}
    if not columns["instruction"] or not columns["response"]:
        what = f"columns {', '.join(row)} are not understood"
        raise DataError(what, "rename them, or start without --data and set data.source and data.columns yourself", file=data, line=1)
    return Rows(("dolly", "alpaca", "chat"), {ours: name for ours, name in columns.items() if name and name != ours})


def _read_first(data: Path) -> dict[str, Any]:
    """Return the first row of a jsonl, json or csv file."""
    try:
        with data.open(encoding="utf-8-sig", newline="") as stream:
            if data.suffix == ".jsonl":
                row = json.loads(next((line for line in stream if line.strip()), "null"))
            elif data.suffix == ".json":
                rows = json.load(stream)
                row = rows[0] if isinstance(rows, list) and rows else None
            else:
                row = next(csv.DictReader(stream, delimiter="\t" if data.suffix == ".tsv" else ","), None)
    except FileNotFoundError:
        raise DataError("no such file", file=data) from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {str(error).splitlines()[0]}", file=data) from None
    if not isinstance(row, dict) or not row:
        raise DataError("has no row with named columns", file=data)
    return row
