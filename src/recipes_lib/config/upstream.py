"""The sections `train`, `lora` and `quantization`: TRL's, PEFT's and transformers' own classes.

Their keys, types, defaults and texts stand in `upstream.json`, which `make schema` writes from the
installed versions, so that a recipe is checked without torch. The functions at the end build the
real objects: upstream has the last word. What is derived there and nowhere else: the accumulation
steps from the batch, `use_cpu` from the device, `max_length` where rows arrive truncated.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import re
import typing
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, create_model

from recipes_lib.config.batch import accumulation_steps
from recipes_lib.config.parsing import Section
from recipes_lib.core.errors import RecipeError, one_line

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    from recipes_lib.config.recipe import Recipe

UPSTREAM_FILE = Path(__file__).with_name("upstream.json")
CLASSES = {
    "train": "trl.SFTConfig",
    "lora": "peft.LoraConfig",
    "quantization": "transformers.BitsAndBytesConfig",
}
COMPILE_KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
# Values of `lora.init_lora_weights` whose adapters start from random numbers or zeros, and not from
# the weights of the base.
STARTS_WITHOUT_WEIGHTS = (True, False, "gaussian", "orthogonal")
# Project defaults for `train` that differ from TRL's; none changes the declared mathematics.
TRAIN_DEFAULTS = {
    # recomputing activations costs speed (about 20% by TRL's figure)
    "activation_checkpointing": False,
    # upstream replaces a NaN loss by an earlier mean, so that a broken run looks fine
    "logging_nan_inf_filter": False,
    # a LoRA step uses every trainable parameter; searching for unused ones costs time
    "ddp_find_unused_parameters": False,
}
# Part of an optimizer's name -> the package that transformers imports for it, once it is made.
_OPTIMIZER_PACKAGES = {
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
    "anyprecision": "torchdistx",
    "schedule_free": "schedulefree",
    "torch_4bit": "torchao",
    "torch_8bit": "torchao",
}
NO_TRACKERS = {"none", "all", "flyte"}  # transformers does not say whether flyte is there
# Old key of `train` -> the key since TRL 1 and transformers 5.
RENAMES = {
    "max_seq_length": "max_length",
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "no_cuda": "use_cpu",
}
_RENAMED = "it is train.{} since TRL 1 / transformers 5; for a whole old file: recipes migrate"
_LAUNCHER = "the launcher and its accelerate config decide it; see launch.accelerate"
_PEFTS_OWN = ("peft_type", "inference_mode", "auto_mapping", "peft_version", "revision")
_MEGATRON = ("megatron_config", "megatron_core")
# What no recipe says, of today's classes and of earlier ones -> what to write or know instead.
INSTEAD: dict[str, dict[str, str]] = {
    "train": {
        **{old: _RENAMED.format(new) for old, new in RENAMES.items()},
        "warmup_ratio": "write train.warmup_steps; a number below 1 is a fraction",
        "output_dir": "the run directory is runs/<run.name>; set run.name",
        "overwrite_output_dir": "a run directory is never overwritten; choose another run.name",
        "run_name": "set run.name",
        "logging_dir": "logs are in the run directory",
        "resume_from_checkpoint": "the same command resumes from the newest complete checkpoint",
        "do_train": "recipes train always trains",
        "do_eval": "set train.eval_strategy",
        "do_predict": "evaluation has its own verb: recipes eval",
        "hub_token": "a secret never belongs in a file; log in with 'hf auth login'",
        "model_init_kwargs": "write model.kwargs",
        "trust_remote_code": "write model.trust_remote_code, and pass --trust-remote-code",
        "torch_dtype": "write model.dtype",
        "chat_template_path": "write data.chat_template",
        "dataset_text_field": "write data.columns: {text: NAME}",
        "dataset_kwargs": "rows are prepared by recipes_lib.data",
        "group_by_length": "write train.train_sampling_strategy: group_by_length",
        "lr": "write train.learning_rate",
        "epochs": "write train.num_train_epochs",
        "batch_size": "write train.per_device_train_batch_size, or run.global_batch_size",
        "deepspeed": "DeepSpeed is not supported; write launch.accelerate: fsdp",
        "enable_jit_checkpoint": "upstream's leaves a half-trained model; runs stop on SIGTERM",
        "ignore_data_skip": "a resumed run sees the rows it would have seen",
        "auto_find_batch_size": "it would change the examples per step without a word",
        **dict.fromkeys(("local_rank", "fsdp", "fsdp_config", "parallelism_config"), _LAUNCHER),
    },
    "lora": {
        "alpha": "write lora.lora_alpha",
        "dropout": "write lora.lora_dropout",
        "base_model_name_or_path": "write model.name_or_path",
        **dict.fromkeys(_PEFTS_OWN, "PEFT writes it into the saved adapter by itself"),
        **dict.fromkeys(_MEGATRON, "Megatron is not supported"),
    },
    "quantization": {},
}


class CheckpointingKwargs(Section):
    """What torch's and TRL's activation checkpointing take."""

    use_reentrant: bool | None = None
    preserve_rng_state: bool | None = None
    determinism_check: Literal["default", "none"] | None = None
    early_stop: bool | None = None
    every_n_layers: int | None = Field(None, ge=1)
    offload: bool | None = None
    selective: bool | None = None


class GradientAccumulation(Section):
    """When FSDP2 shares out gradients; the steps are `train.gradient_accumulation_steps`."""

    sync_each_batch: bool | None = None


class AcceleratorSection(Section):
    """What accelerate may be told. Its other settings decide which rows a step sees, by the number
    of processes.
    """

    non_blocking: bool = False
    gradient_accumulation_kwargs: GradientAccumulation | None = None


_AtLeast1 = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no other
_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size")
# Types that are narrower than upstream's annotation: what it accepts and cannot work with.
_NARROWER: dict[str, dict[str, Any]] = {
    "train": {
        **dict.fromkeys((*_SIZES, "gradient_accumulation_steps"), _AtLeast1),
        **dict.fromkeys(("max_length", "save_total_limit"), _AtLeast1 | None),
        **dict.fromkeys(("num_train_epochs", "learning_rate", "save_steps"), _Positive),
        "max_steps": Literal[-1] | _AtLeast1,
        "eval_steps": _Positive | None,
        "max_grad_norm": Annotated[float, Field(ge=0)],
        "label_smoothing_factor": Annotated[float, Field(ge=0, lt=1)],
        "seed": _Seed,
        "data_seed": _Seed | None,
        "accelerator_config": AcceleratorSection | None,
        "activation_checkpointing_kwargs": CheckpointingKwargs | None,
        # batch_rebalance deals out the rows of a step by the number of processes
        "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
        # true hides the step on which the loss stopped being a number
        "logging_nan_inf_filter": Literal[False],
    },
    "lora": {
        "task_type": Literal["CAUSAL_LM"],
        "r": Annotated[int, Field(ge=1, le=2**16)],  # wider than any layer
        "lora_alpha": _AtLeast1,
        "init_lora_weights": bool
        | Literal["gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica"]
        | Annotated[str, Field(pattern="^pissa_niter_[0-9]+$")],
    },
    "quantization": {
        "bnb_4bit_compute_dtype": Literal["float32", "bfloat16", "float16"],
        "bnb_4bit_quant_type": Literal["fp4", "nf4"],
    },
}


@lru_cache(maxsize=1)
def upstream_fields() -> dict[str, dict[str, Any]]:
    """Return the keys of the three sections, each with its JSON Schema and default."""
    fields: dict[str, dict[str, Any]] = json.loads(UPSTREAM_FILE.read_text(encoding="utf-8"))
    return fields


def upstream_default(section: str, key: str) -> Any:
    """Return the value that a key has where a recipe does not say it.

    Example:
        >>> upstream_default("train", "per_device_train_batch_size")
        8
    """
    ours = TRAIN_DEFAULTS if section == "train" else {}
    return ours.get(key, upstream_fields()[section][key].get("default"))


def _section(name: str) -> type[Section]:
    """Return the model of a section."""
    defaults = TRAIN_DEFAULTS if name == "train" else {}
    fields: dict[str, Any] = {}
    for key, schema in upstream_fields()[name].items():
        if key not in INSTEAD[name]:
            default = defaults.get(key, schema.get("default"))
            kind = _NARROWER[name].get(key) or _type(schema)
            fields[key] = (kind, Field(default, description=schema.get("description")))
    model = create_model(f"{name.capitalize()}Section", __base__=Section, **fields)
    model.__doc__ = f"`{CLASSES[name]}`, key by key."
    model.gone = INSTEAD[name]
    return model


def _type(schema: dict[str, Any]) -> Any:
    """Return the annotation of a JSON Schema."""
    if "anyOf" in schema:
        return Union[tuple(_type(part) for part in schema["anyOf"])]  # noqa: UP007
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    if schema.get("type") == "array":
        return list[_type(schema["items"])] if "items" in schema else list[Any]  # type: ignore[misc]
    kinds = {"integer": int, "number": float, "string": str, "boolean": bool, "null": None}
    return kinds.get(schema.get("type", ""), dict[str, Any])


if TYPE_CHECKING:

    class TrainSection(Section):
        """Made of upstream.json."""

    class LoraSection(Section):
        """Made of upstream.json."""

    class QuantizationSection(Section):
        """Made of upstream.json."""

else:
    TrainSection = _section("train")
    LoraSection = _section("lora")
    QuantizationSection = _section("quantization")


def build_sft_config(recipe: Recipe, output_dir: str | Path, world_size: int) -> SFTConfig:
    """Return TRL's arguments for this recipe on this machine: all of them, nobody changes one
    later.

    Args:
        output_dir: where checkpoints go.
        world_size: number of processes, for the accumulation steps.

    Raises:
        RecipeError: the batch does not divide, or TRL refuses the values.
    """
    from trl import SFTConfig

    # the Trainer would compile the model as a whole; `training.compiled` does it block by block
    values = {key: recipe.train[key] for key in recipe.train if key not in COMPILE_KEYS}
    values["use_cpu"] = values.get("use_cpu", False) or not has_accelerator()
    if values["use_cpu"] and (values.get("fp16") or values.get("fp16_full_eval")):
        raise recipe.error(
            "train.fp16",
            "train.fp16 does nothing on a CPU: it would train in float32 and say nothing",
            "use train.bf16: true",
        )
    if values["use_cpu"] and recipe.model.attn_implementation == "flex_attention":
        key = "model.attn_implementation"
        raise recipe.error(key, f"{key} flex_attention has no backward pass on a CPU", "use sdpa")
    if checkpointing := values.get("activation_checkpointing_kwargs"):
        # `training.build.keep_attention` does it; TRL would end the run under PEFT
        how = {key: value for key, value in checkpointing.items() if key != "selective"}
        values["activation_checkpointing_kwargs"] = how or None
    values["gradient_accumulation_steps"] = accumulation_steps(recipe, world_size)
    if values.get("assistant_only_loss"):
        # the labels say it already; TRL looks for conversations in the rows
        values["assistant_only_loss"] = False
    if values.get("padding_free") and not values.get("packing"):
        # rows arrive truncated; TRL refuses a limit that it would not apply
        values["max_length"] = None
    values |= {
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "output_dir": str(output_dir),
        "run_name": recipe.name,
        # our own rotation keeps that many; it never deletes the last complete checkpoint
        "save_total_limit": None,
        # only checked weights are pushed (`training.hub`), never a checkpoint
        "push_to_hub": False,
    }
    try:
        config = SFTConfig(**values)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise refused(recipe, "train", error) from None
    # One process on a machine with several GPUs: transformers would spread each micro-batch over
    # all of them (nn.DataParallel), so that a step had as many times the examples that were
    # declared.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def build_lora_config(recipe: Recipe) -> LoraConfig | None:
    """Return PEFT's config, or None for full fine-tuning.

    Raises:
        RecipeError: PEFT refuses the values.
    """
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    values = {"task_type": "CAUSAL_LM", **recipe.lora}
    hints = typing.get_type_hints(LoraConfig)
    try:
        for key, value in values.items():
            members = typing.get_args(hints[key])
            kinds = [kind for kind in (hints[key], *members) if dataclasses.is_dataclass(kind)]
            if isinstance(value, dict) and kinds and dict not in members:
                values[key] = kinds[0](**value)  # type: ignore[operator]
        return LoraConfig(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise refused(recipe, "lora", error) from None


def build_quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes config, or None when the weights stay as they are.

    Raises:
        RecipeError: transformers refuses the values.
    """
    if recipe.quantization is None:
        return None
    from transformers import BitsAndBytesConfig

    parameters = inspect.signature(BitsAndBytesConfig).parameters
    values = {
        key: float(value) if isinstance(parameters[key].default, float) else value
        for key, value in recipe.quantization.items()
    }
    try:
        return BitsAndBytesConfig(**values)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise refused(recipe, "quantization", error) from None


def check_packages(recipe: Recipe) -> None:
    """Refuse a tracker or another optional package that the recipe asks for and that is not
    installed, before anything is loaded.

    Raises:
        EnvironmentFault: with its name.
    """
    needed = {}
    if recipe.train.get("use_liger_kernel"):
        needed["liger_kernel"] = "train.use_liger_kernel"
    if "/" in (recipe.model.attn_implementation or ""):
        needed["kernels"] = "model.attn_implementation"
    optimizer = str(recipe.train.get("optim", ""))
    for word, package in _OPTIMIZER_PACKAGES.items():
        if word in optimizer:
            needed[package] = "train.optim"
    for package, key in needed.items():
        if importlib.util.find_spec(package) is None:
            what = f"{key} needs the package {package}, which is not installed"
            raise recipe.fault(key, what, f"pip install {package}, or remove the key")
    named = recipe.train.get("report_to") or []
    if trackers := {*([named] if isinstance(named, str) else named)} - NO_TRACKERS:
        from transformers.integrations import integration_utils  # torch

        missing = trackers - {*integration_utils.get_available_reporting_integrations()}
        if missing:
            what = f"train.report_to: {', '.join(sorted(missing))} is not installed"
            hint = "pip install -c constraints.txt -e '.[tracking]' brings tensorboard, trackio and"
            raise recipe.fault("train.report_to", what, f"{hint} wandb; or train.report_to=none")


def has_accelerator() -> bool:
    """Whether a GPU (or another accelerator) is there and the launcher did not ask for the CPU."""
    import torch

    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return not asked_for_cpu and bool(torch.accelerator.is_available())


def refused(recipe: Recipe, section: str, error: Exception, *hints: str) -> RecipeError:
    """Return upstream's refusal at the key it speaks about."""
    message = one_line(error)
    if "support bf16" in message:
        hint = "set train.bf16: false (and train.fp16: true on a GPU)"
        return recipe.error("train.bf16", "train.bf16: this device has no bfloat16", hint)
    values = getattr(recipe, section) or {}
    named = [key for key in values if re.search(rf"\b{re.escape(key)}\b", message)]
    key = f"{section}.{max(named, key=len)}" if named else section
    return recipe.error(key, f"{section}: {message}", *hints)
