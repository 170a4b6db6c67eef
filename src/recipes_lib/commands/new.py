"""recipes new: a recipe of your own that starts from an existing one."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from recipes_lib.config.new_recipe import new_recipe
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.errors import DataError, ExitCode, RecipeError, RecipesError
from recipes_lib.core.project import check_run_name, project_root, recipe_path, shown_path
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.columns import look_at
from recipes_lib.data.examples import place
from recipes_lib.data.rows import check_local_rows
from recipes_lib.models.known import named_shape
from recipes_lib.planning.lengths import needed_length

_CHANGED = (
    "name_or_path:",
    "source:",
    "r:",
    "learning_rate:",
    "num_train_epochs:",
    "max_steps:",
    "max_length:",
    "eval_steps:",
    "save_steps:",
    "global_batch_size:",
)
VOCABULARY, POSITIONS = 50_000, 4096  # where nothing is known of the model


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("name", metavar="NAME", help="name of the recipe and of its run")
    origin = "the recipe to start from, for example quickstart/lora-r8"
    add("--from", dest="origin", metavar="RECIPE", required=True, help=origin)
    data = (
        "your rows: jsonl, json, csv, tsv, parquet, arrow, or a folder of them; the first row says"
        " how they are read"
    )
    add("--data", metavar="FILE", type=Path, help=data)
    output = "where to write it; default recipes/NAME.yaml"
    add("--output", metavar="PATH", type=Path, help=output)


def run(args: argparse.Namespace) -> int:
    """Write the recipe and point at the lines people change.

    Raises:
        RecipeError: the name cannot be a run's name, or the file exists.
        DataError: the rows cannot be read, or their columns are not understood. When a row is the
            reason, the recipe was written, so that the key the error names can be set in it.
    """
    check_run_name(args.name)
    target = args.output or _recipes_folder() / f"{args.name}.yaml"
    if target.exists():
        raise RecipeError(
            "exists already", "choose another name, or --output PATH", file=shown_path(target)
        )
    origin, rows = load_recipe(recipe_path(args.origin)), look_at(args.data) if args.data else None
    text = new_recipe(args.name, target, origin, rows)
    write_text(target, text)
    if rows is not None and (length := _needed_length(target)):
        text = new_recipe(args.name, target, origin, replace(rows, max_length=length))
        write_text(target, text)
    file = shown_path(target)
    say(f"wrote {file}; the lines people change:")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip().startswith(_CHANGED):
            say(f"  {file}:{number}: {line.strip()}")
    if args.data:
        recipe = load_recipe(target)
        try:
            check_local_rows(recipe.data)
        except DataError as error:
            raise place(recipe, error) from None
    next_step(f"recipes check {file}")
    return ExitCode.DONE


def _needed_length(target: Path) -> int | None:
    """Return the max_length that the rows of a new recipe need, as far as its model goes; None
    where they cannot be read, which is said afterwards.
    """
    try:
        recipe = load_recipe(target)
        shape = named_shape(recipe.model.name_or_path)
        length = needed_length(recipe, shape.vocabulary if shape else VOCABULARY)
    except RecipesError:
        return None
    return length and min(length, shape.positions if shape else POSITIONS)


def _recipes_folder() -> Path:
    """Return recipes/ of the working directory if there is one, else the project's."""
    return Path("recipes") if Path("recipes").is_dir() else project_root() / "recipes"
