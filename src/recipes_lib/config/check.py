"""The check of a recipe: stage 1 without torch, and stage 2, in which upstream, the model's files
and its names have the last word.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes_lib.config.accelerate_config import AccelerateConfig
from recipes_lib.config.combinations import check_combinations, check_here
from recipes_lib.config.constraints import NOT_IN_RECIPES
from recipes_lib.config.kinds import SECTIONS
from recipes_lib.config.launch import Launch, plan_launch
from recipes_lib.config.loader import Document
from recipes_lib.config.model_files import KEY, check_model_files, lacks_tokenizer, local_folder
from recipes_lib.config.model_names import check_names
from recipes_lib.config.recipe import Recipe, recipe_from
from recipes_lib.config.renames import RENAMES
from recipes_lib.config.suggestions import did_you_mean, near_names
from recipes_lib.config.upstream import (
    build_lora_config,
    build_quantization_config,
    build_sft_config,
    check_packages,
    has_accelerator,
)
from recipes_lib.config.validation import (
    KindRules,
    PlacedError,
    dotted,
    translate,
    validator_of,
    wrong_kind,
)
from recipes_lib.config.vocabulary import dotted_names, subschema
from recipes_lib.config.yaml_source import KeyPath
from recipes_lib.core.errors import EnvironmentFault, RecipeError


class RecipeRules(KindRules):
    """Rules of recipes and bases; what combinations of keys mean is in `combinations`."""

    def unknown(self, document: Document, path: KeyPath, known: list[str]) -> RecipeError:
        """Return the error for a key that does not exist here: moved, renamed, misspelt, or in the
        wrong section.
        """
        key, name = str(path[-1]), dotted(path)
        plain = key.replace("-", "_")
        section = str(path[0]) if len(path) > 1 else ""
        reason = NOT_IN_RECIPES.get(section, {}).get(plain) if len(path) == 2 else None
        if reason:
            return document.error(path, f"'{name}' cannot be set in a recipe", reason)
        if plain in RENAMES and len(path) <= 2:
            rename = RENAMES[plain]
            migrate = "a whole old file: recipes migrate OLD.yaml --output NEW.yaml"
            return document.error(
                path, rename.message(name), *([rename.note] if rename.note else []), migrate
            )
        if len(path) == 1:
            homes = [near for near in dotted_names(plain) if plain in near]
            belongs = (
                [f"it belongs to {homes[0].partition('.')[0]}: write {homes[0]}"]
                if homes
                else [f"sections: {', '.join(SECTIONS)}"]
            )
            return document.error(
                path, f"unknown section '{key}'", *(did_you_mean(plain, SECTIONS) or belongs)
            )
        everything = f"all keys: recipes explain {dotted(path[:-1])}"
        if plain in known or near_names(plain, known):
            return document.error(
                path,
                f"unknown key '{name}'",
                *did_you_mean(plain, known, f"{dotted(path[:-1])}."),
                everything,
            )
        elsewhere = dotted_names(plain)
        if any(near.rpartition(".")[2] == plain for near in elsewhere):
            return document.error(
                path,
                f"unknown key '{name}'",
                f"{plain} belongs to {elsewhere[0].partition('.')[0]}: write {elsewhere[0]}",
            )
        return document.error(
            path,
            f"unknown key '{name}'",
            *(f"did you mean {near}?" for near in elsewhere[:1]),
            everything,
        )

    def inside_unknown(
        self, document: Document, path: KeyPath, value: Any
    ) -> Iterator[PlacedError]:
        """Yield what is wrong inside a mapping whose key was renamed, so that it need not be found
        in a second round.
        """
        rename = RENAMES.get(str(path[-1]))
        schema = (
            subschema(*rename.new.split("."))
            if rename and rename.new and isinstance(value, dict)
            else None
        )
        for problem in validator_of(schema).iter_errors(value) if schema else ():
            yield from translate(self, document, problem, path)

    def missing(self, document: Document, path: KeyPath, schema: dict[str, Any]) -> RecipeError:
        """Return the error for a required key that nobody wrote."""
        needs = {"model": "model.name_or_path", "data": "data.source"}
        what = (
            f"section '{path[0]}' is missing; it needs {needs[str(path[0])]}"
            if len(path) == 1
            else f"{dotted(path)} is missing"
        )
        return document.error(
            path, what, f"what it is: recipes explain {needs.get(str(path[-1]), dotted(path))}"
        )

    def at_once(self, document: Document) -> Iterator[PlacedError]:
        """Yield what is wrong between keys."""
        return check_combinations(document)

    def further(self, document: Document, full: bool, sound: bool) -> list[RecipeError]:
        """Return what this machine has against a recipe; `full` adds stage 2."""
        errors = list(check_here(document))
        if errors or not sound or document.problems or document.kind.name != "recipe":
            return errors
        recipe = recipe_from(document)
        if not full:
            folder = Path(recipe.model.name_or_path)
            return list(check_model_files(recipe, folder)) if folder.is_dir() else []
        errors = check_upstream(recipe, notes=document.warnings)
        try:
            check_packages(recipe)
        except EnvironmentFault as fault:
            errors.append(RecipeError(fault.what, *fault.hints, file=fault.file, line=fault.line))
        return errors


class FlatRules(KindRules):
    """A config of another program is legal YAML, but nothing here runs it."""

    has_schema = False

    def between_keys(self, document: Document) -> Iterator[RecipeError]:
        """Yield what the file is."""
        yield wrong_kind(document, "recipe")


def check_upstream(
    recipe: Recipe, *, remote_code: bool | None = None, notes: list[RecipeError] | None = None
) -> list[RecipeError]:
    """Return everything that upstream, the model's files and the default launch have against a
    recipe.

    Args:
        remote_code: whether the command line allowed the model's own code; None where no model will
            be loaded.
        notes: is given what could not be checked.
    """
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it warns about optional kernels as soon as PEFT imports it
    errors: list[RecipeError] = []

    def collect(build: Any) -> Any:
        try:
            return build()
        except RecipeError as error:
            errors.extend(error.errors)
            return None

    launch = collect(lambda: plan_launch(recipe.launch)) or Launch(
        AccelerateConfig(Path()), per_machine=1
    )
    accelerate = launch.config
    collect(
        lambda: build_sft_config(
            _for_this_machine(recipe, accelerate, notes), "unused", launch.world_size
        )
    )
    collect(lambda: build_lora_config(recipe))
    collect(lambda: build_quantization_config(recipe))
    errors += _check_sharded_quantization(recipe, accelerate)
    before = len(errors)
    folder = collect(lambda: local_folder(recipe))
    if folder is not None:
        errors += check_model_files(recipe, folder, remote_code=remote_code)
    if len(errors) > before:
        return errors
    absent = folder is None or lacks_tokenizer(recipe, folder)
    if folder is None or absent or recipe.model.trust_remote_code:
        why = "is not on this machine" if absent else "brings its own code"
        if notes is not None:
            notes.append(
                recipe.error(
                    KEY, f"note: model {recipe.model.name_or_path} {why}: names not checked"
                )
            )
        return errors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        errors += check_names(recipe, folder, accelerate)
    return errors


def _for_this_machine(
    recipe: Recipe, accelerate: AccelerateConfig, notes: list[RecipeError] | None
) -> Recipe:
    """Return the recipe without what only a GPU can judge, when it is meant for one and this
    machine has none.
    """
    if accelerate.use_cpu or has_accelerator():
        return recipe
    judged_by_gpu = [key for key in ("fp16", "fp16_full_eval", "tf32") if recipe.train.get(key)]
    if judged_by_gpu and notes is not None:
        keys = ", ".join(f"train.{key}" for key in judged_by_gpu)
        notes.append(
            recipe.error(
                f"train.{judged_by_gpu[0]}", f"note: no GPU on this machine: {keys} not checked"
            )
        )
    return dataclasses.replace(
        recipe,
        train={key: value for key, value in recipe.train.items() if key not in judged_by_gpu},
    )


def _check_sharded_quantization(recipe: Recipe, accelerate: AccelerateConfig) -> list[RecipeError]:
    """FSDP shards tensors of one floating type: 4-bit weights must be stored in the type the
    adapter has, and be gathered in it.
    """
    quantization = recipe.quantization or {}
    sharded = (
        accelerate.distributed_type == "FSDP"
        or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    )
    if not (sharded and quantization):
        return []
    if quantization.get("load_in_8bit"):
        what = "8-bit weights cannot be sharded: FSDP would part them from their scales"
        return [
            recipe.error(
                "quantization.load_in_8bit",
                what,
                "set load_in_4bit: true with bfloat16 storage, or launch with ddp",
            )
        ]
    if recipe.train.get(
        "fp16"
    ):  # FSDP2 gathers every floating tensor in the compute type, packed 4-bit values too
        what = (
            "QLoRA under FSDP cannot compute in fp16: 4-bit weights stored as bfloat16 would be"
            " rounded to float16, and be others"
        )
        return [
            recipe.error(
                "train.fp16", what, "set train.bf16: true and train.fp16: false, or launch with ddp"
            )
        ]
    storage, compute = (
        quantization.get("bnb_4bit_quant_storage"),
        quantization.get("bnb_4bit_compute_dtype"),
    )
    if storage == compute == "bfloat16":
        return []
    key = "quantization.bnb_4bit_quant_storage" if storage else "quantization.load_in_4bit"
    found = f"storage is {storage or 'uint8'}, compute {compute or 'float32'}"
    what = f"QLoRA under FSDP needs 4-bit weights stored as bfloat16, the adapter's type: {found}"
    return [
        recipe.error(
            key,
            what,
            "set bnb_4bit_quant_storage: bfloat16 and bnb_4bit_compute_dtype: bfloat16, or launch"
            " with ddp",
        )
    ]
