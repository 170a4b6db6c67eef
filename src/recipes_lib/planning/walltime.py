"""The time to ask a scheduler for, as a launcher of jobs needs it: one number, no printing."""

from __future__ import annotations

from recipes_lib.planning.plan import plan_recipe
from recipes_lib.recipe.recipe import Recipe


def planned_walltime(recipe: Recipe, card: str, gpus: int, nodes: int = 1) -> int:
    """Return seconds of walltime for training a recipe: the planned time and half as much again, in whole quarters of an hour.

    Args:
        card: a name of `planning.cards`, or `cpu`.
        gpus: processes on each machine.
        nodes: machines.

    Raises:
        RecipeError: unknown card or architecture, or a batch that cannot be divided.
        EnvironmentFault: the model is not here, not in the table of known models, and the Hub does not answer.
    """
    return plan_recipe(recipe, gpu=card, gpus=gpus, nodes=nodes).walltime
