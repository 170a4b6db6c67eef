"""`recipes plan`: memory, steps and time of a training before it starts."""

import shlex
from collections.abc import Sequence
from typing import Annotated

from recipes_lib.commands import Accelerate, Gpu, Gpus, Json, Nodes, RecipeWord
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import next_step, print_json, say
from recipes_lib.plan.cards import card_named


def run_plan(
    recipe: RecipeWord,
    overrides: Sequence[str],
    *,
    gpu: Gpu = None,
    gpus: Gpus = None,
    nodes: Nodes = None,
    accelerate: Accelerate = None,
    table: Annotated[bool, "compare other settings, methods and cards"] = False,
    json: Json = False,
) -> int:
    """Plan and print."""
    if gpu not in (None, "cpu"):
        card_named(gpu)  # an unknown card is refused before torch is imported
    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from recipes_lib.plan.advice import advise, rows_shown
    from recipes_lib.plan.advice import table as table_lines
    from recipes_lib.plan.plan import launch_and_card, plan_of

    launch, card = launch_and_card(loaded, gpu, accelerate=accelerate, gpus=gpus, nodes=nodes)
    plan = plan_of(loaded, launch, card)
    advice = advise(plan, overrides)
    lines, facts = rows_shown(plan, advice)
    if json:
        return print_json(facts)
    for label, text in lines:
        say(f"{label:<9} {text}")
    if table:
        say(*table_lines(plan, overrides))
    path = shown_path(loaded.path)
    say(f"$ {plan.launch.plain_command(path, overrides)}")

    flags = {"accelerate": accelerate, "gpus": gpus, "nodes": nodes}
    if advice and "launch." in advice.words:
        flags = {}  # they would win over the advised launch
    words = [path]
    words += [f"--{name}={value}" for name, value in flags.items() if value]
    words += overrides
    if plan.fits:
        return next_step("train", *words)
    if advice is None:
        return next_step("ls")
    if gpu:
        words.append(f"--gpu={gpu}")
    return next_step("plan", *words, *shlex.split(advice.words))
