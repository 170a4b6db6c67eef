"""recipes show: a resolved recipe, with the place every value was written; `--flat` as a plain TRL
config.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from recipes_lib.config.flat import flat_text
from recipes_lib.config.launch import DEFAULT_PORT, plan_launch
from recipes_lib.config.recipe import PROJECT_DEFAULT, UPSTREAM_DEFAULT, Recipe, load_recipe
from recipes_lib.config.vocabulary import subschema
from recipes_lib.config.yaml_source import KeyPath
from recipes_lib.config.yaml_text import join_lines, yaml_lines
from recipes_lib.core.errors import ExitCode, print_error
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.core.terminal import say


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="path or name of a recipe")
    parser.add_argument(
        "--flat", action="store_true", help="print a plain TRL config, for: trl sft --config FILE"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="also print the values nobody wrote, with upstream's defaults",
    )


def run(args: argparse.Namespace) -> int:
    """Print the recipe as YAML, so that the output is a recipe (or a TRL config) again."""
    recipe = load_recipe(args.recipe, args.overrides)
    for warning in recipe.warnings:
        print_error(warning)
    file = shown_path(recipe_path(args.recipe))
    if args.flat:
        say(flat_text(recipe, file))
        say("# next: save this as FILE, then: trl sft --config FILE")
        return ExitCode.DONE
    say(f"# {recipe.name}: {file}")
    say(f"#   {launch_line(recipe, file, args.overrides)}")
    say(
        join_lines(
            yaml_lines(
                shown_values(recipe, everything=args.all), lambda path: _comment(recipe, path)
            )
        )
    )
    say(f"# next: {shlex.join(['recipes', 'data', file, *args.overrides, '--show', '3'])}")
    return ExitCode.DONE


def launch_line(recipe: Recipe, file: str, overrides: Sequence[str] = ()) -> str:
    """Return the plain command that trains the recipe with its default launch; several machines
    each put in their own rank.
    """
    launch = plan_launch(recipe.launch)
    if launch.machines > 1:
        launch = replace(
            launch,
            rank=0,
            address="HOST_OF_RANK_0",
            port=launch.config.main_process_port or DEFAULT_PORT,
        )
    return shlex.join(
        [
            "accelerate",
            "launch",
            *launch.launcher_words(),
            "-m",
            "recipes_lib.train",
            file,
            *overrides,
        ]
    )


def shown_values(recipe: Recipe, *, everything: bool = False) -> dict[str, Any]:
    """Return the sections with the values somebody chose, or with all defaults."""
    if everything:
        values = recipe.to_dict()
        for section in (
            "train",
            *(name for name in ("lora", "quantization") if values[name] is not None),
        ):
            known = (subschema(section) or {})["properties"]
            values[section] = {
                **{key: schema.get("default") for key, schema in known.items()},
                **values[section],
            }
        return values
    return recipe.written_values()


def _comment(recipe: Recipe, path: KeyPath) -> str:
    """Return the origin of a value as a comment."""
    origin = recipe.origin_of(".".join(map(str, path)))
    return (
        "default"
        if origin == UPSTREAM_DEFAULT
        else "project default"
        if origin == PROJECT_DEFAULT
        else str(origin)
    )
