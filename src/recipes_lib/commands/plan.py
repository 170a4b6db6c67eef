"""`recipes plan RECIPE_OR_STUDY`: what a training needs before it is started: memory, steps, time,
cost, and which setting to change.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.compare.design import load_study, study_file
from recipes_lib.config.launch import DEFAULT_PORT, plan_launch
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import ExitCode, RecipeError, print_error
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import at_least, next_step, say
from recipes_lib.planning.advice import advise
from recipes_lib.planning.as_json import plan_json
from recipes_lib.planning.methods import method_rows
from recipes_lib.planning.plan import plan_recipe
from recipes_lib.planning.text import plan_lines
from recipes_lib.study.hours import study_hours, study_json, study_lines
from recipes_lib.suites.eval_times import eval_times, usual_evals
from recipes_lib.suites.recipe import load_eval

if TYPE_CHECKING:
    from recipes_lib.planning.advice import Advice
    from recipes_lib.planning.plan import Plan


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "recipe", metavar="RECIPE_OR_STUDY", help="path or name of a recipe, or a study file"
    )
    parser.add_argument(
        "--gpu",
        metavar="CARD",
        help="h100-80gb, a100-40gb, l40s-48gb, rtx-4090-24gb, h100-mig-3g.40gb, ... or cpu",
    )
    parser.add_argument(
        "--gpus",
        type=at_least(1),
        metavar="N",
        help="processes on each machine; default: the recipe's launch",
    )
    parser.add_argument(
        "--nodes", type=at_least(1), metavar="N", help="machines; default: the recipe's launch"
    )
    parser.add_argument(
        "--accelerate",
        metavar="NAME",
        help="a file in accelerate_configs/ or a path; default: the recipe's",
    )
    parser.add_argument(
        "--evals",
        nargs="*",
        metavar="EVAL",
        help="eval recipes to count in; default: the project's three",
    )
    parser.add_argument(
        "--price", type=_price, metavar="X", help="price of one card for one hour, in any currency"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object (schema/plan.schema.json)"
    )


def run(args: argparse.Namespace) -> int:
    """Plan and print."""
    study = study_file(args.recipe)
    if study is not None:
        return _study(args, study)

    recipe = load_recipe(args.recipe, args.overrides)
    for warning in recipe.warnings:
        print_error(warning)
    plan = plan_recipe(
        recipe, gpu=args.gpu, gpus=args.gpus, nodes=args.nodes, accelerate=args.accelerate
    )
    recipes = (
        usual_evals(plan.settings.device == "cpu") if args.evals is None else _evals(args.evals)
    )
    advice = advise(plan)
    parts = (
        plan,
        eval_times(recipes, plan.settings.shape, plan.card),
        method_rows(plan),
        advice,
        args.price,
    )
    if args.json:
        print(json.dumps(plan_json(*parts), indent=2, ensure_ascii=False))
        return ExitCode.DONE
    for line in plan_lines(*parts):
        say(line)
    say()
    _closing(plan, advice, shown_path(recipe.path), args)
    return ExitCode.DONE


def _closing(plan: Plan, advice: list[Advice], file: str, args: argparse.Namespace) -> None:
    """Print the plain command (with several machines, machine 0's), and the next one to type: of
    what fits, the training.
    """
    launch, own = plan.launch, plan_launch(plan.recipe.launch)
    if launch.machines > 1:
        launch = replace(
            launch,
            rank=0,
            address="HOST_OF_RANK_0",
            port=launch.config.main_process_port or DEFAULT_PORT,
        )
    script = shlex.join(["-m", "recipes_lib.train", file, *args.overrides])
    say(f"$ accelerate launch {shlex.join(launch.launcher_words())} {script}")
    words = []
    if plan.launch.config.path != own.config.path:
        words += ["--accelerate", args.accelerate or plan.launch.config.path.stem]
    if plan.launch.per_machine != own.per_machine or (words and plan.launch.world_size > 1):
        words += ["--gpus", str(plan.launch.per_machine)]
    if plan.launch.machines != own.machines:
        words += ["--nodes", str(plan.launch.machines)]
    if plan.fits:
        next_step(shlex.join(["recipes", "train", file, *words, *args.overrides]))
    elif advice:
        card = ["--gpu", args.gpu] if args.gpu else []
        words = [] if "launch." in advice[0].setting else words  # a flag would win over it
        next_step(
            shlex.join(
                [
                    "recipes",
                    "plan",
                    file,
                    *card,
                    *words,
                    *args.overrides,
                    *advice[0].setting.split(),
                ]
            )
        )
    else:
        next_step("recipes ls")


def _study(args: argparse.Namespace, path: Path) -> int:
    for flag in ("gpus", "nodes", "accelerate", "evals"):
        if getattr(args, flag) is not None:
            raise RecipeError(
                f"--{flag} is for a recipe: a study says itself how its arms are launched and"
                " evaluated",
                file=shown_path(path),
            )
    plan = study_hours(load_study(path, args.overrides), args.gpu)
    if args.json:
        print(json.dumps(study_json(plan, args.price), indent=2, ensure_ascii=False))
        return ExitCode.DONE
    for line in study_lines(plan, args.price):
        say(line)
    next_step(f"recipes study run {shown_path(path)}")
    return ExitCode.DONE


def _evals(words: list[str]) -> list[Any]:
    return [load_eval(word) for word in words]


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not math.isfinite(price) or price < 0:
        raise argparse.ArgumentTypeError(f"a number >= 0, got {text!r}")
    return price
