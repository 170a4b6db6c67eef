"""recipes diff: what differs between two resolved recipes, each value with its origin."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from recipes_lib.config.flat import leaves
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.config.yaml_text import value_text
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.core.terminal import aligned, next_step, say

_MISSING = object()


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("a", metavar="A", help="a recipe")
    parser.add_argument("b", metavar="B", help="another recipe")


def run(args: argparse.Namespace) -> int:
    """Print only the differences, side by side."""
    a, b = load_recipe(args.a), load_recipe(args.b)
    names = [shown_path(recipe_path(name)) for name in (args.a, args.b)]
    rows = list(different_values(a, b))
    if not rows:
        say("no difference: every resolved value is the same")
    else:
        say("\n".join(aligned([("", *names), *rows])))
    next_step(f"recipes show {names[1]}")
    return ExitCode.DONE


def different_values(a: Recipe, b: Recipe) -> Iterator[tuple[str, str, str]]:
    """Yield (key, value of a with origin, value of b with origin) where the resolved values differ.

    A run's derived name differs by nature and is left out.
    """
    left, right = (
        # an absent section has no keys
        {key: value for key, value in leaves(one.to_dict()) if "." in key or value is not None}
        for one in (a, b)
    )
    for key in dict.fromkeys([*left, *right]):
        values = left.get(key, _MISSING), right.get(key, _MISSING)
        derived_name = key == "run.name" and a.run.name is None and b.run.name is None
        if values[0] != values[1] and not derived_name:
            yield key, _cell(a, key, values[0]), _cell(b, key, values[1])


def _cell(recipe: Recipe, key: str, value: Any) -> str:
    return "-" if value is _MISSING else f"{value_text(value)}  ({recipe.origin_of(key)})"
