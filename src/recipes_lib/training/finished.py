"""Whether a finished run is what its recipe asks for, so that there is nothing to train. Needs no
torch: `recipes train` answers before it starts a training.
"""

from collections.abc import Mapping
from typing import Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import object_or_none
from recipes_lib.core.run_directory import RunDirectory, damaged_section, is_held
from recipes_lib.data.sources import source_hashes
from recipes_lib.training.resume_guard import differences, recipe_differences
from recipes_lib.weights.runs import weights_damage


def finished_line(run: RunDirectory, recipe: Recipe) -> str | None:
    """Return what to say of a run that is finished with this recipe and whole; None for any other.
    RecipeError where it is finished with other settings.
    """
    if is_held(run.path):  # by an attempt, which may be about to change that
        return None
    state = object_or_none(run.state_file) or {}
    if damaged_section(state):  # the attempt says so
        return None
    if state.get("state") != "finished" or damage_of_finished(run, recipe, state) is not None:
        return None
    return nothing_to_do(run, recipe)


def nothing_to_do(run: RunDirectory, recipe: Recipe) -> str:
    """Return the line that a finished run ends with when it is started again."""
    weights = run.weights(recipe.lora is None)
    return f"run '{run.name}' is already finished, nothing to do: {weights}"


def damage_of_finished(run: RunDirectory, recipe: Recipe, state: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the weights of a finished run, whose run.json is `state`; None for
    whole ones. RecipeError where it is finished with other settings than the recipe's.
    """
    changed = recipe_differences(recipe, state.get("guard", {}))
    changed |= differences(state.get("data_files", {}), source_hashes(recipe.data))
    if changed:
        what = f"run '{run.name}' is finished with other settings: {', '.join(changed)}"
        raise RecipeError(what, "start a new run with run.name=OTHER")
    return weights_damage(run, recipe.lora is None)
