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
from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.kinds import SECTIONS, wrong_kind
from recipes_lib.config.launch import Launch, plan_launch
from recipes_lib.config.loader import Document
from recipes_lib.config.model_files import KEY, check_model_files, lacks_tokenizer, local_folder
from recipes_lib.config.model_names import check_names
from recipes_lib.config.recipe import Recipe, recipe_from
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
)
from recipes_lib.config.vocabulary import RENAMES, dotted_names, subschema
from recipes_lib.config.yaml_source import KeyPath
from recipes_lib.core.errors import EnvironmentFault, RecipeError


class RecipeRules(KindRules):
    """Rules of recipes and bases; what combinations of keys mean is in `combinations`."""

    def unknown(self, document: Document, path: KeyPath, known: list[str]) -> RecipeError:
        """Return the error for a key that does not exist here: moved, renamed, misspelt, or in the
        wrong section.
        """
        key, name, section = str(path[-1]), dotted(path), dotted(path[:-1])
        plain = key.replace("-", "_")

        def error(what: str, *hints: str) -> RecipeError:
            return document.error(path, what, *hints)

        if len(path) == 2 and (reason := NOT_IN_RECIPES.get(section, {}).get(plain)):
            return error(f"'{name}' cannot be set in a recipe", reason)
        if plain in RENAMES and len(path) <= 2:
            rename = RENAMES[plain]
            migrate = "a whole old file: recipes migrate OLD.yaml --output NEW.yaml"
            return error(rename.message(name), *filter(None, [rename.note]), migrate)
        elsewhere = dotted_names(plain)
        if len(path) == 1:
            home = next((near for near in elsewhere if plain in near), None)
            belongs = f"sections: {', '.join(SECTIONS)}"
            if home:
                belongs = f"it belongs to {home.partition('.')[0]}: write {home}"
            return error(f"unknown section '{key}'", *(did_you_mean(plain, SECTIONS) or [belongs]))
        what, everything = f"unknown key '{name}'", f"all keys: recipes explain {section}"
        if near_names(plain, known):
            return error(what, *did_you_mean(plain, known, f"{section}."), everything)
        if any(near.rpartition(".")[2] == plain for near in elsewhere):
            home = elsewhere[0]
            return error(what, f"{plain} belongs to {home.partition('.')[0]}: write {home}")
        return error(what, *(f"did you mean {near}?" for near in elsewhere[:1]), everything)

    def inside_unknown(
        self, document: Document, path: KeyPath, value: Any
    ) -> Iterator[PlacedError]:
        """Yield what is wrong inside a mapping whose key was renamed, so that it need not be found
        in a second round.
        """
        rename = RENAMES.get(str(path[-1]))
        new = rename.new if rename else None
        schema = subschema(*new.split(".")) if new and isinstance(value, dict) else None
        for problem in validator_of(schema).iter_errors(value) if schema else ():
            yield from translate(self, document, problem, path)

    def missing(self, document: Document, path: KeyPath, schema: JsonSchema) -> RecipeError:
        """Return the error for a required key that nobody wrote."""
        needs = {"model": "model.name_or_path", "data": "data.source"}
        key = needs.get(str(path[-1]), dotted(path))
        what = f"{dotted(path)} is missing"
        if len(path) == 1:
            what = f"section '{path[0]}' is missing; it needs {key}"
        return document.error(path, what, f"what it is: recipes explain {key}")

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
        yield wrong_kind(document.kind, "recipe", document.file)


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
    # it warns about optional kernels as soon as PEFT imports it
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    errors: list[RecipeError] = []

    def collect(build: Any) -> Any:
        try:
            return build()
        except RecipeError as error:
            errors.extend(error.errors)
            return None

    launch = collect(lambda: plan_launch(recipe.launch))
    launch = launch or Launch(AccelerateConfig(Path()), per_machine=1)
    here = _for_this_machine(recipe, launch.config, notes)
    collect(lambda: build_sft_config(here, "unused", launch.world_size))
    collect(lambda: build_lora_config(recipe))
    collect(lambda: build_quantization_config(recipe))
    errors += _check_sharded_quantization(recipe, launch.config)
    before = len(errors)
    folder = collect(lambda: local_folder(recipe))
    if folder is not None:
        errors += check_model_files(recipe, folder, remote_code=remote_code)
    if len(errors) > before:
        return errors
    absent = folder is None or lacks_tokenizer(recipe, folder)
    if folder is None or absent or recipe.model.trust_remote_code:
        why = "is not on this machine" if absent else "brings its own code"
        what = f"note: model {recipe.model.name_or_path} {why}: names not checked"
        if notes is not None:
            notes.append(recipe.error(KEY, what))
        return errors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        errors += check_names(recipe, folder, launch.config)
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
        what = f"note: no GPU on this machine: {keys} not checked"
        notes.append(recipe.error(f"train.{judged_by_gpu[0]}", what))
    train = {key: value for key, value in recipe.train.items() if key not in judged_by_gpu}
    return dataclasses.replace(recipe, train=train)


def _check_sharded_quantization(recipe: Recipe, accelerate: AccelerateConfig) -> list[RecipeError]:
    """FSDP shards tensors of one floating type: 4-bit weights must be stored in the type the
    adapter has, and be gathered in it.
    """
    quantization = recipe.quantization or {}
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if recipe.base_format is None or not (asked or accelerate.distributed_type == "FSDP"):
        return []
    if quantization.get("load_in_8bit"):
        what = "8-bit weights cannot be sharded: FSDP would part them from their scales"
        hint = "set load_in_4bit: true with bfloat16 storage, or launch with ddp"
        return [recipe.error("quantization.load_in_8bit", what, hint)]
    # FSDP2 gathers every floating tensor in the compute type, packed 4-bit values too
    if recipe.train.get("fp16"):
        what = (
            "QLoRA under FSDP cannot compute in fp16: 4-bit weights stored as bfloat16 would be"
            " rounded to float16, and be others"
        )
        hint = "set train.bf16: true and train.fp16: false, or launch with ddp"
        return [recipe.error("train.fp16", what, hint)]
    storage = quantization.get("bnb_4bit_quant_storage")
    compute = quantization.get("bnb_4bit_compute_dtype")
    if storage == compute == "bfloat16":
        return []
    key = "quantization.bnb_4bit_quant_storage" if storage else "quantization.load_in_4bit"
    found = f"storage is {storage or 'uint8'}, compute {compute or 'float32'}"
    what = f"QLoRA under FSDP needs 4-bit weights stored as bfloat16, the adapter's type: {found}"
    hint = (
        "set bnb_4bit_quant_storage: bfloat16 and bnb_4bit_compute_dtype: bfloat16, or launch"
        " with ddp"
    )
    return [recipe.error(key, what, hint)]
