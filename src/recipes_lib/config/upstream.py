"""The sections `train` and `lora`: TRL's and PEFT's own classes.

Their keys, types, defaults and texts are in `upstream.json`, which `make schema` writes from the
installed versions, so that a recipe is checked without torch. The functions at the end build the
real objects: upstream has the last word.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, create_model

from recipes_lib.config.documents import Values
from recipes_lib.config.launch import accumulation_steps
from recipes_lib.config.parsing import Section
from recipes_lib.core.errors import RecipeError, one_line

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    from recipes_lib.config.recipe import Recipe

UPSTREAM_FILE = Path(__file__).with_name("upstream.json")
CLASSES = {"train": "trl.SFTConfig", "lora": "peft.LoraConfig"}
_Built = TypeVar("_Built")
COMPILE_KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
# Project defaults for `train` that differ from TRL's; none changes the declared mathematics.
TRAIN_DEFAULTS = {
    # recomputing activations costs speed (about 20% by TRL's figure)
    "activation_checkpointing": False,
    # upstream replaces a NaN loss by an earlier mean, so that a broken run looks fine
    "logging_nan_inf_filter": False,
    # a LoRA step uses every trainable parameter; searching for unused ones costs time
    "ddp_find_unused_parameters": False,
}
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
_DECIDED = "the run (run.name), the launcher (launch.accelerate: fsdp) or the trainer decides it"
_HUB = "log in with 'hf auth login'; recipes export RUN --to FOLDER --push-to-hub OWNER/NAME"
# What no recipe says, of today's classes and of earlier ones -> what to write or know instead.
INSTEAD: dict[str, dict[str, str]] = {
    "train": {
        **{old: _RENAMED.format(new) for old, new in RENAMES.items()},
        "warmup_ratio": "write train.warmup_steps; a number below 1 is a fraction",
        "model_init_kwargs": "write model.kwargs",
        "trust_remote_code": "write model.trust_remote_code, and pass --trust-remote-code",
        "chat_template_path": "write data.chat_template",
        "dataset_text_field": "write data.columns: {text: NAME}",
        "lr": "write train.learning_rate",
        "epochs": "write train.num_train_epochs",
        "batch_size": "write train.per_device_train_batch_size, or run.global_batch_size",
        "push_to_hub": _HUB,
        **{f"hub_{key}": _HUB for key in ("model_id", "strategy", "always_push", "private_repo")},
        **{f"hub_{key}": _HUB for key in ("revision", "token")},
        **{f"do_{key}": _DECIDED for key in ("train", "eval", "predict")},
        **dict.fromkeys(("output_dir", "overwrite_output_dir", "run_name"), _DECIDED),
        **dict.fromkeys(("logging_dir", "resume_from_checkpoint", "local_rank"), _DECIDED),
        **dict.fromkeys(("fsdp", "fsdp_config", "parallelism_config", "deepspeed"), _DECIDED),
        **dict.fromkeys(("enable_jit_checkpoint", "save_only_model"), _DECIDED),
        **dict.fromkeys(("accelerator_config", "ignore_data_skip"), _DECIDED),
        **dict.fromkeys(("auto_find_batch_size", "dataset_kwargs"), _DECIDED),
    },
    "lora": {"rank": "write lora.r"}
    | dict.fromkeys(
        (
            *("base_model_name_or_path", "peft_type", "inference_mode", "auto_mapping"),
            *("peft_version", "revision", "eva_config", "corda_config", "loftq_config"),
            *("lora_ga_config", "velora_config", "monteclora_config", "arrow_config"),
            *("kasa_config", "runtime_config", "use_bdlora", "megatron_config", "megatron_core"),
        ),
        "PEFT writes it by itself, or it is of a kind of LoRA with a config of its own",
    ),
}

# What torch's and TRL's activation checkpointing take.
_Checkpointing = Literal[
    "use_reentrant", "preserve_rng_state", "early_stop", "every_n_layers", "offload"
]
_AtLeast1 = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no other
_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size")
# Types that are narrower than upstream's annotation: what it accepts and cannot work with.
_NARROWER: dict[str, dict[str, object]] = {
    "train": {
        **dict.fromkeys((*_SIZES, "gradient_accumulation_steps"), _AtLeast1),
        **dict.fromkeys(("max_length", "save_total_limit"), _AtLeast1 | None),
        **dict.fromkeys(("num_train_epochs", "save_steps"), _Positive),
        # a step of Adam divides it by 1 - beta1, in float32
        "learning_rate": Annotated[float, Field(gt=0, le=1e30)],
        "max_steps": Literal[-1] | _AtLeast1,
        "eval_steps": _Positive | None,
        **dict.fromkeys(("max_grad_norm", "weight_decay"), _NotNegative),
        **dict.fromkeys(("adam_beta1", "adam_beta2"), _Fraction),
        # "best" leaves a killed run without a checkpoint to go on from
        "save_strategy": Literal["no", "steps", "epoch"],
        "seed": _Seed,
        "data_seed": _Seed | None,
        "activation_checkpointing_kwargs": dict[_Checkpointing, bool | int | None] | None,
        # a validation measures the loss alone
        "metric_for_best_model": Literal["loss", "eval_loss"] | None,
        # batch_rebalance deals out the rows of a step by the number of processes
        "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
        # true hides the step on which the loss stopped being a number
        "logging_nan_inf_filter": Literal[False],
    },
    "lora": {
        "task_type": Literal["CAUSAL_LM"],
        "r": Annotated[int, Field(ge=1, le=2**16)],  # wider than any layer
        "lora_alpha": _AtLeast1,
        "lora_dropout": _Fraction,
        # eva, corda, loftq and others need a config and rows of their own
        "init_lora_weights": bool
        | Literal["gaussian", "orthogonal", "olora", "pissa"]
        | Annotated[str, Field(pattern="^pissa_niter_[0-9]+$")],
    },
}


@lru_cache(maxsize=1)
def upstream_fields() -> dict[str, dict[str, Values]]:
    """Return the keys of the two sections, each with its type, text and default."""
    fields: dict[str, dict[str, Values]] = json.loads(UPSTREAM_FILE.read_text(encoding="utf-8"))
    return fields


def upstream_default(section: str, key: str) -> Any:
    """Return the value that a key has where a recipe does not say it."""
    ours = TRAIN_DEFAULTS if section == "train" else {}
    return ours.get(key, upstream_fields()[section][key].get("default"))


def _section(name: str) -> type[Section]:
    """Return the model of a section; its types are text, which pydantic reads."""
    fields = {
        key: (
            _NARROWER[name].get(key, field["type"]),
            Field(upstream_default(name, key), description=field["description"]),
        )
        for key, field in upstream_fields()[name].items()
        if key not in INSTEAD[name]
    }
    title = f"{name.capitalize()}Section"
    model = create_model(title, __base__=Section, __module__=__name__, **fields)  # type: ignore[call-overload]
    model.__doc__ = f"`{CLASSES[name]}`, key by key."
    model.gone = INSTEAD[name]
    return model


if TYPE_CHECKING:
    TrainSection = Section
    LoraSection = Section
else:
    TrainSection, LoraSection = map(_section, CLASSES)


def build_sft_config(recipe: Recipe, output_dir: str | Path, world_size: int) -> SFTConfig:
    """Return TRL's arguments for `world_size` processes on this machine; nobody changes one."""
    from trl import SFTConfig

    # the Trainer would compile the model as a whole; `training.compiled` does it block by block
    values = {key: recipe.train[key] for key in recipe.train if key not in COMPILE_KEYS}
    values["use_cpu"] = values.get("use_cpu", False) or not has_accelerator()
    if values["use_cpu"] and (values.get("fp16") or values.get("fp16_full_eval")):
        what = "train.fp16 does nothing on a CPU: it would train in float32 and say nothing"
        raise recipe.error("train.fp16", what, "use train.bf16: true")
    values["gradient_accumulation_steps"] = accumulation_steps(recipe, world_size)
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
    }
    config = _built(recipe, "train", lambda: SFTConfig(**values))
    # One process on a machine with several GPUs: transformers would spread each micro-batch over
    # all of them (nn.DataParallel), so that a step had as many times the examples that were
    # declared.
    config._n_gpu = min(config.n_gpu, 1)
    _check_optimizer(recipe, config)
    return config


def _check_optimizer(recipe: Recipe, config: SFTConfig) -> None:
    """Let transformers refuse an optimizer or a schedule now: it would once the model is loaded."""
    import torch
    from transformers import Trainer, get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.learning_rate)
    key = "train.optim"
    try:
        Trainer.get_optimizer_cls_and_kwargs(config)
        key = "train.lr_scheduler_kwargs"
        get_scheduler(config.lr_scheduler_type, optimizer, 1, 10**6, config.lr_scheduler_kwargs)
    except (ImportError, ValueError, TypeError) as error:
        if "need to pass a" not in str(error):  # some ask for the model, which comes later
            raise recipe.error(key, f"{key}: {one_line(error)}") from None


def build_lora_config(recipe: Recipe) -> LoraConfig | None:
    """Return PEFT's config, or None for full fine-tuning."""
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    values = {"task_type": "CAUSAL_LM", **recipe.lora}
    return _built(recipe, "lora", lambda: LoraConfig(**values))


def build_quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes config, or None when the weights stay as they are."""
    if recipe.quantization is None:
        return None
    from transformers import BitsAndBytesConfig

    values = recipe.quantization
    return _built(recipe, "quantization", lambda: BitsAndBytesConfig(**values))


def _built(recipe: Recipe, section: str, build: Callable[[], _Built]) -> _Built:
    """Return upstream's object, or raise its refusal at the key of the section."""
    try:
        return build()
    except (ValueError, TypeError, AttributeError, NotImplementedError, ImportError) as error:
        raise refused(recipe, section, error) from None


def check_packages(recipe: Recipe) -> None:
    """Refuse a package that is not installed and that upstream misses once the model is loaded."""
    from transformers.integrations import integration_utils  # torch

    named = recipe.train.get("report_to") or []
    missing = {*([named] if isinstance(named, str) else named)} - {"none", "flyte"}
    missing -= {*integration_utils.get_available_reporting_integrations()}
    key = "train.report_to"
    if recipe.train.get("use_liger_kernel") and not importlib.util.find_spec("liger_kernel"):
        missing, key = {"liger-kernel"}, "train.use_liger_kernel"
    for package in missing:
        what = f"{key}: {package} is not installed"
        raise recipe.fault(key, what, f"pip install {package}, or remove the key")


def has_accelerator() -> bool:
    """Whether a GPU (or another accelerator) is there and the launcher did not ask for the CPU."""
    import torch

    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return not asked_for_cpu and bool(torch.accelerator.is_available())


def refused(recipe: Recipe, section: str, error: Exception, *hints: str) -> RecipeError:
    """Return upstream's refusal at the key it speaks about."""
    message = one_line(error)
    values = getattr(recipe, section) or {}
    words = message.replace(" ", "_").lower()  # Target modules {'x'} not found
    named = [key for key in values if re.search(rf"(?<![^\W_]){re.escape(key)}(?![^\W_])", words)]
    key = f"{section}.{max(named, key=len)}" if named else section
    return recipe.error(key, f"{section}: {message}", *hints)
