"""A flat TRL config (ScriptArguments, ModelConfig and SFTConfig in one mapping) -> a recipe. Each
key moves to its section with its comments; what a recipe cannot say is a comment at its end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.config.documents import (
    SECTIONS,
    Document,
    Values,
    kind_of,
    read,
    value_text,
    wrong_kind,
)
from recipes_lib.config.parsing import judge
from recipes_lib.config.recipe import RecipeFile, recipe_rules
from recipes_lib.config.upstream import INSTEAD, RENAMES, upstream_fields
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
    "dataset_config": "data.subset",
    "dataset_train_split": "data.source_split",
    "dataset_text_field": "data.columns",
    "chat_template": "data.chat_template",
    "chat_template_path": "data.chat_template",
    "system_prompt": "data.system_prompt",
    "assistant_only_loss": "data.chat_loss",
    "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "group_by_length": "train.train_sampling_strategy",
    "preprocessing_num_workers": "train.dataset_num_proc",
    "run_name": "run.name",
    "output_dir": "run.name",
    "num_processes": "launch.gpus",
    "num_machines": "launch.nodes",
    "accelerate_config": "launch.accelerate",
    **{old: f"train.{new}" for old, new in RENAMES.items()},
}
WITHOUT_EFFECT = {
    **dict.fromkeys(("overwrite_output_dir", "logging_dir"), INSTEAD["train"]["output_dir"]),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), INSTEAD["train"]["do_eval"]),
    "use_peft": "the lora section says it",
    "lora_task_type": "it is always CAUSAL_LM",
    **dict.fromkeys(("remove_unused_columns", "dataset_kwargs"), "rows are prepared beforehand"),
    **dict.fromkeys(("ignore_bias_buffers", "save_safetensors"), "the trainer decides it"),
    "config": "it named this file",
}
NOT_CARRIED = {
    **{key: why for key, why in INSTEAD["train"].items() if key not in MOVES},
    "dataset_test_split": "validation rows are held out of the training rows (data.split)",
    "dataset_streaming": "the audit before step 1 reads every row",
    "dataset_splits": "one split is read (data.source_split)",
}
# TRL's defaults where PEFT's are others. Source: trl.ModelConfig.
LORA_DEFAULTS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
MIXTURES = ("dataset_mixer", "dataset_mixture", "datasets")
_LAUNCHES = {"single_gpu": "single_gpu", "multi_gpu": "ddp", "ddp": "ddp"}
_LAUNCHES |= dict.fromkeys(("fsdp", "fsdp1", "fsdp2"), "fsdp")


@dataclass
class Migration:
    """A migration in progress, then its result: the recipe's `text()` and the `changes`."""

    flat: Document
    head: str
    comments: dict[str, list[str]]  # of flat keys that are not placed yet, and of dotted keys
    values: Values = field(default_factory=dict)  # what the recipe says, by dotted key
    sources: dict[str, str] = field(default_factory=dict)  # dotted key -> flat key
    left: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    def move(self, key: str, dotted: str, value: Any) -> None:
        """Place a key of the flat file under its new name."""
        if dotted in self.values:
            self.leave(key, f"{dotted} is set already, by another key of this file")
            return
        self.values[dotted], self.sources[dotted] = value, key
        self.comments[dotted] = self.comments.pop(key, [])
        old = self.flat.values[key]
        change = "" if value == old else f": {value_text(old, 60)} -> {value_text(value, 60)}"
        self.say(key, f"{key} -> {dotted}{change}")

    def add(self, dotted: str, value: Any, why: str) -> None:
        """Add a key that the flat file did not have."""
        if dotted not in self.values:
            self.values[dotted], self.comments[dotted] = value, [f"# {why}"]
            self.changes.append(f"added {dotted}: {value_text(value, 60)}; {why}")

    def leave(self, key: str, why: str) -> None:
        """Keep a key as a comment at the end of the recipe."""
        value = "(not copied)" if is_secret_name(key) else self.flat.values[key]
        self.left += [f"# {key}: {why}", *(f"#     {line}" for line in _lines(key, value))]
        self.say(key, f"{key} NOT CARRIED OVER; {why}")

    def say(self, key: str, what: str) -> None:
        """Add a change at the place of a flat key."""
        self.changes.append(f"{self.flat.origin((key,))}: {what}")

    def text(self) -> str:
        """Return the recipe as YAML text."""
        lines = [self.head]
        for section in SECTIONS:
            keys = [key for key in self.values if key.startswith(f"{section}.")]
            if keys or section == "lora":
                lines += ["", f"{section}:" if keys else "lora: null"]
            for dotted in keys:
                inner = _lines(dotted.partition(".")[2], self.values[dotted])
                lines += [f"  {line}" for line in (*self.comments[dotted], *inner)]
        if self.left:
            lines += ["", "# Not carried over by `recipes migrate`:", *self.left]
        rest = [comments for key, comments in self.comments.items() if key not in self.values]
        return "\n".join([*lines, *(line for comments in rest for line in comments)]) + "\n"

    def document(self) -> Document:
        """Return the recipe as a document whose places are those of the flat file."""
        document = Document(self.flat.path, {})
        for dotted, value in self.values.items():
            section, _, key = dotted.partition(".")
            document.values.setdefault(section, {})[key] = value
            if dotted in self.sources:
                document.origins[section, key] = self.flat.origin((self.sources[dotted],))
        return document


def migrate(path: Path, head: str, prompt_formats: Sequence[str] | None = None) -> Migration:
    """Turn a flat TRL config into a recipe; `text()` of the result is the recipe.

    Args:
        path: the flat file.
        head: the recipe's first line.
        prompt_formats: those that can read its rows, where they are on this machine.
    """
    flat = read(path, yaml_1_1=True)
    kind = kind_of(flat)
    if kind.name != "flat":
        raise wrong_kind(kind, "flat", flat.file)
    for needed in (("model_name_or_path",), ("dataset_name", *MIXTURES)):
        if not flat.values.keys() & {*needed}:
            what = f"is not a flat TRL config: it has no {' or '.join(needed)}"
            raise RecipeError(what, file=flat.file)
    migration = Migration(flat, head, _comments(flat))
    for key, value in flat.values.items():
        _place(migration, key, value)
    _complete(migration, prompt_formats)
    _, errors = judge(RecipeFile, migration.document(), recipe_rules)
    if errors := [*(error for error in flat.problems if "duplicate" in str(error)), *errors]:
        raise RecipeErrors(errors)
    return migration


def home_of(key: str) -> str:
    """Return the dotted key of a recipe that a flat key becomes; empty for none."""
    if key in MOVES:
        return MOVES[key]
    fields = upstream_fields()
    for section in ("train", "quantization"):
        if key in fields[section]:
            return f"{section}.{key}"
    for name in (key, key.removeprefix("lora_")):
        if name in fields["lora"] and key.startswith(("lora_", "use_")):
            return f"lora.{name}"
    return ""


def _place(migration: Migration, key: str, value: Any) -> None:
    """Decide what becomes of one key."""
    flat, dotted = migration.flat.values, home_of(key)
    loads = value if "load_in" in key else flat.get("load_in_4bit")
    ratio, steps = flat.get("warmup_ratio"), flat.get("warmup_steps")
    drops = {
        WITHOUT_EFFECT.get(key): True,
        "it says nothing": value is None and not dotted.startswith("train."),
        "it is off": key == "assistant_only_loss" and not value,
        "runs are in runs/<run.name>": key == "output_dir" and flat.get("run_name"),
        "warmup_steps decides": key == "warmup_ratio" and (steps or not ratio),
        "warmup_ratio decides": key == "warmup_steps" and ratio and not steps,
        "the base model is not loaded that way": dotted.startswith("quantization.") and not loads,
    }
    kind = Path(str(value)).stem if key == "accelerate_config" else "ddp"
    leaves = {
        "a secret does not belong in a recipe; use hf auth login": is_secret_name(key),
        NOT_CARRIED.get(key): True,
        "without use_peft: true TRL ignores it": (
            dotted.startswith("lora.") and not flat.get("use_peft")
        ),
        "no accelerate config of that kind here; see launch.accelerate": kind not in _LAUNCHES,
        "no class behind a recipe section has this key": not dotted and key not in MIXTURES,
    }
    dropped = next((why for why, holds in drops.items() if why and holds), None)
    left = next((why for why, holds in leaves.items() if why and holds), None)
    if dropped and not is_secret_name(key):
        migration.say(key, f"{key} left out; {dropped}")
    elif left:
        migration.leave(key, left)
    elif key in MIXTURES:
        _mixture(migration, key, value)
    else:
        migration.move(key, dotted, _todays(key, dotted, value))


def _todays(key: str, dotted: str, value: Any) -> Any:
    """Return a value in the form that is read today."""
    name = dotted.partition(".")[2]
    if key == "assistant_only_loss":
        return "all"
    if key == "accelerate_config":
        return _LAUNCHES[Path(str(value)).stem]
    if key == "dataset_text_field":
        return {"text": value}
    if dotted == "run.name":
        return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(value)).name).strip("-._")[:100]
    if name == "train_sampling_strategy" and isinstance(value, bool):
        return "group_by_length" if value else "random"
    if name.endswith("_strategy") and value is False:
        return "no"
    if name == "target_modules" and isinstance(value, str):
        value = [module.strip() for module in value.split(",")]
    return "all-linear" if value == ["all-linear"] else value


def _mixture(migration: Migration, key: str, value: Any) -> None:
    """Turn `dataset_mixer`, `dataset_mixture` or TRL's `datasets` into `data.source`."""
    given, size = value, None
    if isinstance(value, dict):
        size = value.get("test_split_size")
        shares = [{"id": name, "weight": share} for name, share in value.items()]
        given = value["datasets"] if isinstance(value.get("datasets"), list) else shares
    splits = migration.flat.values.get("dataset_splits") or ()
    split = next((name for name in splits if "train" in str(name)), None)
    sources, lost = [], []
    for item in given if isinstance(given, list) else [given]:
        part = item if isinstance(item, dict) else {"id": item}
        files = part.get("data_files")
        keys = {
            "source": files if isinstance(files, str) else part.get("id") or part.get("path"),
            "subset": part.get("config", part.get("name")),
            "source_split": part.get("split", split),
            "weight": part.get("weight") if part.get("weight") != 1 else None,
        }
        sources.append({name: text for name, text in keys.items() if text is not None})
        lost += [name for name in ("fraction", "data_dir") if part.get(name) is not None]
    if isinstance(size, float):
        migration.add("data.split", {"validation": size}, f"from {key}.test_split_size")
    elif size is not None:
        lost.append(f"test_split_size {size} rows (data.split.validation is a fraction)")
    migration.move(key, "data.source", sources)
    if lost:
        migration.leave(key, f"data.source cannot hold: {', '.join(lost)}")


def _complete(migration: Migration, prompt_formats: Sequence[str] | None) -> None:
    """Add what TRL fills in by itself where the class behind a section fills in something else."""
    flat, values = migration.flat.values, migration.values
    for key, value in LORA_DEFAULTS.items() if flat.get("use_peft") else ():
        migration.add(f"lora.{key}", value, "TRL's default; PEFT's is another")
    if values.get("quantization.load_in_4bit"):
        migration.add("quantization.bnb_4bit_quant_type", "nf4", "TRL's default")
        if flat.get("bf16") and values.get("model.dtype") == "float16":
            values["model.dtype"] = "bfloat16"
            why = "4-bit layers would mix float16 with the bfloat16 of train.bf16"
            migration.changes.append(f"model.dtype: float16 -> bfloat16; {why}")
        if (dtype := values.get("model.dtype")) in ("bfloat16", "float16", "float32"):
            why = "TRL computes in the model's dtype"
            migration.add("quantization.bnb_4bit_compute_dtype", dtype, why)
    if "dataset_text_field" in flat:
        migration.add("data.prompt_format", "raw", "the text is in one column")
    elif prompt_formats is not None:
        migration.add("data.prompt_format", prompt_formats[0], "as the rows are on this machine")
    else:
        why = "for rows of messages; for rows of prompt and completion write raw, and remove"
        migration.add("data.prompt_format", "chat", f"{why} train.completion_only_loss: false")
    all_tokens = not flat.get("assistant_only_loss") and "completion_only_loss" not in flat
    if all_tokens and values["data.prompt_format"] == "chat":
        why = "of messages TRL learns every token; true learns the answers"
        migration.add("train.completion_only_loss", False, why)
    if values.get("train.eval_strategy", "no") in ("no", None):
        migration.add("data.split", {"method": "none"}, "no evaluation: no row is held out")
    else:
        migration.add("data.split", {"validation": 0.1}, "rows held out for evaluation")


def _comments(flat: Document) -> dict[str, list[str]]:
    """Return the comments of each top-level key: those above it, and those beside its value."""
    text = list(flat.text)
    for token in yaml.scan(flat.text):  # a sign inside a value begins no comment
        if isinstance(token, yaml.ScalarToken):
            for index in range(token.start_mark.index, token.end_mark.index):
                text[index] = "\n" if text[index] == "\n" else "x"
    places = {key: flat.origin((key,)).line or 0 for key in flat.values}
    comments: dict[str, list[str]] = {}
    lines = zip("".join(text).split("\n"), flat.text.split("\n"), strict=True)
    for number, (masked, line) in enumerate(lines, start=1):
        if "#" in masked:
            start = masked.index("#")
            following = [key for key, place in places.items() if place > number]
            before = [key for key, place in places.items() if place <= number]
            key = following[0] if start == 0 and following else before[-1] if before else ""
            comments.setdefault(key, []).append(line[start:].rstrip())
    return comments


def _lines(key: str, value: Any) -> list[str]:
    text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=10_000)
    return text.rstrip("\n").split("\n")
