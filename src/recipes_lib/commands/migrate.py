"""recipes migrate: a flat TRL config becomes a recipe that passes `recipes check`."""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes_lib.config.loader import load_document
from recipes_lib.config.migrate import keys_behind, migrate
from recipes_lib.config.new import schema_line
from recipes_lib.config.validation import check
from recipes_lib.config.yaml_source import read_yaml
from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.core.terminal import next_step, say

_ROUNDS = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    flat = "a flat TRL YAML: trl sft --config, alignment handbook, open-r1"
    add("config", metavar="IN", help=flat)
    add("--output", metavar="OUT", required=True, help="the recipe to write")
    add("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    """Write the recipe and list every change; values that the check refuses become comments.

    Raises:
        RecipeError: IN is no flat fine-tuning config, OUT exists, or the result has errors that
            leaving keys out cannot mend.
    """
    source, output = Path(args.config), Path(args.output)
    if output.exists() and not args.force:
        raise RecipeError(
            "exists already", "add --force to replace it, or choose another --output", file=output
        )
    rejected: dict[str, str] = {}
    for _ in range(_ROUNDS):
        migration = migrate(source, schema_line(output), rejected)
        write_text(output, migration.text())
        errors = _errors(output)
        refused = keys_behind(errors, migration, read_yaml(output).lines)
        if not errors or not refused - rejected.keys():
            break
        for error in errors:
            for key in keys_behind([error], migration, read_yaml(output).lines):
                rejected.setdefault(key, error.what)
    for change in migration.changes:
        say(change)
    if errors:
        raise RecipeErrors(errors)
    lost = sum("NOT CARRIED OVER" in change for change in migration.changes)
    changes = f"{len(migration.changes)} changes, {lost} of them not carried over"
    say(f"{output}: {f'{changes} (comments at its end)' if lost else 'nothing was lost'}")
    next_step(f"recipes check --full {output}")
    return 0


def _errors(path: Path) -> list[RecipeError]:
    try:
        return check(load_document(path), full=False)
    except RecipeError as error:
        return error.errors
