"""The sections `train` and `lora`: TRL's and PEFT's own classes, as `make schema` wrote them to
`upstream.json`, so that `check` needs no torch. The functions at the end build the real objects.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field, create_model

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
}
_RENAMED = "renamed to train.{} in TRL 1 / transformers 5; for a whole old file: recipes migrate"
_OWN_LOADER = "this project's own data loader decides it"
_OWN_EVALUATION = "validation is this project's own: the loss of every token, in train.bf16 or fp16"
# Keys that upstream would take, and that the trainer of this project never asks for.
_WITHOUT_EFFECT = {
    "dataloader_drop_last": _OWN_LOADER,
    "dataloader_multiprocessing_context": _OWN_LOADER,
    "dataloader_in_order": _OWN_LOADER,
    "length_column_name": "lengths are those of the prepared rows",
    "eval_packing": _OWN_EVALUATION,
    "bf16_full_eval": _OWN_EVALUATION,
    "fp16_full_eval": _OWN_EVALUATION,
    "eval_accumulation_steps": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "batch_eval_metrics": _OWN_EVALUATION,
    "include_for_metrics": _OWN_EVALUATION,
    "prediction_loss_only": _OWN_EVALUATION,
}
# What no recipe sets, by the beginning of its name, and why.
_NOT_OURS = {
    "train": (
        "(output_dir|run_name|resume_|local_rank|save_only|do_|ignore_data|auto_find|fsdp|deepspeed"
        "|parallelism|accelerator_|model_init|trust_|chat_template|dataset_(text|kwargs)|enable_jit"
        "|push_to_hub|hub_)",
        "the sections model, data, run and launch (accelerate: fsdp) or recipes export decide it",
    ),
    "lora": (
        r"(base_model|peft_|auto_mapping|revision|inference_|use_bdlora|megatron_|\w+_config$)",
        "PEFT sets it itself, or it belongs to a LoRA variant with its own config",
    ),
}

_AtLeast1 = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no other
_STARTS = "^(gaussian|orthogonal|olora|pissa)$"
# Types that are narrower than upstream's annotation: what it accepts and cannot work with.
_NARROWER: dict[str, dict[str, object]] = {
    "train": {
        "per_device_train_batch_size": _AtLeast1,
        "per_device_eval_batch_size": _AtLeast1,
        "gradient_accumulation_steps": _AtLeast1,
        "dataloader_num_workers": Annotated[int, Field(ge=0, le=64)],
        "learning_rate": Annotated[float, Field(gt=0, le=100)],  # at 1e38 a step leaves float32
        "neftune_noise_alpha": _NotNegative | None,
        **dict.fromkeys(("max_length", "save_total_limit"), _AtLeast1 | None),
        **dict.fromkeys(("num_train_epochs", "save_steps"), _Positive),
        # a negative one turns gradients round, or lets weights grow
        **dict.fromkeys(("max_grad_norm", "weight_decay", "adam_epsilon"), _NotNegative),
        **dict.fromkeys(("adam_beta1", "adam_beta2"), Annotated[float, Field(ge=0, lt=1)]),
        # "best" leaves a killed run without a checkpoint to go on from
        "save_strategy": Literal["no", "steps", "epoch"],
        "seed": _Seed,
        "data_seed": _Seed | None,
        # a validation measures the loss alone
        "metric_for_best_model": Literal["loss", "eval_loss"] | None,
        # batch_rebalance deals out the rows of a step by the number of processes
        "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
        # true hides the step on which the loss stopped being a number
        "logging_nan_inf_filter": Literal[False],
    },
    "lora": {
        "task_type": Literal["CAUSAL_LM"],
        **dict.fromkeys(("r", "lora_alpha"), _AtLeast1),
        # eva, corda, loftq and others need a config and rows of their own; pissa_niter changes the
        # base by random numbers, by others at each loading
        "init_lora_weights": bool | Annotated[str, Field(pattern=_STARTS)],
    },
}


class _Described(Section):
    model_config = ConfigDict(use_attribute_docstrings=False)  # looking for texts takes 15 ms


def _section(name: str, fields: dict[str, Values]) -> type[Section]:
    """Return the model of a section; its types are text, which pydantic reads."""
    ours, renames = (TRAIN_DEFAULTS, RENAMES) if name == "train" else ({}, {})
    pattern, why = _NOT_OURS[name]
    gone = {key: why for key in fields if re.match(pattern, key)}
    if name == "train":
        gone |= _WITHOUT_EFFECT
    gone |= {old: _RENAMED.format(new) for old, new in renames.items()}
    keys = {
        key: (
            _NARROWER[name].get(key, field["type"]),
            Field(ours.get(key, field.get("default")), description=field["description"]),
        )
        for key, field in fields.items()
        if key not in gone
    }
    title = f"{name.capitalize()}Section"
    model = create_model(title, __base__=_Described, __module__=__name__, **keys)  # type: ignore[call-overload]
    model.__doc__ = f"`{CLASSES[name]}`, key by key."
    model.gone = gone
    return model


if TYPE_CHECKING:
    TrainSection = Section
    LoraSection = Section
else:
    _FIELDS = json.loads(UPSTREAM_FILE.read_text("utf-8"))
    TrainSection, LoraSection = (_section(name, _FIELDS[name]) for name in CLASSES)


def build_sft_config(recipe: Recipe, output_dir: str | Path, world_size: int) -> SFTConfig:
    """Return TRL's arguments for `world_size` processes on this machine; do not change them."""
    from trl import SFTConfig

    # the Trainer would compile the model as a whole; `training.compiled` does it block by block
    values = {key: recipe.train[key] for key in recipe.train if key not in COMPILE_KEYS}
    values["use_cpu"] = values.get("use_cpu", False) or not has_accelerator()
    if values["use_cpu"] and values.get("fp16"):
        what = "train.fp16 does nothing on a CPU: it would silently train in float32"
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
    # one process on several GPUs: transformers would spread each micro-batch (DataParallel)
    config._n_gpu = min(config.n_gpu, 1)
    _check_optimizer(recipe, config)
    return config


def _check_optimizer(recipe: Recipe, config: SFTConfig) -> None:
    """Let transformers refuse an optimizer or a schedule now: it would once the model is loaded."""
    import torch
    from transformers import Trainer, get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.learning_rate)
    schedule = config.lr_scheduler_type, optimizer, 1, 10**6, config.lr_scheduler_kwargs
    if not config.optim_target_modules and "lomo" not in config.optim:  # these ask for the model
        _built(recipe, "train.optim", lambda: Trainer.get_optimizer_cls_and_kwargs(config))
    _built(recipe, "train.lr_scheduler_kwargs", lambda: get_scheduler(*schedule))


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


def _built(recipe: Recipe, key: str, build: Callable[[], _Built]) -> _Built:
    """Return upstream's object, or raise its refusal at the key or section."""
    try:
        return build()
    except (ValueError, TypeError, AttributeError, NotImplementedError, ImportError) as error:
        raise refused(recipe, key, error) from None


def check_packages(recipe: Recipe) -> None:
    """Refuse a package that is not installed and that upstream misses once the model is loaded."""
    named = recipe.train.get("report_to") or []
    trackers = {*([named] if isinstance(named, str) else named)} - {"none", "azure_ml", "flyte"}
    packages = dict.fromkeys(trackers, "train.report_to")
    if recipe.train.get("use_liger_kernel"):
        packages["liger_kernel"] = "train.use_liger_kernel"
    for package, key in packages.items():
        if not importlib.util.find_spec(package):
            what = f"{key}: {package} is not installed"
            raise recipe.fault(key, what, f"pip install {package}, or remove the key")


def has_accelerator() -> bool:
    """Whether a GPU (or another accelerator) is there and the launcher did not ask for the CPU."""
    import torch

    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return not asked_for_cpu and bool(torch.accelerator.is_available())


def refused(recipe: Recipe, key: str, error: Exception) -> RecipeError:
    """Return upstream's refusal, of a section at the key it speaks about."""
    message = one_line(error)
    values = getattr(recipe, key, None) or {}
    words = message.replace(" ", "_").lower()  # Target modules {'x'} not found
    named = [name for name in values if re.search(rf"(?<![^\W_]){name}(?![^\W_])", words)]
    place = f"{key}.{max(named, key=len)}" if named else key
    return recipe.error(place, f"{key}: {message}")
