"""The text of a recipe that is new: it extends another one and writes out what is different, or it
is what a flat TRL config (ScriptArguments, ModelConfig and SFTConfig in one mapping) becomes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml

from recipes_lib.config.documents import SECTIONS, Document, Values, read, value_text, wrong_kind
from recipes_lib.config.recipe import QuantizationSection, Recipe
from recipes_lib.config.upstream import INSTEAD, RENAMES, upstream_fields
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.core.project import project_root, shown_path
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
    "model_init_kwargs": "model.kwargs",
    "dataset_name": "data.source",
    "dataset_mixture": "data.source",
    "datasets": "data.source",
    "dataset_config": "data.subset",
    "dataset_train_split": "data.source_split",
    "dataset_text_field": "data.columns",
    "chat_template": "data.chat_template",
    "chat_template_path": "data.chat_template",
    "system_prompt": "data.system_prompt",
    "assistant_only_loss": "data.chat_loss",
    "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "group_by_length": "train.train_sampling_strategy",
    "run_name": "run.name",
    "output_dir": "run.name",
    **{old: f"train.{new}" for old, new in RENAMES.items()},
}
LEFT_OUT = {
    **{key: why for key, why in INSTEAD["train"].items() if key not in MOVES},
    **dict.fromkeys(("remove_unused_columns", "ignore_bias_buffers"), "the trainer decides it"),
    **dict.fromkeys(("use_peft", "lora_task_type"), "the lora section says it"),
    **dict.fromkeys(("dataset_test_split", "dataset_streaming"), "data.split holds rows out"),
    **dict.fromkeys(("accelerate_config", "num_processes"), "the launch section says it"),
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
        model: another base model: what the origin says for its own (template, layers) is undone.
        rows: the user's own rows, and the prompt formats that can read them. Validations and
            checkpoints become shares of the training: the origin's steps were for other rows.
        method: what is trained. Between adapter and full, the learning rate changes by ten.
    """
    values: Values = {"model": {}, "quantization": {}, "lora": {}, "data": {}, "train": {}}
    train, lora = origin.train, origin.lora
    if model is not None:
        values["model"]["name_or_path"] = model
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
        values["train"] |= {"max_steps": -1} if train.get("max_steps", -1) > 0 else {}
        # the best model is chosen among checkpoints
        share = 0.2 if train.get("load_best_model_at_end") else 0.05
        if train.get("eval_strategy") == "steps":
            values["train"]["eval_steps"] = 0.2
        if train.get("save_strategy", "steps") == "steps":
            values["train"]["save_steps"] = share
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


# Migration: each key moves to its section with its comments, or becomes a comment at the end.


def migrate(path: Path, head: str) -> tuple[str, list[str]]:
    """Return the text of the recipe that a flat TRL config becomes, and a line for each change.

    Args:
        path: the flat file, with each key on a line of its own.
        head: the recipe's first line.
    """
    flat = read(path)
    if flat.kind != "flat":
        raise wrong_kind(flat, "flat")
    for needed in (("model_name_or_path",), ("dataset_name", "dataset_mixture", "datasets")):
        if not flat.values.keys() & {*needed}:
            what = f"is not a flat TRL config: it has no {' or '.join(needed)}"
            raise RecipeError(what, file=flat.file)
    if flat.problems:
        raise RecipeErrors(flat.problems)
    texts: dict[str, list[str]] = {}  # key of the recipe -> its lines, with comments
    left, changes = [], []
    values: Values = {}
    first = flat.origin((next(iter(flat.values)),)).line
    above = [line for line in flat.text.split("\n")[:first] if line.startswith("#")]
    for key, value in flat.values.items():
        own, following = _lines_of(flat, key)
        dotted = home_of(key)
        why = _why_left_out(key, dotted, flat.values)
        why = why or ("another key of this file sets it already" if dotted in texts else "")
        place = flat.origin((key,))
        if why:
            shown = [f"{key}: (not copied)"] if is_secret_name(key) else own
            left += [*above, f"# {why}:", *(f"#   {line}" for line in shown)]
            changes.append(f"{place}: {key} left out; {why}")
        else:
            values[dotted] = new = _todays(key, value)
            name = dotted.partition(".")[2]
            if new != value:
                comments = [part for line in own for part in re.findall(r"\s(#.*)", line)]
                texts[dotted] = [*above, *comments, f"{name}: {value_text(new)}"]
            else:
                texts[dotted] = [*above, f"{name}{own[0].removeprefix(key)}", *own[1:]]
            changes.append(f"{place}: {key} -> {dotted}")
        above = following
    for dotted, (value, why) in _added(flat.values, values).items():
        if dotted not in texts:
            texts[dotted] = [f"# {why}", f"{dotted.partition('.')[2]}: {value_text(value)}"]
            changes.append(f"added {dotted}: {value_text(value)}; {why}")
    lines = [head]
    for section in SECTIONS:
        inner = [line for key in texts if key.startswith(f"{section}.") for line in texts[key]]
        lines += ["", f"{section}:"] if inner else []
        lines += [f"  {line}" if line else "" for line in inner]
    lines += ["", "# Left out by `recipes migrate`:", *left] if left else []
    return "\n".join([*lines, *above]) + "\n", changes


def home_of(key: str) -> str:
    """Return the dotted key of a recipe that a flat key becomes; empty for none."""
    if key in MOVES:
        return MOVES[key]
    fields = upstream_fields()
    if key in fields["train"]:
        return f"train.{key}"
    if key in QuantizationSection.model_fields:
        return f"quantization.{key}"
    for name in (key, key.removeprefix("lora_")):
        if name in fields["lora"] and key.startswith(("lora_", "use_")):
            return f"lora.{name}"
    return ""


def _lines_of(flat: Document, key: str) -> tuple[list[str], list[str]]:
    """Return the lines of a key, and the comments between it and the next one."""
    lines, place = flat.text.split("\n"), flat.origin((key,))
    starts = [flat.origin((name,)).line or 0 for name in flat.values]
    start = place.line or 0
    end = min((line for line in starts if line > start), default=len(lines) + 1)
    own = lines[start - 1 : end - 1]
    if not own[0].startswith(key) or starts.count(start) > 1:
        raise flat.error((key,), f"'{key}' does not begin a line of its own; write one key a line")
    size = next(n for n in range(len(own), 0, -1) if n == 1 or own[n - 1][:1] not in ("", "#"))
    return own[:size], [line for line in own[size:] if line]


def _why_left_out(key: str, dotted: str, flat: Values) -> str:
    loads = flat.get("load_in_4bit") or flat.get("load_in_8bit")
    ratio, steps = flat.get("warmup_ratio"), flat.get("warmup_steps")
    reasons = {
        "a secret does not belong in a recipe; use hf auth login": is_secret_name(key),
        LEFT_OUT.get(key, ""): key in LEFT_OUT,
        "no class behind a recipe section has this key": not dotted,
        "it says nothing": flat[key] is None and dotted[:6] != "train.",
        "it is off": key == "assistant_only_loss" and not flat[key],
        "runs are in runs/<run.name>": key == "output_dir" and flat.get("run_name"),
        "warmup_steps decides": key == "warmup_ratio" and (steps or not ratio),
        "warmup_ratio decides": key == "warmup_steps" and ratio and not steps,
        "TRL ignores it without use_peft": dotted[:5] == "lora." and not flat.get("use_peft"),
        "nothing is quantized": dotted[:13] == "quantization." and not loads,
    }
    return next((why for why, holds in reasons.items() if holds), "")


def _todays(key: str, value: Any) -> Any:
    """Return a value in the form that is read today."""
    if key in ("dataset_mixture", "datasets"):
        parts = value.get("datasets") if isinstance(value, dict) else value
        return [_source(part) for part in parts or []]
    if key in ("run_name", "output_dir"):
        return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(value)).name).strip("-._")[:100]
    if key == "lora_target_modules":
        names = re.split(r" *, *", value) if isinstance(value, str) else value
        return "all-linear" if names == ["all-linear"] else names
    forms: dict[str, Any] = {
        "assistant_only_loss": "all",
        "dataset_text_field": {"text": value},
        "group_by_length": "group_by_length" if value else "random",
        "packing_strategy": "bfd" if value == "ffd" else value,  # its name before TRL 0.20
    }
    return forms.get(key, value)


def _source(part: Values) -> Values:
    """Return a part of a mixture of TRL or the alignment handbook as one of ours."""
    keys = {
        "source": part.get("id") or part.get("path"),
        "subset": part.get("config", part.get("name")),
        "source_split": part.get("split"),
        "weight": part.get("weight"),
    }
    return {name: value for name, value in keys.items() if value not in (None, 1)}


def _added(flat: Values, values: Values) -> dict[str, tuple[Any, str]]:
    """Return what TRL fills in where the class behind a section fills in something else, and why:
    by key of the recipe.
    """
    added: dict[str, tuple[Any, str]] = {}
    if flat.get("use_peft"):
        why = "TRL's default; PEFT's is another"
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
        why = "of messages TRL learns every token; true learns the answers, as for prompts"
        added["train.completion_only_loss"] = (False, why)
    evaluates = values.get("train.eval_strategy") not in ("no", None)
    split = {"validation": 0.1} if evaluates else {"method": "none"}
    added["data.split"] = (split, "rows are held out only where there is an evaluation")
    return added
