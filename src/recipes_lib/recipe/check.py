"""The check of a recipe: stage 1 without torch, and stage 2, in which upstream, the model's files and its names have the last word."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from pathlib import Path
from typing import Any

from recipes_lib.errors import EnvironmentFault, RecipeError
from recipes_lib.recipe.accelerate_config import AccelerateConfig
from recipes_lib.recipe.combinations import check_here
from recipes_lib.recipe.launch import Launch, plan_launch
from recipes_lib.recipe.loader import Document
from recipes_lib.recipe.model_files import KEY, check_files, lacks_tokenizer, local_folder
from recipes_lib.recipe.model_names import check_names
from recipes_lib.recipe.recipe import Recipe, recipe_from
from recipes_lib.recipe.upstream import build_lora_config, build_quantization_config, build_sft_config, check_packages, has_accelerator
from recipes_lib.recipe.validation import validate


def check_recipe(document: Document, full: bool = False) -> list[RecipeError]:
    """The check of recipes and bases that `recipes check` runs; `full` adds stage 2 for recipes."""
    errors = validate(document)
    errors += check_here(document)
    if errors or document.kind.name != "recipe":
        return errors
    recipe = recipe_from(document)
    if not full:
        folder = Path(recipe.model.name_or_path)
        return list(check_files(recipe, folder)) if folder.is_dir() else []
    errors = check_upstream(recipe, notes=document.warnings)
    try:
        check_packages(recipe)
    except EnvironmentFault as fault:
        errors.append(RecipeError(fault.what, *fault.hints, file=fault.file, line=fault.line))
    return errors


def check_upstream(recipe: Recipe, *, remote_code: bool | None = None, notes: list[RecipeError] | None = None) -> list[RecipeError]:
    """Return everything that upstream, the model's files and the default launch have against a recipe.

    Args:
        remote_code: whether the command line allowed the model's own code; None where no model will be loaded.
        notes: is given what could not be checked.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about optional kernels as soon as PEFT imports it
    errors: list[RecipeError] = []

    def collect(build: Any) -> Any:
        try:
            return build()
        except RecipeError as error:
            errors.extend(getattr(error, "errors", [error]))
            return None

    launch = collect(lambda: plan_launch(recipe.launch)) or Launch(AccelerateConfig(Path()), per_machine=1)
    accelerate = launch.config
    collect(lambda: build_sft_config(_for_this_machine(recipe, accelerate, notes), "unused", launch.world_size))
    collect(lambda: build_lora_config(recipe))
    collect(lambda: build_quantization_config(recipe))
    errors += _check_sharded_quantization(recipe, accelerate)
    before = len(errors)
    folder = collect(lambda: local_folder(recipe))
    if folder is not None:
        errors += check_files(recipe, folder, remote_code=remote_code)
    if len(errors) > before:
        return errors
    absent = folder is None or lacks_tokenizer(recipe, folder)
    if folder is None or absent or recipe.model.trust_remote_code:
        why = "is not on this machine" if absent else "brings its own code"
        if notes is not None:
            notes.append(recipe.error(KEY, f"note: model {recipe.model.name_or_path} {why}: names not checked"))
        return errors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        errors += check_names(recipe, folder, accelerate)
    return errors


def _for_this_machine(recipe: Recipe, accelerate: AccelerateConfig, notes: list[RecipeError] | None) -> Recipe:
    """Return the recipe without what only a GPU can judge, when it is meant for one and this machine has none."""
    if accelerate.use_cpu or has_accelerator():
        return recipe
    judged_by_gpu = [key for key in ("fp16", "fp16_full_eval", "tf32") if recipe.train.get(key)]
    if judged_by_gpu and notes is not None:
        keys = ", ".join(f"train.{key}" for key in judged_by_gpu)
        notes.append(recipe.error(f"train.{judged_by_gpu[0]}", f"note: no GPU on this machine: {keys} not checked"))
    return dataclasses.replace(recipe, train={key: value for key, value in recipe.train.items() if key not in judged_by_gpu})


def _check_sharded_quantization(recipe: Recipe, accelerate: AccelerateConfig) -> list[RecipeError]:
    """FSDP shards tensors of one floating type: 4-bit weights must be stored in the type the adapter has, and be gathered in it."""
    quantization = recipe.quantization or {}
    sharded = accelerate.distributed_type == "FSDP" or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not (sharded and quantization):
        return []
    if quantization.get("load_in_8bit"):
        what = "8-bit weights cannot be sharded: FSDP would part them from their scales"
        return [recipe.error("quantization.load_in_8bit", what, "set load_in_4bit: true with bfloat16 storage, or launch with ddp")]
    if recipe.train.get("fp16"):  # FSDP2 gathers every floating tensor in the compute type, packed 4-bit values too
        what = "QLoRA under FSDP cannot compute in fp16: 4-bit weights stored as bfloat16 would be rounded to float16, and be others"
        return [recipe.error("train.fp16", what, "set train.bf16: true and train.fp16: false, or launch with ddp")]
    storage, compute = quantization.get("bnb_4bit_quant_storage"), quantization.get("bnb_4bit_compute_dtype")
    if storage == compute == "bfloat16":
        return []
    key = "quantization.bnb_4bit_quant_storage" if storage else "quantization.load_in_4bit"
    found = f"storage is {storage or 'uint8'}, compute {compute or 'float32'}"
    what = f"QLoRA under FSDP needs 4-bit weights stored as bfloat16, the adapter's type: {found}"
    return [recipe.error(key, what, "set bnb_4bit_quant_storage: bfloat16 and bnb_4bit_compute_dtype: bfloat16, or launch with ddp")]
