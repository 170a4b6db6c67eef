"""`recipes plan RECIPE_OR_STUDY`: what a training needs before it is started: memory, steps, time,
cost, and which setting to change.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.commands import at_least
from recipes_lib.commands.show import launch_line
from recipes_lib.config.launch import plan_launch
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import ExitCode, RecipeError, print_error
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import next_step, print_json, say
from recipes_lib.study.config import load_study, study_file
from recipes_lib.study.run import refuse_unmet
from recipes_lib.study.status import study_plan_lines, study_plan_object
from recipes_lib.study.tune import with_choices

if TYPE_CHECKING:
    from recipes_lib.plan.plan import Plan

_OF_A_RECIPE = ("gpus", "nodes", "accelerate", "tokens_per_row")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("recipe", metavar="RECIPE_OR_STUDY", help="path or name of a recipe, or a study file")
    cards = "h100, a100-40gb, l40s, 4090, h100-mig-3g.40gb, ... or cpu; default: this machine's"
    add("--gpu", metavar="CARD", help=cards)
    processes = "processes on each machine; default: the recipe's launch"
    add("--gpus", type=at_least(1), metavar="N", help=processes)
    machines = "machines; default: the recipe's launch"
    add("--nodes", type=at_least(1), metavar="N", help=machines)
    config = "a file in accelerate_configs/ or a path; default: the recipe's"
    add("--accelerate", metavar="NAME", help=config)
    tokens = "tokens of a row, for data that are not on this machine"
    add("--tokens-per-row", type=at_least(1), metavar="N", help=tokens)
    price = "price of one card for one hour, in any currency"
    add("--price", type=_price, metavar="X", help=price)
    add("--table", action="store_true", help="other methods and numbers of cards too")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Plan and print."""
    study = study_file(args.recipe)
    if study is not None:
        return _study(args, study)
    # they import torch, and `--help` does not
    from recipes_lib.plan.advice import advise, lines, table, to_dict
    from recipes_lib.plan.plan import card_for, launch_for, plan_of

    recipe = load_recipe(args.recipe, args.overrides)
    for warning in recipe.warnings:
        print_error(warning)
    launch = launch_for(recipe, args.gpu, args.gpus, args.nodes, args.accelerate)
    plan = plan_of(recipe, launch, card_for(launch, args.gpu), args.tokens_per_row)
    advice = advise(plan, args.overrides)
    if args.json:
        return print_json(to_dict(plan, advice, args.price))
    for line in lines(plan, advice, args.price):
        say(line)
    for line in table(plan, args.overrides) if args.table else ():
        say(line)
    file = shown_path(recipe.path)
    say(f"$ {launch_line(plan.launch, file, args.overrides)}")
    words = _launch_words(plan, args)
    if plan.fits:
        next_step(shlex.join(["recipes", "train", file, *words, *args.overrides]))
    elif advice is not None:
        card = ["--gpu", args.gpu] if args.gpu else []
        words = [] if "launch." in advice.words else words  # a flag would win over it
        command = shlex.join(["recipes", "plan", file, *card, *words, *args.overrides])
        next_step(f"{command} {advice.words}")
    else:
        next_step("recipes ls")
    return ExitCode.DONE


def _launch_words(plan: Plan, args: argparse.Namespace) -> list[str]:
    """Return the flags that give the plan's launch, where it is not the recipe's own."""
    launch, own, words = plan.launch, plan_launch(plan.recipe.launch), []
    if launch.config.path != own.config.path:
        words += ["--accelerate", args.accelerate or launch.config.path.stem]
    if launch.per_machine != own.per_machine or (words and launch.world_size > 1):
        words += ["--gpus", str(launch.per_machine)]
    if launch.machines != own.machines:
        words += ["--nodes", str(launch.machines)]
    return words


def _refuse_flags(args: argparse.Namespace, flags: Sequence[str], why: str, file: str) -> None:
    for flag in flags:
        if getattr(args, flag) is not None:
            raise RecipeError(f"--{flag.replace('_', '-')} is for a recipe: {why}", file=file)


def _study(args: argparse.Namespace, path: Path) -> int:
    why = "a study says itself how its arms are launched and evaluated"
    _refuse_flags(args, _OF_A_RECIPE, why, shown_path(path))
    study = with_choices(load_study(path, args.overrides))
    refuse_unmet(study)
    if args.json:
        return print_json(study_plan_object(study, args.gpu))
    for line in study_plan_lines(study, args.gpu):
        say(line)
    next_step(f"recipes study run {shown_path(path)}")
    return ExitCode.DONE


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not math.isfinite(price) or price < 0:
        raise argparse.ArgumentTypeError(f"a number >= 0, got {text!r}")
    return price
