"""The kinds of YAML files in a project, and how a file tells which kind it is.

A file says it by its first comment, `# yaml-language-server: $schema=.../<kind>.schema.json`, or by
its top-level keys; a recipe whose name starts with `_` is a base.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from recipes_lib.core.errors import RecipeError

SECTIONS = ("model", "quantization", "lora", "data", "train", "run", "launch")
_SCHEMA_LINE = re.compile(
    r"^#\s*yaml-language-server:\s*\$schema=(?:.*/)?([\w-]+)\.schema\.json\s*$", re.MULTILINE
)


@dataclass(frozen=True)
class Kind:
    """One kind of YAML file.

    `keys` are top-level keys that give it away, `use` says what a file of this kind is for.
    """

    name: str
    title: str
    keys: frozenset[str] = frozenset()
    use: str = ""


def _kind(name: str, title: str, keys: str = "", use: str = "") -> Kind:
    return Kind(name, title, frozenset(keys.split()), use)


RECIPE = _kind(
    "recipe",
    "a recipe",
    f"extends {' '.join(SECTIONS)}",
    "train it: recipes train",
)
_BASE = _kind(
    "base",
    "a base that recipes extend",
    "",
    "name it in a recipe's extends",
)
KINDS = (
    _kind(
        "eval",
        "an eval recipe",
        "suite generation metrics",
        "run it: recipes eval EVAL RUN",
    ),
    _kind(
        "study",
        "a study",
        "question factors arms seeds evals primary margins baseline test_subtasks include_base"
        " reference accelerate gpus nodes overrides pairs tune",
        "run it: recipes study run",
    ),
    _kind(
        "profile",
        "a site profile",
        "sbatch stages setup prefix srun signal_lead_s max_requeues partition gres cpus_per_gpu",
        "launch with it: recipes launch RECIPE --profile",
    ),
    _kind(
        "judge",
        "a judge",
        "judge thresholds",
        "name it in an eval recipe's judge.file",
    ),
    _kind(
        "lm_eval_task",
        "a task of lm-eval",
        "task dataset_path output_type doc_to_text doc_to_target",
        "name it in an eval recipe's suite.tasks",
    ),
    RECIPE,
    _BASE,
    _kind(
        "accelerate",
        "an accelerate config",
        "compute_environment distributed_type fsdp_config deepspeed_config num_machines"
        " num_processes machine_rank megatron_lm_config",
        "pass it to accelerate launch --config_file",
    ),
    _kind(
        "flat",
        "a flat TRL config, not a recipe",
        "model_name_or_path dataset_name dataset_mixer dataset_mixture output_dir learning_rate"
        " per_device_train_batch_size num_train_epochs use_peft lora_r load_in_4bit max_seq_length"
        " max_length torch_dtype do_train",
        "turn it into a recipe: recipes migrate IN.yaml --output OUT.yaml",
    ),
)


# Top-level keys by which configs of other training programs are known.
_FOREIGN = {
    "an axolotl": ("base_model", "sequence_len", "micro_batch_size", "val_set_size"),
    "a LLaMA-Factory": ("finetuning_type", "cutoff_len", "lora_target", "dataset_dir"),
    "a DPO or GRPO": ("beta", "num_generations", "max_prompt_length", "reward_funcs"),
    "an oumi": ("peft",),
    "a torchtune": ("tokenizer", "optimizer", "checkpointer"),
}


def foreign_kind(values: dict[str, Any]) -> Kind | None:
    """Return whose config file this is, where it belongs to another training program."""
    if values.keys() & {"extends", "train", "lora", "quantization", "run", "launch"}:
        return None
    use = "nothing here reads it; start a recipe: recipes new NAME --from quickstart/lora-r8"
    for whose, keys in _FOREIGN.items():
        if values.keys() & set(keys):
            return _kind("flat", f"{whose} config", "", use)
    return None


def kind_named(name: str) -> Kind | None:
    """Return the kind of that name."""
    return next((kind for kind in KINDS if kind.name == name), None)


def kind_of(values: Any, text: str, file: str) -> Kind:
    """Return the kind of a file: by its schema comment, else by its top-level keys.

    Raises:
        RecipeError: the file is empty, holds no mapping, or is of no known kind.
    """
    if not isinstance(values, dict) or not values:
        what = (
            "is empty"
            if values is None or values == {}
            else f"holds {'a list' if isinstance(values, list) else 'a single value'}"
        )
        raise RecipeError(f"{what}; a recipe has sections such as model:, data:, train:", file=file)
    named = match[1] if (match := _SCHEMA_LINE.search(text)) else None
    kind = (
        kind_named(named)
        if named
        else foreign_kind(values)
        or next((known for known in KINDS if known.keys & values.keys()), None)
    )
    if kind is None:
        keys = ", ".join(list(values)[:6])
        what = (
            f"unknown kind of file: schema '{named}'"
            if named
            else f"unknown kind of file: its top-level keys are {keys}"
        )
        raise RecipeError(
            what,
            f"known kinds: {', '.join(known.name for known in KINDS)}; a recipe has"
            f" {', '.join(SECTIONS)}",
            file=file,
        )
    is_base = kind.name == "recipe" and PurePath(file).name.startswith("_")
    return _BASE if is_base else kind


def wrong_kind(kind: Kind, expected: str, file: str) -> RecipeError:
    """Return the error for a file of another kind than was asked for."""
    what, wanted = f"is {kind.title}", kind_named(expected)
    title_says_it = expected == "recipe" and what.endswith("recipe")
    if wanted is not None and not title_says_it:
        what += f", not {wanted.title}"
    use = [kind.use] if expected != "accelerate" else []
    return RecipeError(what, *use, file=file)
