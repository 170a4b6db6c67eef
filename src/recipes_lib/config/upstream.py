"""Upstream's own objects of a recipe, and what upstream refuses, as errors at the key."""

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from recipes_lib.config.launch import asks_for
from recipes_lib.config.recipe import DPO, Recipe, accumulation_steps
from recipes_lib.core.errors import RecipeError, one_line

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import DPOConfig, SFTConfig

_Built = TypeVar("_Built")
COMPILE_KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def build_train_config(
    recipe: Recipe, output_dir: str | Path, world_size: int
) -> "SFTConfig | DPOConfig":
    """Return TRL's arguments for `world_size` processes on this machine; do not change them."""
    import torch
    from transformers import Trainer, get_scheduler
    from trl import DPOConfig, SFTConfig

    # the Trainer would compile the model as a whole; `training.compiled` does it block by block
    values = {key: value for key, value in recipe.train.items() if key not in COMPILE_KEYS}
    values["use_cpu"] = values.get("use_cpu", False) or not has_accelerator()
    if values["use_cpu"] and values.get("fp16"):
        what = "train.fp16 does nothing on a CPU: it would silently train in float32"
        raise recipe.error("train.fp16", what, "use train.bf16: true")
    values["gradient_accumulation_steps"] = accumulation_steps(recipe, world_size)
    config_class: type[SFTConfig | DPOConfig] = SFTConfig
    if recipe.stage == DPO:
        config_class = DPOConfig
        values["max_length"] = None  # rows arrive truncated
    else:
        # the labels say it already; TRL looks for conversations in the rows
        values["assistant_only_loss"] = False
        values["dataset_kwargs"] = {"skip_prepare_dataset": True}
        if values.get("padding_free") and not values.get("packing"):
            # rows arrive truncated; TRL refuses a limit that it would not apply
            values["max_length"] = None
    values |= {
        "output_dir": str(output_dir),
        "run_name": recipe.name,
        # our own rotation keeps that many; it never deletes the last complete checkpoint
        "save_total_limit": None,
    }
    config = _built(recipe, "train", lambda: config_class(**values))
    # one process on several GPUs: transformers would spread each micro-batch (DataParallel)
    config._n_gpu = min(config.n_gpu, 1)
    # made and thrown away: what transformers would refuse only once the model is loaded
    if not config.optim_target_modules and "lomo" not in config.optim:  # these ask for the model
        _built(recipe, "train.optim", lambda: Trainer.get_optimizer_cls_and_kwargs(config))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.learning_rate)
    kwargs = config.lr_scheduler_kwargs
    build = partial(get_scheduler, config.lr_scheduler_type, optimizer, 1, 10**6, kwargs)
    _built(recipe, "train.lr_scheduler_kwargs", build)
    return config


def build_lora_config(recipe: Recipe) -> "LoraConfig | None":
    """Return PEFT's config, or None for full fine-tuning."""
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    values = {"task_type": "CAUSAL_LM", **recipe.lora}
    return _built(recipe, "lora", lambda: LoraConfig(**values))


def build_quantization_config(recipe: Recipe) -> "BitsAndBytesConfig | None":
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
    trackers = recipe.train.get("report_to") or []
    if isinstance(trackers, str):
        trackers = [trackers]
    # the packages of azure_ml and flyte have other names
    packages = dict.fromkeys(trackers, "train.report_to")
    for other in ("none", "azure_ml", "flyte"):
        packages.pop(other, None)
    if recipe.train.get("use_liger_kernel"):
        packages["liger_kernel"] = "train.use_liger_kernel"
    for package, key in packages.items():
        if not importlib.util.find_spec(package):
            what = f"{key}: {package} is not installed"
            raise recipe.document.fault(key, what, f"pip install {package}, or remove the key")
    if recipe.model.use_kernels:
        from transformers.utils import import_utils as limits

        if not limits.is_kernels_available():
            wanted = f"kernels>={limits.KERNELS_MIN_VERSION},<{limits.KERNELS_MAX_VERSION}"
            what = f"model.use_kernels: transformers needs {wanted}"
            hint = f"pip install '{wanted}', or remove the key"
            raise recipe.document.fault("model.use_kernels", what, hint)


def autocast_dtype(args: "SFTConfig | DPOConfig") -> "torch.dtype | None":
    """Return the type of mixed precision; None without."""
    import torch

    if args.fp16:
        return torch.float16
    return torch.bfloat16 if args.bf16 else None


def has_accelerator() -> bool:
    """Whether a GPU (or another accelerator) is there and the launcher did not ask for the CPU."""
    import torch

    return not asks_for("ACCELERATE_USE_CPU") and bool(torch.accelerator.is_available())


def refused(recipe: Recipe, key: str, error: Exception) -> RecipeError:
    """Return upstream's refusal, of a section at the key it speaks about."""
    message = one_line(error)
    values = getattr(recipe, key, None) or {}
    text = message.replace(" ", "_").lower()  # Target modules {'x'} not found
    named = [name for name in values if re.search(rf"(?<![^\W_]){name}(?![^\W_])", text)]
    dotted_key = f"{key}.{max(named, key=len)}" if named else key
    return recipe.error(dotted_key, f"{key}: {message}")
