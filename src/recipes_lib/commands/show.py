"""`recipes show`: a resolved recipe, with the place every value was written; `--diff OTHER`: what
differs between two.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from recipes_lib.commands import RecipeWord
from recipes_lib.config.documents import value_text
from recipes_lib.config.launch import DEFAULT_PORT, Launch, plan_launch
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.errors import ExitCode, print_error
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.core.terminal import aligned, next_step, say


def run(
    recipe: RecipeWord,
    overrides: Sequence[str],
    *,
    diff: Annotated[str | None, "print only what differs from another recipe"] = None,
) -> int:
    """Print the recipe as YAML, so that the output is a recipe again."""
    loaded, file = load_recipe(recipe, overrides), shown_path(recipe_path(recipe))
    for warning in loaded.document.warnings:
        print_error(warning)
    if diff is not None:
        other = shown_path(recipe_path(diff))
        rows = _differences(loaded, load_recipe(diff))
        say("\n".join(aligned([("", file, other), *rows]) if rows else ["no difference"]))
        return next_step("recipes", "show", other)
    # what somebody wrote and the project's defaults; paths are absolute, so it is a recipe anywhere
    written: dict[str, Any] = {**loaded.document.values, "train": loaded.train}
    written["run"] = {**written.get("run", {}), "name": loaded.name}
    say(f"# {loaded.name}: {file}")
    say(f"#   {launch_line(plan_launch(loaded.launch), file, overrides)}")
    lines = list(_lines(loaded, written))
    width = max((len(text) for text, comment in lines if comment and len(text) < 60), default=0)
    for text, comment in lines:
        say(f"{text:<{width}}  # {comment}" if comment else text)
    say(f"# next: {shlex.join(['recipes', 'data', file, *overrides, '--show', '3'])}")
    return ExitCode.DONE


def launch_line(launch: Launch, file: str, overrides: Sequence[str]) -> str:
    """Return the plain command that trains a recipe; of several machines, machine 0's."""
    if launch.machines > 1:
        port = launch.config.main_process_port or DEFAULT_PORT
        launch = replace(launch, rank=0, address="HOST_OF_RANK_0", port=port)
    script = ["-m", "recipes_lib.train", file, *overrides]
    return shlex.join(["accelerate", "launch", *launch.launcher_words(), *script])


def _differences(a: Recipe, b: Recipe) -> list[tuple[str, str, str]]:
    """Return key, value and place in `a`, and in `b`, where the resolved values differ."""
    # an absent section has no keys
    left, right = (
        {key: value for key, value in _leaves(recipe.to_dict()) if "." in key or value is not None}
        for recipe in (a, b)
    )
    if a.run.name is None and b.run.name is None:  # derived names differ by nature
        left["run.name"] = right["run.name"] = None
    return [
        (key, _cell(a, key, left), _cell(b, key, right))
        for key in dict.fromkeys([*left, *right])
        if left.get(key, left) != right.get(key, left)
    ]


def _cell(recipe: Recipe, key: str, values: dict[str, Any]) -> str:
    return f"{value_text(values[key])}  ({recipe.origin_of(key)})" if key in values else "-"


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested mappings with their values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lines(
    recipe: Recipe, values: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """Yield each line of YAML and the place of its value."""
    for key, value in values.items():
        text = f"{'  ' * len(above)}{key}:"
        if isinstance(value, dict) and value:
            yield text, ""
            yield from _lines(recipe, value, (*above, key))
        else:
            yield f"{text} {value_text(value)}", str(recipe.origin_of(".".join((*above, key))))
