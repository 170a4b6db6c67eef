"""recipes new: a recipe of your own that starts from an existing one."""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes_lib.config.new import new_recipe
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.core.files import write_text
from recipes_lib.core.project import check_run_name, shown_path
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.columns import look_at
from recipes_lib.data.splits import check_rows


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("name", metavar="NAME", help="name of the recipe and of its run")
    origin = "the recipe to start from, for example quickstart/lora-r8"
    add("--from", dest="origin", metavar="RECIPE", required=True, help=origin)
    add("--model", metavar="MODEL", help="another base model: a Hub id or a folder")
    data = (
        "your rows: jsonl, json, csv, tsv, parquet, arrow, or a folder of them; the first row says"
        " how they are read"
    )
    add("--data", metavar="FILE", type=Path, help=data)
    add("--method", choices=("lora", "qlora", "full"), help="what is trained")
    output = "where to write it; default NAME.yaml, in ./recipes if there is one"
    add("--output", metavar="PATH", type=Path, help=output)


def run(args: argparse.Namespace) -> int:
    """Write the recipe and print it.

    Raises:
        RecipeError: the name cannot be a run's name, or the file exists.
        DataError: the rows cannot be read, or their columns are not understood. When a row is the
            reason, the recipe was written, so that the key the error names can be set in it.
    """
    check_run_name(args.name)
    folder = Path("recipes") if Path("recipes").is_dir() else Path()
    target = args.output or folder / f"{args.name}.yaml"
    file = shown_path(target)
    if target.exists():
        raise RecipeError("exists already", "choose another name, or --output PATH", file=file)
    origin, rows = load_recipe(args.origin), look_at(args.data) if args.data else None
    text = new_recipe(args.name, target, origin, model=args.model, rows=rows, method=args.method)
    write_text(target, text)
    recipe = load_recipe(target)
    say(f"wrote {file}:")
    say(text.rstrip("\n"))
    if rows is not None:
        for error in check_rows(recipe):
            raise error
    next_step(f"recipes check {file}")
    return ExitCode.DONE
