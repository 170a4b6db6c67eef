"""recipes migrate: a flat TRL config becomes a recipe that passes `recipes check`."""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes_lib.config.documents import read
from recipes_lib.config.migrate import migrate
from recipes_lib.config.new import schema_line
from recipes_lib.core.errors import DataError, ExitCode, RecipeError
from recipes_lib.core.files import write_text
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.columns import look_at


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    flat = "a flat TRL YAML: trl sft --config, alignment handbook, open-r1"
    add("config", metavar="IN", help=flat)
    add("--output", metavar="OUT", required=True, help="the recipe to write")
    add("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    """Write the recipe and list every change.

    Raises:
        RecipeError: IN is no flat fine-tuning config, a value of it cannot be in a recipe, or OUT
            exists.
    """
    output = Path(args.output)
    if output.exists() and not args.force:
        hint = "add --force to replace it, or choose another --output"
        raise RecipeError("exists already", hint, file=output)
    source = Path(args.config)
    migration = migrate(source, schema_line(output), _prompt_formats(source))
    write_text(output, migration.text())
    for change in migration.changes:
        say(change)
    lost = sum("NOT CARRIED OVER" in change for change in migration.changes)
    say(f"{output}: {len(migration.changes)} changes, {lost} keys not carried over")
    next_step(f"recipes check --full {output}")
    return ExitCode.DONE


def _prompt_formats(source: Path) -> tuple[str, ...] | None:
    """Return how the rows that a flat file names can be read, where they are a file here."""
    values = read(source, yaml_1_1=True).values
    name = values.get("dataset_name") if isinstance(values, dict) else None
    if not isinstance(name, str) or not Path(name).exists():
        return None
    try:
        return look_at(Path(name)).prompt_formats
    except DataError:
        return None
