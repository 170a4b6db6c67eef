"""A flat TRL config (alignment handbook, open-r1, `trl sft --config`) -> a recipe, comments kept, every change listed.

This module decides what becomes of each key; plain moves stand in `migration_rules`, the text is handled in `migration`. Nothing is
loaded or downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.errors import RecipeError
from recipes_lib.recipe import migration_rules as rules
from recipes_lib.recipe.kinds import foreign_kind
from recipes_lib.recipe.migration import Entry, Migration, cut_into_entries
from recipes_lib.recipe.project import check_run_name
from recipes_lib.recipe.vocabulary import section_keys
from recipes_lib.recipe.yaml_source import read_yaml
from recipes_lib.redaction import is_secret_name


def migrate(path: Path, schema: str, rejected: Mapping[str, str] | None = None) -> Migration:
    """Turn a flat TRL config into a recipe; `text()` of the result is the recipe.

    Args:
        schema: path of the recipe schema as the recipe's first line names it.
        rejected: flat keys whose values the check refuses -> why; they become comments.

    Raises:
        RecipeError: the file is not YAML, is a recipe already, is no supervised fine-tuning config, or names no model or data.
    """
    source = read_yaml(path, str(path))
    if not isinstance(source.values, dict) or not source.values:
        raise RecipeError("is not a flat TRL config: it holds no keys", file=path)
    _refuse_other_kinds(source.values, source.lines, path)
    entries, comments_below = cut_into_entries(source.text, source.values)
    migration = Migration(str(path), entries)
    migration.header = [f"# yaml-language-server: $schema={schema}"]
    first = next(iter(migration.entries.values()))
    migration.header += [line for line in first.comments_above if line]
    first.comments_above = []
    for entry in migration.entries.values():
        _place(migration, entry, rejected or {})
    _complete(migration)
    migration.waiting_comments += comments_below
    return migration


def keys_behind(errors: Sequence[RecipeError], migration: Migration, lines: Mapping[tuple[str | int, ...], int]) -> set[str]:
    """Return the flat keys whose values the errors are about.

    Args:
        lines: the written recipe's key paths and their lines.
    """
    keys = set()
    for error in errors:
        above = [(line, path) for path, line in lines.items() if len(path) >= 2 and line <= (error.line or 0)]
        if above:
            section, key = max(above)[1][:2]
            keys.add(migration.origins.get(f"{section}.{key}", ""))
    return keys - {"", "model_name_or_path", "dataset_name", "dataset_mixture", "dataset_mixer", "datasets"}


def _refuse_other_kinds(values: dict[str, Any], lines: dict[Any, int], path: Path) -> None:
    """Raise for what is not a flat supervised fine-tuning config."""
    if foreign := foreign_kind(values):
        raise RecipeError(f"is {foreign.title}, not a flat TRL config", foreign.use, file=path)
    if {"model", "data", "train", "extends"} & values.keys():
        raise RecipeError("is a recipe already", f"check it: recipes check {path}", file=path)
    others = sorted(rules.OTHER_TRAINERS & values.keys(), key=lambda key: lines.get((key,), 0))
    loss = values.get("loss_type")
    if isinstance(loss, list) or (isinstance(loss, str) and loss in rules.OTHER_LOSSES):
        others.append("loss_type")
    if others:
        what = f"'{others[0]}' belongs to preference tuning, reward models or reinforcement learning, which recipes do not describe"
        raise RecipeError(what, "use TRL's own trainer for it", file=path, line=lines.get((others[0],)))
    for key in ("output_dir", "run_name", "hub_model_id"):
        if named := rules.OTHER_TRAINING.search(str(values.get(key, ""))):
            what = f"'{key}' says {named[1]}, and a recipe describes supervised fine-tuning alone"
            hint = f"use TRL's own trainer for {named[1]}; if this is supervised fine-tuning, give it another {key} and run this again"
            raise RecipeError(what, hint, file=path, line=lines.get((key,)))
    if "model_name_or_path" not in values:
        raise RecipeError("is not a flat TRL config: it has no model_name_or_path", file=path)
    if not {"dataset_name", "dataset_mixer", "dataset_mixture", "datasets"} & values.keys():
        raise RecipeError(
            "names no data: dataset_name, dataset_mixture or dataset_mixer", "add dataset_name: and run this again", file=path
        )


def _place(migration: Migration, entry: Entry, rejected: Mapping[str, str]) -> None:
    """Decide what becomes of one key."""
    key = entry.key
    if key in rejected:
        migration.leave(entry, rejected[key])
    elif is_secret_name(key):
        migration.leave(entry, "a secret does not belong in a recipe; use hf auth login or the tool's own login")
    elif key in _SPECIAL:
        _SPECIAL[key](migration, entry)
    elif key in rules.WITHOUT_EFFECT:
        migration.drop(entry, rules.WITHOUT_EFFECT[key])
    elif rules.MOVES.get(key) in ("data.chat_template", "data.system_prompt") and "dataset_text_field" in migration.entries:
        migration.leave(entry, "it acts on conversations alone, and dataset_text_field says that each row is one text")
    elif rules.MOVES.get(key, "").startswith("lora.") and not migration.value("use_peft"):
        migration.leave(entry, "without use_peft: true TRL ignores it and trains all weights")
    elif key in rules.MOVES:
        _move(migration, entry, rules.MOVES[key])
    elif key in rules.NOT_CARRIED:
        migration.leave(entry, rules.NOT_CARRIED[key])
    elif key in section_keys("train"):
        _move(migration, entry, f"train.{key}")
    else:
        migration.leave(entry, "no class behind a recipe section has this key")


def _move(migration: Migration, entry: Entry, dotted: str) -> None:
    """Move a key, with its value in the form that is read today."""
    value, key = entry.value, dotted.split(".", 1)[1]
    if dotted in migration.values:
        migration.leave(entry, f"{dotted} is set already, by another key of this file")
    elif value is None and not dotted.startswith("train."):
        migration.drop(entry, "it says nothing")
    elif key in rules.STRATEGIES and value is False:
        migration.move(entry, dotted, "no", "an unquoted no is read as false")
    elif "dtype" in key and rules.dtype_name(value) != value:
        migration.move(entry, dotted, rules.dtype_name(value))
    elif dotted == "lora.target_modules" and rules.target_modules(value) != value:
        migration.move(entry, dotted, rules.target_modules(value))
    elif dotted.startswith("quantization.load_in") and not value:
        migration.drop(entry, "the quantization section is absent")
    elif dotted.startswith("quantization.bnb") and not migration.value("load_in_4bit"):
        migration.drop(entry, "the base is not loaded in 4 bits")
    else:
        note = "also needs --trust-remote-code on the command line" if dotted == "model.trust_remote_code" and value else ""
        migration.move(entry, dotted, note=note)


def _complete(migration: Migration) -> None:
    """Add what TRL fills in by itself where the class behind a section fills in something else."""
    if migration.value("use_peft"):
        for key, value in rules.LORA_DEFAULTS.items():
            if f"lora.{key}" not in migration.values:
                migration.add(f"lora.{key}", value, "TRL's default; PEFT's is another")
    if migration.values.get("quantization.load_in_4bit"):
        if "quantization.bnb_4bit_quant_type" not in migration.values:
            migration.add("quantization.bnb_4bit_quant_type", "nf4", "TRL's default; bitsandbytes' is fp4")
        dtype = migration.values.get("model.dtype")
        if "quantization.bnb_4bit_compute_dtype" not in migration.values and dtype not in (None, "auto"):
            migration.add("quantization.bnb_4bit_compute_dtype", dtype, "TRL computes in the model's dtype")
    _complete_data(migration)


def _complete_data(migration: Migration) -> None:
    """Add the prompt format and the split, which TRL reads off the columns and the evaluation settings."""
    if "dataset_text_field" in migration.entries:
        migration.add("data.prompt_format", "raw", "the text stands in one column")
    else:
        migration.add(
            "data.prompt_format", "chat", "rows with messages; raw for prompt + completion or text, dolly or alpaca for instructions"
        )
        answers_only = migration.value("completion_only_loss") or migration.value("assistant_only_loss")
        if not answers_only and "train.completion_only_loss" not in migration.values:
            migration.add(
                "train.completion_only_loss", False, "TRL learns whole conversations unless told otherwise; true learns answers only"
            )
    strategy = migration.values.get("train.eval_strategy", "no")
    share = migration.values.pop("validation", None)
    if strategy in ("no", None) and share is None:
        migration.add("data.split", {"method": "none"}, "no evaluation was asked for, so no row is held out")
    else:
        migration.add("data.split", {"method": "hash", "validation": share or 0.1}, "rows held out for evaluation")


def _mixture(migration: Migration, entry: Entry) -> None:
    """A mixture of data sets, in any of the three forms."""
    sources, lost = rules.mixture_sources(entry.value)
    if not sources:
        raise RecipeError(f"'{entry.key}' names no data set", file=migration.file, line=entry.line)
    splits = migration.value("dataset_splits")
    if isinstance(splits, list) and splits and not any("source_split" in source for source in sources):
        split = next((name for name in splits if "train" in str(name)), splits[0])
        sources = [{**source, "source_split": split} for source in sources]
    note = (
        "columns are found by name, and train.seed sets the order"
        if re.search(r"^\s+-?\s*(columns|seed):", "\n".join(entry.text), re.MULTILINE)
        else ""
    )
    if len(sources) == 1:
        migration.move(entry, "data.source", sources[0]["source"], note)
        for key in ("subset", "source_split"):
            if key in sources[0]:
                migration.add(f"data.{key}", sources[0][key], f"from {entry.key}")
    else:
        migration.move(entry, "data.source", sources, note)
    size = entry.value.get("test_split_size") if isinstance(entry.value, dict) else None
    if isinstance(size, float) and 0 < size < 1:
        migration.values["validation"] = size
    elif size is not None:
        lost.append(f"test_split_size {size} rows; data.split.validation is a fraction")
    if lost:
        migration.leave(entry, "these parts have no place in data.source", *lost)


def _model_kwargs(migration: Migration, entry: Entry) -> None:
    """What has a key of its own in the model section moves there, unless the file says it elsewhere too."""
    kwargs = entry.value if isinstance(entry.value, dict) else {}
    moves = {**rules.MOVES, "revision": "model.revision"}
    own = {key: moves[key] for key in kwargs if moves.get(key, "").startswith("model.")}
    said_elsewhere = {rules.MOVES.get(key) for key in migration.entries}
    for key, dotted in own.items():
        if dotted not in said_elsewhere:
            value = kwargs[key]
            migration.add(dotted, rules.dtype_name(value) if dotted == "model.dtype" else value, f"from {entry.key}.{key}")
    rest = {key: value for key, value in kwargs.items() if key not in own}
    if not own:
        migration.move(entry, "model.kwargs")
    elif rest:
        migration.move(entry, "model.kwargs", rest)
    else:
        migration.drop(entry, "its keys stand in the model section")


def _output_dir(migration: Migration, entry: Entry) -> None:
    """The folder's name becomes the run's name, unless the run has one."""
    if migration.value("run_name"):
        migration.drop(entry, "runs lie in runs/<run.name>")
    else:
        _run_name(migration, entry)


def _run_name(migration: Migration, entry: Entry) -> None:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(entry.value)).name).strip("-._")[:100]
    try:
        migration.move(entry, "run.name", check_run_name(name), "runs lie in runs/<run.name>")
    except RecipeError:
        migration.leave(entry, "runs lie in runs/<run.name>, and this is no name for a run")


def _warmup_ratio(migration: Migration, entry: Entry) -> None:
    """A fraction below 1 is written as warmup_steps today."""
    if migration.value("warmup_steps"):
        migration.drop(entry, "warmup_steps is set and wins")
    else:
        migration.move(entry, "train.warmup_steps", note="a number below 1 is a fraction of all steps")


def _warmup_steps(migration: Migration, entry: Entry) -> None:
    """0 gives way to a warmup_ratio."""
    if entry.value or "warmup_ratio" not in migration.entries:
        migration.move(entry, "train.warmup_steps")
    else:
        migration.drop(entry, "0, so warmup_ratio holds")


def _group_by_length(migration: Migration, entry: Entry) -> None:
    if entry.value is True:
        migration.move(entry, "train.train_sampling_strategy", "group_by_length")
    else:
        migration.drop(entry, "random order is the default")


def _max_steps(migration: Migration, entry: Entry) -> None:
    if isinstance(entry.value, int) and entry.value <= 0:
        migration.drop(entry, "num_train_epochs decides")
    else:
        migration.move(entry, "train.max_steps")


def _assistant_only_loss(migration: Migration, entry: Entry) -> None:
    if entry.value:
        migration.move(entry, "data.chat_loss", "all", "loss on every assistant turn; any template will do")
    else:
        migration.drop(entry, "train.completion_only_loss says it")


def _text_field(migration: Migration, entry: Entry) -> None:
    migration.move(entry, "data.columns", {"text": entry.value})


def _packing_strategy(migration: Migration, entry: Entry) -> None:
    renamed = {"ffd": "bfd", "bfd-requeue": "bfd_split"}.get(str(entry.value))
    migration.move(entry, "train.packing_strategy", *([renamed, "the name today"] if renamed else []))


def _flash_attention(migration: Migration, entry: Entry) -> None:
    if entry.value:
        migration.move(entry, "model.attn_implementation", "flash_attention_2")
    else:
        migration.drop(entry, "the fastest kernel that is installed is taken")


def _accelerate_config(migration: Migration, entry: Entry) -> None:
    name = rules.ACCELERATE_NAMES.get(Path(str(entry.value)).stem)
    if name:
        migration.move(entry, "launch.accelerate", name)
    else:
        migration.leave(entry, "no accelerate config of that kind here; name a file in accelerate_configs/ as launch.accelerate")


def _tokenizer(migration: Migration, entry: Entry) -> None:
    if entry.value in (None, migration.value("model_name_or_path")):
        migration.drop(entry, "the tokenizer is the model's")
    else:
        migration.leave(entry, rules.NOT_CARRIED["tokenizer_name_or_path"])


_SPECIAL: dict[str, Callable[[Migration, Entry], None]] = {
    "dataset_mixer": _mixture,
    "dataset_mixture": _mixture,
    "datasets": _mixture,
    "model_init_kwargs": _model_kwargs,
    "output_dir": _output_dir,
    "run_name": _run_name,
    "warmup_ratio": _warmup_ratio,
    "warmup_steps": _warmup_steps,
    "group_by_length": _group_by_length,
    "max_steps": _max_steps,
    "assistant_only_loss": _assistant_only_loss,
    "dataset_text_field": _text_field,
    "packing_strategy": _packing_strategy,
    "use_flash_attention_2": _flash_attention,
    "accelerate_config": _accelerate_config,
    "tokenizer_name_or_path": _tokenizer,
}
