"""recipes show: a resolved recipe, with the place every value was written; `--diff OTHER`: what
differs between two.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from recipes_lib.config.documents import value_text
from recipes_lib.config.launch import DEFAULT_PORT, Launch, plan_launch
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.errors import ExitCode, print_error
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.core.terminal import aligned, next_step, say


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="path or name of a recipe")
    add("--diff", metavar="OTHER", help="print only what differs from another recipe")


def run(args: argparse.Namespace) -> int:
    """Print the recipe as YAML, so that the output is a recipe again."""
    recipe = load_recipe(args.recipe, args.overrides)
    for warning in recipe.warnings:
        print_error(warning)
    file = shown_path(recipe_path(args.recipe))
    if args.diff:
        return _show_difference(recipe, file, args.diff)
    say(f"# {recipe.name}: {file}")
    say(f"#   {launch_line(plan_launch(recipe.launch), file, args.overrides)}")
    lines = list(_lines(recipe, _written(recipe), ()))
    width = max((len(text) for text, comment in lines if comment and len(text) < 60), default=0)
    for text, comment in lines:
        say(f"{text:<{width}}  # {comment}" if comment else text)
    say(f"# next: {shlex.join(['recipes', 'data', file, *args.overrides, '--show', '3'])}")
    return ExitCode.DONE


def _show_difference(recipe: Recipe, file: str, other_file: str) -> int:
    """Print the values that differ between two recipes, each with its origin."""
    rows = list(different_values(recipe, load_recipe(other_file)))
    other_file = shown_path(recipe_path(other_file))
    if not rows:
        say("no difference: every resolved value is the same")
    for line in aligned([("", file, other_file), *rows]) if rows else ():
        say(line)
    next_step(shlex.join(["recipes", "show", other_file]))
    return ExitCode.DONE


def different_values(a: Recipe, b: Recipe) -> Iterator[tuple[str, str, str]]:
    """Yield (key, value of a with origin, value of b with origin) where the resolved values differ.

    A run's derived name differs by nature and is left out.
    """
    # an absent section has no keys
    left, right = (
        {key: value for key, value in leaves(recipe.to_dict()) if "." in key or value is not None}
        for recipe in (a, b)
    )
    for key in dict.fromkeys([*left, *right]):
        derived_name = key == "run.name" and a.run.name is None and b.run.name is None
        absent_on_one_side = (key in left) != (key in right)
        if not derived_name and (absent_on_one_side or left[key] != right[key]):
            yield key, _cell(a, key, left), _cell(b, key, right)


def _cell(recipe: Recipe, key: str, values: dict[str, Any]) -> str:
    if key not in values:
        return "-"
    return f"{value_text(values[key])}  ({recipe.origin_of(key)})"


def launch_line(launch: Launch, file: str, overrides: Sequence[str]) -> str:
    """Return the plain command that trains a recipe; of several machines, machine 0's."""
    if launch.machines > 1:
        port = launch.config.main_process_port or DEFAULT_PORT
        launch = replace(launch, rank=0, address="HOST_OF_RANK_0", port=port)
    script = ["-m", "recipes_lib.train", file, *overrides]
    return shlex.join(["accelerate", "launch", *launch.launcher_words(), *script])


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested mappings with their values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _written(recipe: Recipe) -> dict[str, Any]:
    """Return what somebody wrote and the project's defaults; paths are absolute, so that it is a
    recipe anywhere.
    """
    values = {**recipe.values, "train": recipe.train}
    return {**values, "run": {**values.get("run", {}), "name": recipe.name}}


def _lines(
    recipe: Recipe, values: Mapping[str, Any], above: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Yield each line of YAML and the place of its value."""
    for key, value in values.items():
        text = f"{'  ' * len(above)}{key}:"
        if isinstance(value, dict) and value:
            yield text, ""
            yield from _lines(recipe, value, (*above, key))
        else:
            yield f"{text} {value_text(value)}", str(recipe.origin_of(".".join((*above, key))))
