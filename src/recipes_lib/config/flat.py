"""A recipe as the flat config that `trl sft --config` reads; what that file cannot say is listed as
comments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from recipes_lib.config.batch import accumulation_steps
from recipes_lib.config.launch import plan_launch
from recipes_lib.config.model_files import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.vocabulary import FLAT_NAMES
from recipes_lib.config.yaml_text import value_text

# Dotted key of a recipe -> flag of TRL's ModelConfig or ScriptArguments; a mixture as data.source
# has none.
_FLAGS = {key: flag for flag, key in FLAT_NAMES.items() if key not in ("data.source", "run.name")}
_IMPLIED = {
    "lora.bias": "none",
    "data.special_tokens": "text",
    "data.max_unsupervised_fraction": 0.05,
    "data.chat_loss": "all",
}


def flat_text(recipe: Recipe, file: str) -> str:
    """Return the recipe as a flat TRL config.

    Args:
        file: the recipe as the user typed it, for the first comment.
    """
    flat, lost = flat_form(recipe)
    head = (
        f"# {file} as a plain TRL config: trl sft --config FILE --accelerate_config"
        f" accelerate_configs/{recipe.launch.accelerate}.yaml"
    )
    lines = [head, *(f"{key}: {value_text(value)}" for key, value in flat.items())]
    if lost:
        lines += [
            "# What a flat config cannot say:",
            *(f"#   {key}: {value_text(value)}" for key, value in lost.items()),
        ]
    return "\n".join(lines)


def flat_form(recipe: Recipe) -> tuple[dict[str, object], dict[str, object]]:
    """Return the flat keys, and the dotted keys that have no flat form."""
    values = recipe.to_dict()
    flat: dict[str, object] = {}
    lost: dict[str, object] = {}
    sections = ("model", "data", "lora", "quantization")
    for key, value in leaves({section: values[section] or {} for section in sections}):
        if key in _FLAGS:
            if value is not None:
                flat[_FLAGS[key]] = value
        elif key.startswith("data.chat_template_kwargs.") or (  # false says something there
            value not in (None, {}, [], False, _IMPLIED.get(key)) and key != "data.source"
        ):
            lost[key] = value
    # a name of ours: TRL gets the folder, where it was made already
    if recipe.model.name_or_path.startswith("package:"):
        lost["model.name_or_path"] = recipe.model.name_or_path
        flat["model_name_or_path"] = str(local_folder(recipe) or "FOLDER")
    source = values["data"]["source"]
    if isinstance(source, str):
        flat["dataset_name"] = source
    else:
        lost["data.source"] = source
    if recipe.lora is not None:
        flat["use_peft"] = True
    flat |= recipe.train
    flat["output_dir"] = f"trl-{recipe.name}"
    world_size = plan_launch(recipe.launch).world_size
    flat["gradient_accumulation_steps"] = accumulation_steps(recipe, world_size)
    if flat.get("padding_free") and not flat.get("packing"):
        lost["train.max_length"] = flat.pop("max_length", None)
        flat["max_length"] = None
    return flat, lost


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested mappings with their values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
