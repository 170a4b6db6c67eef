"""Finds the shape of a recipe's model: its files here, the table of known models, or its
config.json on the Hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes_lib.config.model_files import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.json_files import object_or_none
from recipes_lib.data.sources import hub_answers, offline_by_environment
from recipes_lib.models.known import known_shapes
from recipes_lib.models.shapes import ModelShape, shape_of_config

_KEY = "model.name_or_path"


def model_shape(recipe: Recipe) -> ModelShape:
    """Return the shape of a recipe's model.

    Raises:
        RecipeError: the name is a path and there is no model, or an architecture that the planner
            does not know.
        EnvironmentFault: a Hub name that is neither here nor in the table, and the Hub does not
            answer.
    """
    name = recipe.model.name_or_path
    known = known_shapes()
    if name in known and not Path(name).is_dir():
        return known[name]
    try:
        config = _local_config(recipe) or _hub_config(recipe)
        if config is not None:
            return shape_of_config(config, name)
    except EnvironmentFault:
        raise
    except RecipeError as error:
        raise error if error.file else recipe.error(_KEY, error.what, *error.hints) from None
    origin = recipe.origin_of(_KEY)
    raise EnvironmentFault(
        f"no plan: '{name}' is not on this machine, not among the known models, and the Hub does"
        " not answer",
        *did_you_mean(name, known),
        f"online, or after: hf download {name} config.json; known without it: {len(known)} names"
        " such as meta-llama/Llama-3.1-8B",
        file=origin.file,
        line=origin.line,
    )


def _local_config(recipe: Recipe) -> dict[str, Any] | None:
    """Return the config.json of the model's folder on this machine, if it is here."""
    folder = local_folder(recipe)
    if folder is None:
        return None
    config = object_or_none(folder / "config.json")
    if config is None:
        raise recipe.error(
            _KEY,
            f"{folder} has no readable config.json",
            "a model is a folder with config.json, safetensors and a tokenizer",
        )
    return config


def _hub_config(recipe: Recipe) -> dict[str, Any] | None:
    """Return the config.json from the Hub, or None when it does not answer."""
    name = recipe.model.name_or_path
    if name.startswith("package:") or offline_by_environment() or not hub_answers():
        return None
    from huggingface_hub import hf_hub_download

    try:
        return object_or_none(
            Path(hf_hub_download(name, "config.json", revision=recipe.model.revision))
        )
    except Exception as error:  # gated, no such model, no such revision: each has its own message
        origin = recipe.origin_of(_KEY)
        what = (
            f"no plan: the Hub gives no config.json of '{name}':"
            f" {str(error).strip().splitlines()[0]}"
        )
        raise EnvironmentFault(
            what, *did_you_mean(name, known_shapes()), file=origin.file, line=origin.line
        ) from None
