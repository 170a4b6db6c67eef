"""The text of a new recipe: it extends an existing one and writes out the values people change, or
stands for itself, for any model.

How often is validated and saved is written as a share of the training where the rows are somebody's
own: the steps of the recipe it starts from were chosen for other rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.config.learning_rates import LORA_ALPHA, RANK, lora_rate
from recipes_lib.config.loader import MAX_LEVELS, load_document
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import MAX_LENGTH, OwnRows
from recipes_lib.config.yaml_text import join_lines, yaml_lines
from recipes_lib.core.project import project_root, shown_path

EVAL_SHARE, SAVE_SHARE = 0.2, 0.05
_REMARKS = {
    "model.name_or_path": "the base model: a Hub id or a local folder",
    "data.encoding": "a guess: the file is not UTF-8. Look at its letters with recipes data",
    "data.source": "your rows: a file or folder (relative to this file) or a Hub id",
    "lora.r": "rank of the adapter; keep lora_alpha / r when you change it",
    "train.learning_rate": "a LoRA usually wants 1e-4 to 3e-4, full fine-tuning a tenth of that",
    "train.num_train_epochs": "passes over the data",
    "train.max_steps": "off: the epochs decide; the recipe this starts from stops early",
    "train.max_length": "longer examples lose their tail",
    "train.eval_steps": "validate after these steps; a number below 1 is a share of the training",
    "train.save_steps": (
        "save a checkpoint after these steps; a number below 1 is a share of the training"
    ),
    "train.completion_only_loss": "these rows are one text each: the loss is on all of it",
    "run.global_batch_size": "examples per optimizer step over all processes",
}
_OF_A_MODEL = {
    "data.chat_template": "the base model has none: the one of its family",
    "lora.r": "with lora_alpha 32, what most rates of that sweep were measured with",
    "lora.target_modules": "every linear layer; routers and heads are left out",
    "train.eos_token": "what ends a turn in the chat template",
    "train.activation_checkpointing": "true fits smaller cards, and computes the same",
    "train.completion_only_loss": "prompts are read, not learned",
}
_NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
_SHARDED = {"bnb_4bit_quant_storage": "bfloat16"}  # FSDP shards one floating type


def new_recipe(name: str, target: Path, origin: Recipe, rows: OwnRows | None) -> str:
    """Return the text of a recipe called `name` that starts from `origin` and will lie at `target`.

    Args:
        rows: the user's own rows, or None to keep the data of `origin`.
    """
    extended = load_document(origin.path).levels < MAX_LEVELS
    values = _values(name, target, origin, rows, {} if extended else origin.written_values())
    extends, file = _beside(target, origin.path), shown_path(target)
    config = f"accelerate_configs/{origin.launch.accelerate}.yaml"
    head = [
        (
            f"# {name}: starts from {extends}; what is not written here comes from there (recipes"
            f" show {file})"
        ),
        f"#   accelerate launch --config_file {config} -m recipes_lib.train {file}",
        *([f"extends: {extends}"] if extended else []),
    ]
    return _text(target, head, values, _REMARKS)


def schema_line(target: Path) -> str:
    """Return the first line of a recipe at `target`, by which editors find its schema."""
    schema = _beside(target, project_root() / "schema" / "recipe.schema.json")
    return f"# yaml-language-server: $schema={schema}"


def _beside(target: Path, file: Path) -> str:
    """Return the path of a file as one that will lie at `target` must write it."""
    return Path(os.path.relpath(file.resolve(), target.resolve().parent)).as_posix()


def _text(target: Path, head: list[str], values: dict[str, Any], remarks: dict[str, str]) -> str:
    lines = yaml_lines(values, lambda path: remarks.get(".".join(map(str, path)), ""))
    return "\n".join([schema_line(target), *head, join_lines(lines), ""])


@dataclass(frozen=True)
class Setup:
    """What of a recipe for a model follows from the model, the rows and the card.

    Args:
        chat_template: for a base model without one: `trl:NAME`, and `eos_token` the end of its
            turns.
        quantized: whether the base is loaded in 4 bits.
        checkpointing: whether activations are computed twice.
        gpus: processes, each with a card of its own; several share the model (FSDP).
        plan: what was planned for which card, in words; empty where it could not be.
    """

    chat_template: str | None = None
    eos_token: str | None = None
    batch: int = 16
    epochs: int = 3
    length: int = MAX_LENGTH
    quantized: bool = False
    checkpointing: bool = False
    per_device: int = 4
    accelerate: str = "single_gpu"
    gpus: int = 1
    plan: str = ""


def batch_and_epochs(num_rows: int) -> tuple[int, int]:
    """Return examples per step and passes over the data: about 100 steps or more, however few rows.

    Example:
        >>> batch_and_epochs(400), batch_and_epochs(15_000), batch_and_epochs(900_000)
        ((16, 3), (32, 2), (128, 1))
    """
    if num_rows < 2_000:
        return 16, 3
    if num_rows < 20_000:
        return 32, 2
    return (64 if num_rows < 100_000 else 128), 1


def recipe_for_model(name: str, target: Path, model: str, rows: OwnRows, setup: Setup) -> str:
    """Return the text of a recipe that trains an adapter for `model` on somebody's rows."""
    chat = "chat" in rows.prompt_formats
    section: dict[str, Any] = {
        "source": _beside(target, rows.file),
        "prompt_format": "chat" if chat else rows.prompt_formats[0],
        **rows.keys,
    }
    if chat and setup.chat_template:
        section["chat_template"] = setup.chat_template
    rate = lora_rate(model)
    train = {
        "num_train_epochs": setup.epochs,
        "per_device_train_batch_size": setup.per_device,
        "learning_rate": rate.value,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.03,
        "optim": "adamw_torch_fused",
        "max_length": setup.length,
        "completion_only_loss": None if rows.whole_text else True,
        "bf16": True,
        "activation_checkpointing": setup.checkpointing,
        "eval_strategy": "steps",
        "eval_steps": EVAL_SHARE,
        "save_steps": SAVE_SHARE,
        "logging_steps": 5,
    }
    if chat and setup.eos_token:
        train["eos_token"] = setup.eos_token
    launch: dict[str, Any] = {"accelerate": setup.accelerate}
    values = {
        "model": {"name_or_path": model, "dtype": "bfloat16"},
        "data": {**section, "split": {"validation": 0.05, "test": 0.05}},
        **(
            {"quantization": _NF4 | (_SHARDED if setup.gpus > 1 else {})} if setup.quantized else {}
        ),
        "lora": {"r": RANK, "lora_alpha": LORA_ALPHA, "target_modules": "all-linear"},
        "train": train,
        "run": {"name": name, "global_batch_size": setup.batch, "tags": []},
        "launch": launch | ({"gpus": setup.gpus} if setup.gpus > 1 else {}),
    }
    remarks = _REMARKS | _OF_A_MODEL | {"train.learning_rate": rate.because}
    if rows.whole_text:
        remarks.pop("train.completion_only_loss", None)
    head = [
        f"# {name}: an adapter for {model}{f'. {setup.plan}' if setup.plan else ''}",
        f"#   recipes train {shown_path(target)}",
    ]
    return _text(target, head, values, remarks)


def _values(
    name: str, target: Path, origin: Recipe, rows: OwnRows | None, values: dict[str, Any]
) -> dict[str, Any]:
    """Return the values the new file writes: `values`, and those people change."""
    values["model"] = {**values.get("model", {}), "name_or_path": origin.model.name_or_path}
    section: dict[str, Any] = {**values.get("data", {}), "source": _source(target, origin, rows)}
    if rows is not None:
        if origin.data.prompt_format not in rows.prompt_formats:
            section["prompt_format"] = rows.prompt_formats[0]
        section |= rows.keys
    values["data"] = section
    if origin.lora is not None:
        values["lora"] = {
            **values.get("lora", {}),
            "r": origin.lora.get("r", 8),
            "lora_alpha": origin.lora.get("lora_alpha", 8),
        }
    train = {
        key: origin.train.get(key, default)
        for key, default in (("learning_rate", 2e-5), ("num_train_epochs", 3))
    }
    train |= _scaled(origin.train, rows)
    if rows is not None and rows.whole_text and origin.train.get("completion_only_loss"):
        train["completion_only_loss"] = None
    values["train"] = {**values.get("train", {}), **train}
    batch = origin.run.global_batch_size or origin.train.get(
        "per_device_train_batch_size", 8
    ) * origin.train.get("gradient_accumulation_steps", 1)
    values["run"] = {"name": name, "global_batch_size": batch, "tags": []}
    return values


def _scaled(train: dict[str, Any], rows: OwnRows | None) -> dict[str, Any]:
    """Return how often is validated and saved and where rows are cut: as the origin has it, for own
    rows by their number and length.

    Args:
        train: the origin's section.
    """
    length, validated = (
        train.get("max_length", MAX_LENGTH),
        train.get("eval_strategy", "no") == "steps",
    )
    saved = train.get("save_strategy", "steps") == "steps"
    if rows is None:
        values = {
            "max_length": length,
            "eval_steps": train.get("eval_steps"),
            "save_steps": train.get("save_steps", 500),
        }
    else:
        each = (
            EVAL_SHARE if validated and train.get("load_best_model_at_end") else SAVE_SHARE
        )  # the best is chosen among checkpoints
        values = {
            "max_length": length and max(length, rows.max_length or 0),
            "eval_steps": EVAL_SHARE,
            "save_steps": each,
        }
        if train.get("max_steps", -1) > 0:
            values["max_steps"] = -1
    wanted = {"eval_steps": validated and values["eval_steps"] is not None, "save_steps": saved}
    return {key: value for key, value in values.items() if wanted.get(key, True)}


def _source(target: Path, origin: Recipe, rows: OwnRows | None) -> Any:
    """Return `data.source` as the new file must write it: local paths relative to its own
    folder.
    """
    if rows is not None:
        return _beside(target, rows.file)
    source = origin.data.source
    if isinstance(source, str) and Path(source).exists() and "source" in origin.as_written:
        return _beside(target, Path(source))
    return origin.as_written.get("source", source)
