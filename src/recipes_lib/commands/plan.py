"""`recipes plan RECIPE_OR_STUDY`: what a training needs before it is started: memory, steps, time,
cost, and which setting to change. `recipes plan EVAL TARGET`: what an evaluation asks, and how long
it takes.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from recipes_lib.commands.show import launch_line
from recipes_lib.compare.design import load_study, study_file
from recipes_lib.config.launch import plan_launch
from recipes_lib.config.loader import load_document
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import ExitCode, RecipeError, print_error
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.core.terminal import at_least, next_step, print_json, say
from recipes_lib.eval_recipe import find_eval, load_eval
from recipes_lib.planning.advice import Advice, advise
from recipes_lib.planning.as_json import plan_json
from recipes_lib.planning.plan import Plan, plan_recipe
from recipes_lib.planning.text import plan_lines
from recipes_lib.study.hours import study_hours, study_json, study_lines
from recipes_lib.study.leaks import refuse_leaks
from recipes_lib.study.steps import build_graph
from recipes_lib.study.tuning import with_choices
from recipes_lib.suites.eval_plan import plan_eval
from recipes_lib.suites.eval_plan_text import eval_plan_json, eval_plan_lines
from recipes_lib.suites.eval_times import eval_times, usual_evals

_OF_A_RECIPE = ("gpus", "nodes", "accelerate", "evals")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    what = "path or name of a recipe, a study file, or an eval recipe before its target"
    add("recipe", metavar="RECIPE_STUDY_OR_EVAL", help=what)
    target = "what an eval recipe evaluates: a recipe, run, Hub id or model folder"
    add("target", nargs="?", metavar="TARGET", help=target)
    cards = "h100-80gb, a100-40gb, l40s-48gb, rtx-4090-24gb, h100-mig-3g.40gb, ... or cpu"
    add("--gpu", metavar="CARD", help=cards)
    processes = "processes on each machine; default: the recipe's launch"
    add("--gpus", type=at_least(1), metavar="N", help=processes)
    machines = "machines; default: the recipe's launch"
    add("--nodes", type=at_least(1), metavar="N", help=machines)
    config = "a file in accelerate_configs/ or a path; default: the recipe's"
    add("--accelerate", metavar="NAME", help=config)
    evals = "eval recipes to count in on a CPU; default: the project's three"
    add("--evals", nargs="*", metavar="EVAL", help=evals)
    price = "price of one card for one hour, in any currency"
    against = "the opponent of an eval's target: reference, base, or another recipe, run or model"
    add("--against", metavar="WHO", help=against)
    add("--price", type=_price, metavar="X", help=price)
    add("--json", action="store_true", help="print one JSON object (schema/plan.schema.json)")


def run(args: argparse.Namespace) -> int:
    """Plan and print."""
    # a word that stands behind an option is left over as an override is
    words = [*([args.target] if args.target else []), *args.overrides]
    if (evaluation := _eval_file(args.recipe)) is not None:
        return _eval(args, evaluation, words)
    if args.against is not None:
        what = f"--against is for an eval recipe, and '{args.recipe}' is none"
        raise RecipeError(what, "recipes plan EVAL TARGET plans an evaluation")
    args.overrides = words
    study = study_file(args.recipe)
    if study is not None:
        return _study(args, study)
    recipe = load_recipe(args.recipe, args.overrides)
    for warning in recipe.warnings:
        print_error(warning)
    plan = plan_recipe(
        recipe, gpu=args.gpu, gpus=args.gpus, nodes=args.nodes, accelerate=args.accelerate
    )
    evals = (
        usual_evals(plan.settings.device == "cpu")
        if args.evals is None
        else [load_eval(word) for word in args.evals]
    )
    times = eval_times(evals, plan.settings.shape, plan.card)
    plan = replace(plan, evals=times, price=args.price)
    if args.json:
        return print_json(plan_json(plan))
    advice = advise(plan)
    for line in plan_lines(plan, advice):
        say(line)
    say()
    file = shown_path(recipe.path)
    say(f"$ {launch_line(plan.launch, file, args.overrides)}")
    next_step(shlex.join(_next(plan, advice, file, args)))
    return ExitCode.DONE


def _next(plan: Plan, advice: Sequence[Advice], file: str, args: argparse.Namespace) -> list[str]:
    """Return the next command: of what fits, the training; else the plan of the best proposal."""
    launch, own, words = plan.launch, plan_launch(plan.recipe.launch), []
    if launch.config.path != own.config.path:
        words += ["--accelerate", args.accelerate or launch.config.path.stem]
    if launch.per_machine != own.per_machine or (words and launch.world_size > 1):
        words += ["--gpus", str(launch.per_machine)]
    if launch.machines != own.machines:
        words += ["--nodes", str(launch.machines)]
    if plan.fits:
        return ["recipes", "train", file, *words, *args.overrides]
    if not advice:
        return ["recipes", "ls"]
    best = advice[0].setting
    card = ["--gpu", args.gpu] if args.gpu else []
    words = [] if "launch." in best else words  # a flag would win over it
    return ["recipes", "plan", file, *card, *words, *args.overrides, *best.split()]


def _eval_file(word: str) -> Path | None:
    """Return the file of an eval recipe given by path or name; None where the word is none. A name
    that a recipe or study has as well is theirs.
    """
    path = recipe_path(word)
    if path.is_dir():
        return None
    if not path.is_file():
        with contextlib.suppress(RecipeError):
            path = find_eval(word)
    known = path.is_file() and load_document(path, keep_going=True).kind.name == "eval"
    return path if known else None


def _eval(args: argparse.Namespace, path: Path, words: Sequence[str]) -> int:
    """Plan an evaluation and print.

    Args:
        words: the target and overrides.
    """
    file = shown_path(path)
    _refuse_flags(args, (*_OF_A_RECIPE, "price"), "an evaluation is planned on one card", file)
    overrides = [word for word in words if "=" in word]
    targets = [word for word in words if "=" not in word]
    if len(targets) != 1:
        what = "one is planned at a time" if targets else "nothing to evaluate"
        hint = f"name one recipe, run or model: recipes plan {file} TARGET"
        raise RecipeError(what, hint, file=file)
    target = targets[0]
    recipe = load_eval(path, overrides)
    plan = plan_eval(recipe, target, args.gpu, args.against)
    if args.json:
        return print_json(eval_plan_json(plan))
    for line in eval_plan_lines(plan):
        say(line)
    against = ["--against", args.against] if args.against else []
    if not plan.fits:
        next_step("recipes ls")
    elif plan.to_train:
        next_step(shlex.join(["recipes", "train", target]))
    else:
        next_step(shlex.join(["recipes", "eval", file, target, *against, *overrides]))
    return ExitCode.DONE


def _refuse_flags(args: argparse.Namespace, flags: Sequence[str], why: str, file: str) -> None:
    for flag in flags:
        if getattr(args, flag) is not None:
            raise RecipeError(f"--{flag} is for a recipe: {why}", file=file)


def _study(args: argparse.Namespace, path: Path) -> int:
    why = "a study says itself how its arms are launched and evaluated"
    _refuse_flags(args, _OF_A_RECIPE, why, shown_path(path))
    study = with_choices(load_study(path, args.overrides))
    refuse_leaks(study, build_graph(study).todo())
    plan = study_hours(study, args.gpu, args.price)
    if args.json:
        return print_json(study_json(plan))
    for line in study_lines(plan):
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
