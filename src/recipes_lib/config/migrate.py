"""A flat TRL config (`trl sft`, alignment handbook, open-r1) -> a recipe, every change listed.

A flat file is TRL's ScriptArguments, ModelConfig and SFTConfig in one mapping. Keys move as they
were written, with their comments; what a recipe cannot say stays as a comment at its end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.config.documents import Document, Origin, judge, read
from recipes_lib.config.kinds import SECTIONS, foreign_kind
from recipes_lib.config.recipe import RecipeFile
from recipes_lib.config.rules import base_rules, recipe_rules
from recipes_lib.config.upstream import NOT_IN_TRAIN, REMOVED, RENAMES, upstream_fields
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.core.terminal import is_secret_name

MOVES = {
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "model_init_kwargs": "model.kwargs",
    "dataset_name": "data.source",
    "dataset_path": "data.source",
    "dataset_config": "data.subset",
    "dataset_config_name": "data.subset",
    "dataset_train_split": "data.source_split",
    "chat_template": "data.chat_template",
    "chat_template_path": "data.chat_template",
    "system_prompt": "data.system_prompt",
    "max_train_samples": "data.max_examples",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target_parameters": "lora.target_parameters",
    "lora_modules_to_save": "lora.modules_to_save",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "load_in_4bit": "quantization.load_in_4bit",
    "load_in_8bit": "quantization.load_in_8bit",
    "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "bnb_4bit_use_double_quant": "quantization.bnb_4bit_use_double_quant",
    "bnb_4bit_quant_type": "quantization.bnb_4bit_quant_type",
    "bnb_4bit_quant_storage": "quantization.bnb_4bit_quant_storage",
    "bnb_4bit_compute_dtype": "quantization.bnb_4bit_compute_dtype",
    "preprocessing_num_workers": "train.dataset_num_proc",
    "use_liger": "train.use_liger_kernel",
    "num_processes": "launch.gpus",
    "num_machines": "launch.nodes",
    **{old: f"train.{new}" for old, new in RENAMES.items()},
}
WITHOUT_EFFECT = {
    **REMOVED,
    "do_train": "training is what a recipe does",
    "do_eval": "train.eval_strategy says it",
    "use_peft": "the lora section says it",
    "lora_task_type": "it is always CAUSAL_LM",
    "remove_unused_columns": "columns are prepared before the trainer sees them",
    "dataset_kwargs": "columns are prepared before the trainer sees them",
    "ignore_bias_buffers": "the trainer decides it",
    "config": "it named this file",
}
NOT_CARRIED = {
    **NOT_IN_TRAIN,
    "dataset_test_split": "validation rows are held out of the training rows (data.split)",
    "dataset_streaming": "the audit before step 1 reads every row",
    "dataset_splits": "one split is read (data.source_split)",
    "dataset_configs": "each source of a mixture has its own subset",
    "env": "set environment variables where you launch",
}
# TRL's defaults where PEFT's are others. Source: trl.ModelConfig.
LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
_CONFIGS = {"single_gpu": "single_gpu", "multi_gpu": "ddp", "ddp": "ddp"}
_CONFIGS |= dict.fromkeys(("fsdp", "fsdp1", "fsdp2"), "fsdp")
_OTHER_TRAINING = re.compile(
    r"(?<![a-z])(dpo|kto|orpo|cpo|grpo|rloo|ppo|gkd|rm|reward)(?![a-z])", re.I
)
_MIXTURES = ("dataset_mixer", "dataset_mixture", "datasets")


@dataclass
class Entry:
    """One top-level key of the flat file: its value, and the text it was written with."""

    key: str
    value: Any
    line: int
    text: list[str]
    comments: list[str] = field(default_factory=list)


@dataclass
class Migration:
    """A migration in progress, then its result: `text()` of the recipe and the `changes` to list.

    By dotted key, `values` holds what the recipe says and `lines` how it is written.
    """

    file: str
    entries: dict[str, Entry]
    head: list[str]
    changes: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    origins: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)

    def value(self, key: str, default: Any = None) -> Any:
        """Return the flat file's value of a key."""
        return self.entries[key].value if key in self.entries else default

    def move(self, entry: Entry, dotted: str, value: Any, note: str = "") -> None:
        """Place an entry under its new name; text stays as it was where the value does."""
        key = dotted.partition(".")[2]
        if dotted in self.values:
            self.leave(entry, f"{dotted} is set already, by another key of this file")
            return
        same = value == entry.value and type(value) is type(entry.value) and entry.text
        written = [entry.text[0].replace(entry.key, key, 1), *entry.text[1:]] if same else []
        above = [line.strip() for line in (*self.waiting, *entry.comments) if line.strip()]
        self.lines[dotted] = [*above, *(written or _dump(key, value))]
        if not same and entry.text and " #" in entry.text[0]:
            self.lines[dotted].insert(0, "#" + entry.text[0].rpartition(" #")[2])
        self.values[dotted], self.origins[dotted], self.waiting = value, entry.line, []
        changed = "" if same else f": {_short(entry.value)} -> {_short(value)}"
        renamed = "" if key == entry.key else " (renamed)"
        new = f"{dotted}{renamed}{changed}{f'; {note}' if note else ''}"
        self.changes.append(f"{self.file}:{entry.line}: {entry.key} -> {new}")

    def add(self, dotted: str, value: Any, why: str) -> None:
        """Add a key that the flat file did not have."""
        if dotted not in self.values:
            self.values[dotted] = value
            self.lines[dotted] = [f"# {why}", *_dump(dotted.partition(".")[2], value)]
            self.changes.append(f"added {dotted}: {_short(value)}; {why}")

    def drop(self, entry: Entry, why: str) -> None:
        """Leave out an entry that has no effect here; its comments go to the next one."""
        self.waiting += entry.comments
        self.changes.append(f"{self.file}:{entry.line}: {entry.key} left out; {why}")

    def leave(self, entry: Entry, why: str) -> None:
        """Keep an entry as a comment at the end of the recipe."""
        self.waiting += entry.comments
        text = [f"{entry.key}: (not copied)"] if is_secret_name(entry.key) else entry.text
        self.left += [f"# {entry.key}: {why}", *(f"#     {line}".rstrip() for line in text)]
        what = f"{entry.key} NOT CARRIED OVER; {why}"
        self.changes.append(f"{self.file}:{entry.line}: {what}")

    def text(self) -> str:
        """Return the recipe as YAML text."""
        lines = list(self.head)
        for section in SECTIONS:
            blocks = [text for key, text in self.lines.items() if key.startswith(f"{section}.")]
            if blocks:
                inner = [f"  {line}" if line.strip() else "" for text in blocks for line in text]
                lines += ["", f"{section}:", *inner]
            elif section == "lora":
                lines += ["", "lora: null"]
        if self.left:
            heading = "# Not carried over by `recipes migrate`, with the lines as they were:"
            lines += ["", heading, *self.left]
        return "\n".join([*lines, *(line for line in self.waiting if line.strip())]) + "\n"

    def document(self) -> Document:
        """Return the recipe as a document whose places are those of the flat file."""
        nested: dict[str, Any] = {}
        origins: dict[tuple[str | int, ...], Origin] = {}
        for dotted, value in self.values.items():
            section, _, key = dotted.partition(".")
            nested.setdefault(section, {})[key] = value
            if dotted in self.origins:
                origins[section, key] = Origin(self.file, self.origins[dotted])
        return Document(Path(self.file), nested, origins=origins)


def migrate(path: Path, head: str, prompt_formats: Sequence[str] | None = None) -> Migration:
    """Turn a flat TRL config into a recipe; `text()` of the result is the recipe.

    Args:
        path: the flat file.
        head: the recipe's first line.
        prompt_formats: those that can read its rows, where they are on this machine.

    Raises:
        RecipeError: no flat fine-tuning config, or values that a recipe refuses, at their lines.
    """
    document = read(path, yaml_1_1=True)
    _refuse_other_kinds(document)
    entries, rest = _entries(document)
    migration = Migration(document.file, entries, [head], waiting=rest)
    first = next(iter(entries.values()))
    migration.head += [line for line in first.comments if line.startswith("#")]
    first.comments = []
    for entry in entries.values():
        _place(migration, entry)
    _complete(migration, prompt_formats)
    _, errors = judge(RecipeFile, migration.document(), base_rules, recipe_rules)
    if errors:
        raise RecipeErrors(errors)
    return migration


def _refuse_other_kinds(document: Document) -> None:
    values = document.values if isinstance(document.values, dict) else {}
    if foreign := foreign_kind(values):
        raise RecipeError(
            f"is {foreign.title}, not a flat TRL config", foreign.use, file=document.file
        )
    if {"model", "data", "train", "extends"} & values.keys():
        hint = f"check it: recipes check {document.file}"
        raise RecipeError("is a recipe already", hint, file=document.file)
    if values.get("loss_type", "nll") not in upstream_fields()["train"]["loss_type"]["enum"]:
        what = f"loss_type {values['loss_type']} belongs to another trainer of TRL"
        raise document.error("loss_type", what, "a recipe describes supervised fine-tuning")
    for key in ("output_dir", "run_name", "hub_model_id"):
        if named := _OTHER_TRAINING.search(str(values.get(key, ""))):
            what = f"'{key}' says {named[1]}, and a recipe describes supervised fine-tuning"
            hint = f"use TRL's own trainer for it; if it is not {named[1]}, give it another {key}"
            raise document.error(key, what, hint)
    for needed in (("model_name_or_path",), ("dataset_name", "dataset_path", *_MIXTURES)):
        if not values.keys() & set(needed):
            what = f"is not a flat TRL config: it has no {' or '.join(needed)}"
            raise RecipeError(what, file=document.file)


def _place(migration: Migration, entry: Entry) -> None:
    """Decide what becomes of one key."""
    key, value = entry.key, entry.value
    dotted = MOVES.get(key) or (f"train.{key}" if key in upstream_fields()["train"] else "")
    if is_secret_name(key):
        migration.leave(entry, "a secret does not belong in a recipe; use hf auth login")
    elif key in _MIXTURES:
        _mixture(migration, entry)
    elif key in ("run_name", "output_dir"):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(value)).name).strip("-._")[:100]
        if key == "output_dir" and migration.value("run_name"):
            migration.drop(entry, "runs lie in runs/<run.name>")
        else:
            migration.move(entry, "run.name", name, "runs lie in runs/<run.name>")
    elif key == "accelerate_config":
        name = _CONFIGS.get(Path(str(value)).stem, "")
        why = "no accelerate config of that kind here; see launch.accelerate"
        migration.move(entry, "launch.accelerate", name) if name else migration.leave(entry, why)
    elif key in ("warmup_ratio", "warmup_steps"):
        other = "warmup_steps" if key == "warmup_ratio" else "warmup_ratio"
        if (value in (0, None) and other in migration.entries) or (
            key == "warmup_ratio" and migration.value("warmup_steps")
        ):
            migration.drop(entry, f"{other} decides")
        else:
            migration.move(entry, "train.warmup_steps", value, "below 1 it is a fraction")
    elif key == "group_by_length":
        sampling = "group_by_length" if value is True else "random"
        migration.move(entry, "train.train_sampling_strategy", sampling)
    elif key == "assistant_only_loss":
        why = "loss on every assistant turn" if value else "train.completion_only_loss says it"
        migration.move(entry, "data.chat_loss", "all", why) if value else migration.drop(entry, why)
    elif key == "dataset_text_field":
        migration.move(entry, "data.columns", {"text": value})
    elif key == "use_flash_attention_2":
        kernel = "flash_attention_2" if value else None
        migration.move(entry, "model.attn_implementation", kernel)
    elif key == "tokenizer_name_or_path" and value not in (
        None,
        migration.value("model_name_or_path"),
    ):
        migration.leave(entry, "the tokenizer is the model's")
    elif (
        key in WITHOUT_EFFECT
        or key == "tokenizer_name_or_path"
        or (value is None and not dotted.startswith("train."))
    ):
        migration.drop(entry, WITHOUT_EFFECT.get(key, "it says nothing"))
    elif key in NOT_CARRIED and key not in MOVES:
        migration.leave(entry, NOT_CARRIED[key])
    elif dotted.startswith("lora.") and not migration.value("use_peft"):
        migration.leave(entry, "without use_peft: true TRL ignores it and trains all weights")
    elif dotted.startswith("quantization.") and not (
        value if "load_in" in key else migration.value("load_in_4bit")
    ):
        migration.drop(entry, "the base is not loaded so")
    elif not dotted:
        migration.leave(entry, "no class behind a recipe section has this key")
    else:
        _move(migration, entry, dotted)


def _move(migration: Migration, entry: Entry, dotted: str) -> None:
    """Move a key, with its value in the form that is read today."""
    value, key = entry.value, dotted.partition(".")[2]
    if key.endswith("_strategy") and value is False:
        value = "no"
    elif "dtype" in key and isinstance(value, str):
        value = _DTYPES.get(value.removeprefix("torch."), value.removeprefix("torch."))
    elif key == "target_modules":
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        value = "all-linear" if names == ["all-linear"] else names
    elif key == "packing_strategy":
        value = {"ffd": "bfd", "bfd-requeue": "bfd_split"}.get(value, value)
    elif key == "kwargs" and isinstance(value, dict):
        own = {MOVES[inner]: inner for inner in value if MOVES.get(inner, "").startswith("model.")}
        for new, inner in own.items():
            said = (
                value[inner].removeprefix("torch.")
                if isinstance(value[inner], str)
                else value[inner]
            )
            migration.add(new, _DTYPES.get(said, said), f"from {entry.key}.{inner}")
        value = {inner: item for inner, item in value.items() if inner not in own.values()}
        if not value:
            migration.drop(entry, "its keys stand in the model section")
            return
    trusting = dotted == "model.trust_remote_code" and value
    note = "also needs --trust-remote-code on the command line" if trusting else ""
    migration.move(entry, dotted, value, note)


def _mixture(migration: Migration, entry: Entry) -> None:
    """Turn `dataset_mixer`, `dataset_mixture` or TRL's `datasets` into `data.source`."""
    value = entry.value
    if isinstance(value, dict) and isinstance(value.get("datasets"), list):
        value = value["datasets"]
    elif isinstance(value, dict):
        value = [{"id": name, "weight": share} for name, share in value.items()]
    split = next(
        (name for name in migration.value("dataset_splits") or () if "train" in str(name)), None
    )
    sources, lost = [], []
    for item in value if isinstance(value, list) else [value]:
        part = item if isinstance(item, dict) else {"id": item}
        name, files = part.get("id") or part.get("path"), part.get("data_files")
        if isinstance(files, str):
            name = files
        said = {
            "source": name,
            "subset": part.get("config", part.get("name")),
            "source_split": part.get("split", split),
            "weight": part.get("weight") if part.get("weight") != 1 else None,
        }
        sources.append({key: text for key, text in said.items() if text is not None})
        lost += [key for key in ("fraction", "data_dir") if part.get(key) is not None]
    size = entry.value.get("test_split_size") if isinstance(entry.value, dict) else None
    if isinstance(size, float):
        migration.add("data.split", {"validation": size}, f"from {entry.key}.test_split_size")
    elif size is not None:
        lost.append(f"test_split_size {size} rows (data.split.validation is a fraction)")
    if len(sources) == 1 and "weight" not in sources[0]:
        for key in ("subset", "source_split"):
            if key in sources[0]:
                migration.add(f"data.{key}", sources[0][key], f"from {entry.key}")
        migration.move(entry, "data.source", sources[0]["source"])
    else:
        migration.move(entry, "data.source", sources)
    if lost:
        migration.leave(entry, f"no place in data.source: {', '.join(lost)}")


def _complete(migration: Migration, prompt_formats: Sequence[str] | None) -> None:
    """Add what TRL fills in by itself where the class behind a section fills in something else."""
    for key, value in LORA_DEFAULTS.items() if migration.value("use_peft") else ():
        migration.add(f"lora.{key}", value, "TRL's default; PEFT's is another")
    if migration.values.get("quantization.load_in_4bit"):
        dtype = migration.values.get("model.dtype")
        migration.add("quantization.bnb_4bit_quant_type", "nf4", "TRL's default")
        if dtype in _DTYPES.values():
            why = "TRL computes in the model's dtype"
            migration.add("quantization.bnb_4bit_compute_dtype", dtype, why)
    if "dataset_text_field" in migration.entries:
        migration.add("data.prompt_format", "raw", "the text stands in one column")
    elif prompt_formats is not None:
        migration.add("data.prompt_format", prompt_formats[0], "as the rows are on this machine")
    else:
        why = "for rows of messages; for rows of prompt and completion write raw, and remove"
        migration.add("data.prompt_format", "chat", f"{why} train.completion_only_loss: false")
    conversations = migration.values["data.prompt_format"] == "chat"
    asked = migration.value("completion_only_loss") or migration.value("assistant_only_loss")
    if conversations and not asked and "completion_only_loss" not in migration.entries:
        why = "of messages TRL learns every token; true learns the answers"
        migration.add("train.completion_only_loss", False, why)
    if migration.values.get("train.eval_strategy", "no") in ("no", None):
        migration.add("data.split", {"method": "none"}, "no evaluation: no row is held out")
    else:
        migration.add("data.split", {"validation": 0.1}, "rows held out for evaluation")


def _entries(document: Document) -> tuple[dict[str, Entry], list[str]]:
    """Cut the file into its top-level keys, each with the comment lines above it; and the comments
    at its end.
    """
    lines, values = document.text.split("\n"), document.values
    starts = {key: (document.origins[key,].line or 1) - 1 for key in values}
    if "&" in document.text or len(set(starts.values())) < len(starts):
        # an anchor, or several keys on a line: the values are written anew
        entries = {key: Entry(key, values[key], starts[key] + 1, []) for key in values}
        return entries, [line for line in lines if line.startswith("#")]
    entries, above = {}, lines[: min(starts.values())]
    for key, end in zip(starts, [*list(starts.values())[1:], len(lines)], strict=True):
        block = lines[starts[key] : end]
        size = len(block)
        while size > 1 and (not block[size - 1].strip() or block[size - 1].startswith("#")):
            size -= 1
        comments = [line for line in above if not line.startswith(("---", "%"))]
        entries[key] = Entry(key, values[key], starts[key] + 1, block[:size], comments)
        above = block[size:]
    return entries, above


def _dump(key: str, value: Any) -> list[str]:
    text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=10_000)
    return text.rstrip("\n").split("\n")


def _short(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().replace("\n...", "")
    return text if len(text) <= 60 else f"{text[:57]}..."
