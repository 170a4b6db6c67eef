"""`recipes plan RECIPE`: memory, steps, time, and which setting to change."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from recipes_lib.commands import Accelerate, Gpu, Gpus, Json, Nodes, RecipeWord
from recipes_lib.commands.show import launch_line
from recipes_lib.config.launch import plan_launch
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import print_error
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import next_step, print_json, say
from recipes_lib.plan.cards import card_named

if TYPE_CHECKING:
    from recipes_lib.plan.plan import Plan


def run(
    recipe: RecipeWord,
    overrides: Sequence[str],
    *,
    gpu: Gpu = None,
    gpus: Gpus = None,
    nodes: Nodes = None,
    accelerate: Accelerate = None,
    table: Annotated[bool, "what other settings, methods and cards would do"] = False,
    json: Json = False,
) -> int:
    """Plan and print."""
    if gpu not in (None, "cpu"):
        card_named(gpu)  # an unknown card is refused before torch is imported
    loaded = load_recipe(recipe, overrides)
    for warning in loaded.document.warnings:
        print_error(warning)
    # they import torch, and what is refused above does not wait for it
    from recipes_lib.plan.advice import advise, rows_shown
    from recipes_lib.plan.advice import table as table_lines
    from recipes_lib.plan.plan import card_for, launch_for, plan_of
    from recipes_lib.plan.steps import rows_of

    launch = launch_for(loaded, gpu, gpus, nodes, accelerate)
    plan = plan_of(loaded, launch, card_for(launch, gpu), rows_of(loaded))
    advice = advise(plan, overrides)
    rows = rows_shown(plan, advice)
    if json:
        return print_json({key: value for _, _, values in rows for key, value in values.items()})
    lines = [f"{label:<9} {text}" for label, text, _ in rows if text]
    say("\n".join([*lines, *(table_lines(plan, overrides) if table else ())]))
    path, flags = shown_path(loaded.path), _launch_words(plan, accelerate)
    say(f"$ {launch_line(plan.launch, path, overrides)}")
    if plan.fits:
        return next_step("recipes", "train", path, *flags, *overrides)
    if advice is None:
        return next_step("recipes ls")
    card = ["--gpu", gpu] if gpu else []
    flags = [] if "launch." in advice.words else flags  # a flag would win over it
    command = shlex.join(["recipes", "plan", path, *card, *flags, *overrides])
    return next_step(f"{command} {advice.words}")


def _launch_words(plan: Plan, accelerate: str | None) -> list[str]:
    """Return the flags that give the plan's launch, as far as it is not the recipe's own."""
    launch, own, words = plan.launch, plan_launch(plan.recipe.launch), []
    if launch.config.path != own.config.path:
        words += ["--accelerate", accelerate or launch.config.path.stem]
    if launch.per_machine != own.per_machine or (words and launch.world_size > 1):
        words += ["--gpus", str(launch.per_machine)]
    if launch.machines != own.machines:
        words += ["--nodes", str(launch.machines)]
    return words
