"""Stage 2: the real SFTConfig, LoraConfig and BitsAndBytesConfig, so that upstream has the last
word.

This module imports torch; everything else about recipes works without. What is derived here and
nowhere else: the accumulation steps from the batch, `use_cpu` from the device, `max_length` where
rows arrive truncated.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.config.batch import accumulation_steps
from recipes_lib.config.constraints import COMPILE_KEYS
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipeError, one_line

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig


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
    """Refuse an optional package that the recipe asks for and that is not installed, before
    anything is loaded.

    Raises:
        EnvironmentFault: with the way to install it.
    """
    from transformers.utils import is_kernels_available, is_liger_kernel_available

    if recipe.train.get("use_liger_kernel") and not is_liger_kernel_available():
        key = "train.use_liger_kernel"
        hint = f"pip install -c constraints.txt -e '.[gpu]' brings it; or {key}=false"
        raise recipe.fault(key, f"{key}: liger-kernel is not installed", hint)
    if "/" in (recipe.model.attn_implementation or "") and not is_kernels_available():
        key = "model.attn_implementation"
        wanted, found = kernels_wanted_and_found()
        here = f", and {found} is installed" if found else "; it is not installed"
        what = f"{key} {recipe.model.attn_implementation} needs the package {wanted}{here}"
        hint = "leave the key out for the fastest attention that is here, or: " + get_kernels(
            wanted
        )
        raise recipe.fault(key, what, hint)


def kernels_wanted_and_found() -> tuple[str, str | None]:
    """Return the requirement that the installed transformers has for the package kernels, and the
    version that is installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    from transformers.dependency_versions_table import deps

    try:
        return str(deps["kernels"]), version("kernels")
    except PackageNotFoundError:
        return str(deps["kernels"]), None


def get_kernels(wanted: str) -> str:
    """Return how to get the package. It is no extra of ours: transformers 5.23 and 5.24 want a
    version that PyPI did not have when they were tried (2026-11).
    """
    return f"pip install '{wanted}', once PyPI has it"


def has_accelerator() -> bool:
    """Whether a GPU (or another accelerator) is there and the launcher did not ask for the CPU."""
    import torch

    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return not asked_for_cpu and bool(torch.accelerator.is_available())


def refused(recipe: Recipe, section: str, error: Exception, *hints: str) -> RecipeError:
    """Return upstream's refusal at the key it speaks about."""
    message = one_line(error)
    if "support bf16" in message:
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "this device"
        what, hint = "has no bfloat16", "set train.bf16: false (and train.fp16: true on a GPU)"
        return recipe.error("train.bf16", f"train.bf16: {name} {what}", hint)
    values = getattr(recipe, section) or {}
    named = [key for key in values if re.search(rf"\b{re.escape(key)}\b", message)]
    key = f"{section}.{max(named, key=len)}" if named else section
    return recipe.error(key, f"{section}: {message}", *hints)
