"""Which keys exist (lookups in the committed JSON Schema), what became of those that upstream
renamed or removed, and what flat configs call them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.kinds import SECTIONS
from recipes_lib.config.suggestions import near_names
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root


@lru_cache(maxsize=4)
def load_schema(kind: str = "recipe") -> JsonSchema:
    """Return the committed JSON Schema of a kind of file: recipe, eval or judge.

    Raises:
        RecipeError: the schema folder is not there.
    """
    path = project_root() / "schema" / f"{kind}.schema.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path} is missing", "write it with: make schema") from None


def subschema(*keys: str) -> JsonSchema | None:
    """Return the schema of a key such as `subschema("train", "learning_rate")`, or None if there is
    no such key.

    Keys of eval recipes follow `eval`, as in `subschema("eval", "generation", "temperature")`.
    """
    if keys[:1] == ("eval",):
        keys, found = keys[1:], load_schema("eval")
    else:
        found = load_schema()["$defs"]["document"]
    schema: JsonSchema | None = found
    for key in keys:
        schema = (schema or {}).get("properties", {}).get(key)
    return schema


def section_keys(*path: str) -> list[str]:
    """Return the keys of a section, or the sections themselves."""
    return list((subschema(*path) or {}).get("properties", {}))


def dotted_names(word: str) -> list[str]:
    """Return the dotted keys a bare word such as `learning_rate` or `--lora-r` may stand for:
    exact, renamed, or the nearest.

    Example:
        >>> dotted_names("learning_rate")
        ['train.learning_rate']
    """
    plain = word.lstrip("-").rpartition(".")[2].replace("-", "_")
    if plain in RENAMES:
        return [RENAMES[plain].new] if RENAMES[plain].new else []  # type: ignore[list-item]
    exact = [f"{section}.{plain}" for section in SECTIONS if plain in section_keys(section)]
    if not exact and plain in FLAT_NAMES:
        exact = [FLAT_NAMES[plain]]
    if exact:
        return exact
    everywhere = {key: section for section in reversed(SECTIONS) for key in section_keys(section)}
    return [f"{everywhere[near]}.{near}" for near in near_names(plain, everywhere)]


# Flags of `trl sft` outside SFTConfig -> the key in our section.
FLAT_NAMES = {
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "dtype": "model.dtype",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "dataset_name": "data.source",
    "dataset_path": "data.source",
    "dataset_config": "data.subset",
    "dataset_train_split": "data.source_split",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target_parameters": "lora.target_parameters",
    "lora_modules_to_save": "lora.modules_to_save",
    "lora_task_type": "lora.task_type",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "load_in_4bit": "quantization.load_in_4bit",
    "load_in_8bit": "quantization.load_in_8bit",
    "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "bnb_4bit_quant_type": "quantization.bnb_4bit_quant_type",
    "bnb_4bit_quant_storage": "quantization.bnb_4bit_quant_storage",
    "run_name": "run.name",
}

SHORT_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}


@dataclass(frozen=True)
class Rename:
    """What became of a key.

    `new` is the dotted key to write instead, or None when the key is gone; `note` says what to know
    about the value.
    """

    new: str | None
    since: str
    note: str = ""

    def message(self, old: str) -> str:
        """Return one line about what became of `old`."""
        fate = (
            f"was renamed to '{self.new}' in {self.since}"
            if self.new
            else f"was removed in {self.since}"
        )
        return f"'{old}' {fate}"


_T5 = "transformers 5"
_TRL = "TRL 1"

# Old name, as flat TRL files write it -> what became of it.
RENAMES = {
    "max_seq_length": Rename("train.max_length", _TRL),
    "torch_dtype": Rename("model.dtype", _T5),
    "warmup_ratio": Rename(
        "train.warmup_steps", _T5, "a number below 1 is a fraction of all steps"
    ),
    "group_by_length": Rename("train.train_sampling_strategy", _T5, "true -> group_by_length"),
    "evaluation_strategy": Rename("train.eval_strategy", _T5),
    "gradient_checkpointing": Rename("train.activation_checkpointing", _T5),
    "gradient_checkpointing_kwargs": Rename("train.activation_checkpointing_kwargs", _T5),
    "tokenizer": Rename(
        None,
        _TRL,
        "the trainer's argument is processing_class; the tokenizer comes with model.name_or_path",
    ),
    "overwrite_output_dir": Rename(
        None, _T5, "a run directory is never overwritten; choose another run.name"
    ),
    "logging_dir": Rename(None, _T5, "logs lie in the run directory"),
    "save_safetensors": Rename(None, _T5, "safetensors are always written"),
    "per_gpu_train_batch_size": Rename("train.per_device_train_batch_size", _T5),
    "per_gpu_eval_batch_size": Rename("train.per_device_eval_batch_size", _T5),
    "no_cuda": Rename("train.use_cpu", _T5),
    "dataset_batch_size": Rename(None, _TRL),
    "num_of_sequences": Rename(None, _TRL),
    "chars_per_token": Rename(None, _TRL),
    "neftune_alpha": Rename("train.neftune_noise_alpha", _TRL),
    "push_to_hub_model_id": Rename("train.hub_model_id", _T5),
    "push_to_hub_organization": Rename("train.hub_model_id", _T5, "write organisation/name"),
    "push_to_hub_token": Rename(None, _T5, "log in with 'hf auth login'"),
    "include_tokens_per_second": Rename(None, _T5, "tokens per second are always logged"),
    "use_mps_device": Rename(None, _T5, "the device is found by itself"),
    "use_flash_attention_2": Rename("model.attn_implementation", _T5, "true -> flash_attention_2"),
}
