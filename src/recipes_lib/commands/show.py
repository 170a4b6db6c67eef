"""`recipes show`: a resolved recipe with the place of every value; `--diff OTHER`: what differs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from recipes_lib.commands import RecipeWord
from recipes_lib.config.documents import value_text
from recipes_lib.config.launch import DEFAULT_PORT, Launch, plan_launch
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.errors import ExitCode, print_error
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import aligned, say
from recipes_lib.training.resume_guard import differences, flatten


def run(
    recipe: RecipeWord,
    overrides: Sequence[str],
    *,
    diff: Annotated[str | None, "print only what differs from another recipe"] = None,
) -> int:
    """Print the recipe as YAML, so that the output is a recipe again."""
    loaded = load_recipe(recipe, overrides)
    for warning in loaded.document.warnings:
        print_error(warning)
    if diff is not None:
        say("\n".join(_differences(loaded, load_recipe(diff))))
        return ExitCode.DONE
    # what somebody wrote and the project's defaults; paths are absolute, so it is a recipe anywhere
    values, file = loaded.document.values, shown_path(loaded.path)
    named = {**values.get("run", {}), "name": loaded.name}
    lines = list(_lines(loaded, {**values, "train": loaded.train, "run": named}))
    say(f"# {loaded.name}: {file}")
    say(f"#   {launch_line(plan_launch(loaded.launch), file, overrides)}")
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


def _differences(a: Recipe, b: Recipe) -> list[str]:
    """Return the table of the resolved values that differ, with the place of each."""
    left, right = flatten(a.to_dict()), flatten(b.to_dict())
    if a.run.name is None and b.run.name is None:  # derived names differ by nature
        left["run.name"] = right["run.name"]
    rows = [["", shown_path(a.path), shown_path(b.path)]]
    for key, values in differences(left, right).items():
        cells = [
            "-" if value is None else f"{value_text(value)}  ({recipe.origin_of(key)})"
            for recipe, value in zip((a, b), values, strict=True)
        ]
        rows.append([key, *cells])
    return aligned(rows) if len(rows) > 1 else ["no difference"]


def _lines(
    recipe: Recipe, values: Mapping[str, object], above: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """Yield each line of YAML and the place of its value."""
    for key, value in values.items():
        text = f"{'  ' * len(above)}{key}:"
        if isinstance(value, dict) and value:
            yield text, ""
            yield from _lines(recipe, value, (*above, key))
        else:
            yield f"{text} {value_text(value)}", str(recipe.origin_of(".".join((*above, key))))
