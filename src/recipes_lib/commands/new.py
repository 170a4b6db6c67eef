"""`recipes new`: a recipe of your own that starts from an existing one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from recipes_lib.config.new import Method, new_recipe
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import RecipeError, RecipesError
from recipes_lib.core.files import write_text
from recipes_lib.core.project import check_run_name, shown_path
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.columns import look_at
from recipes_lib.data.splits import check_rows


def run(
    name: Annotated[str, "name of the recipe and of its run"],
    *,
    from_: Annotated[str, "the recipe to start from, for example quickstart/lora-r8"],
    model: Annotated[str | None, "another base model: a Hub id or a folder"] = None,
    data: Annotated[Path | None, "your rows: jsonl, json, csv, parquet, ..., or a folder"] = None,
    method: Annotated[Method | None, "what is trained"] = None,
    output: Annotated[Path | None, "default: NAME.yaml, in ./recipes if there is one"] = None,
) -> int:
    """Write the recipe and print it; nothing is left where the rows cannot be read."""
    check_run_name(name)
    folder = Path("recipes") if Path("recipes").is_dir() else Path()
    target = output or folder / f"{name}.yaml"
    file = shown_path(target)
    if target.exists():
        raise RecipeError("exists already", "write elsewhere: --output OTHER.yaml", file=file)
    origin, rows = load_recipe(from_), look_at(data) if data else None
    text = new_recipe(name, target, origin, model=model, rows=rows, method=method)
    write_text(target, text)
    try:
        recipe = load_recipe(target)
        for error in check_rows(recipe) if rows else ():
            raise error
    except RecipesError:
        target.unlink()
        raise
    say(f"wrote {file}:\n{text.rstrip()}")
    return next_step("recipes", "check", file)
