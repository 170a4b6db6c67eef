"""`recipes migrate`: a flat TRL config becomes a recipe that passes `recipes check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from recipes_lib.config.documents import read
from recipes_lib.config.migrate import migrate
from recipes_lib.config.new import schema_line
from recipes_lib.core.errors import DataError, RecipeError
from recipes_lib.core.files import write_text
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.columns import look_at


def run(
    config: Annotated[Path, "a flat TRL YAML: trl sft --config, alignment handbook, open-r1"],
    *,
    output: Annotated[Path, "the recipe to write"],
    force: Annotated[bool, "replace OUTPUT if it exists"] = False,
) -> int:
    """Write the recipe and list every change."""
    if output.exists() and not force:
        hint = "add --force to replace it, or choose another --output"
        raise RecipeError("exists already", hint, file=output)
    migration = migrate(config, schema_line(output), _prompt_formats(config))
    write_text(output, migration.text())
    for change in migration.changes:
        say(change)
    lost = sum("NOT CARRIED OVER" in change for change in migration.changes)
    say(f"{output}: {len(migration.changes)} changes, not carried over: {lost}")
    return next_step("recipes", "check", "--full", output)


def _prompt_formats(config: Path) -> tuple[str, ...] | None:
    """Return how the rows that a flat file names can be read, if they are on this machine."""
    values = read(config, yaml_1_1=True).values
    name = values.get("dataset_name") if isinstance(values, dict) else None
    if not isinstance(name, str) or not Path(name).exists():
        return None
    try:
        return look_at(Path(name)).prompt_formats
    except DataError:
        return None
