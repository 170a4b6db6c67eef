"""recipes check: recipes, bases and accelerate configs, files or whole folders, everything wrong at
once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from recipes_lib.config.kinds import at
from recipes_lib.config.loader import load_document
from recipes_lib.config.validation import check
from recipes_lib.config.yaml_source import no_such_file
from recipes_lib.core.errors import (
    DataError,
    ExitCode,
    RecipeError,
    RecipesError,
    in_order,
    print_error,
)
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.core.terminal import next_step, say

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
_SKIPPED_FOLDERS = {"runs", "node_modules"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    paths = "YAML files, names of recipes, or folders with YAML files of any kind"
    add("paths", metavar="PATH", nargs="+", help=paths)
    full = (
        "also build TRL's, PEFT's and bitsandbytes' objects, read the model's config and all local"
        " rows"
    )
    add("--full", action="store_true", help=full)


def run(args: argparse.Namespace) -> int:
    """Check every file; print all errors, then warnings and notes.

    Raises:
        RecipeErrors: everything that is wrong.
    """
    files = list(dict.fromkeys(file for path in args.paths for file in _files(Path(path))))
    errors: dict[str, RecipesError] = {}
    remarks: list[RecipeError] = []
    broken = 0
    for file in files:
        found: list[RecipesError] = []
        try:
            document = load_document(file, keep_going=True)
            if document.kind.name == "profile":
                at("slurm.profile:load_profile")(str(file))
                continue
            if document.kind.name in ("eval", "judge"):
                from recipes_lib.evals.questions import local_questions
                from recipes_lib.evals.recipe import check_eval_file, load_eval

                wrong, notes = check_eval_file(file)
                found += wrong
                remarks += notes
                if not found and document.kind.name == "eval":
                    local_questions(load_eval(file))
                continue
            if document.kind.name == "lm_eval_task":
                continue  # seen with the eval recipe that names it
            found += check(document, args.full)
            if not found:
                found += document.kind.check_rows(document, args.full)
            remarks += document.warnings
        except RecipeError as error:
            found += error.errors
        except DataError as error:
            found.append(error)
        finally:
            broken += bool(found)
            errors |= {str(error): error for error in found}
    _print_remarks(remarks)
    if errors:
        for one in in_order(errors.values()):
            print_error(one)
        what = f"{len(errors)} error{'s' * (len(errors) > 1)} in {broken} of {_count(files)}"
        print(what, file=sys.stderr)
        of_data = all(isinstance(error, DataError) for error in errors.values())
        return ExitCode.DATA if of_data else ExitCode.USAGE
    say(f"{_count(files)} ok")
    alone = len(files) == 1 and document.kind.name == "recipe"
    next_step(f"recipes data {shown_path(files[0])} --show 3" if alone else "recipes ls")
    return ExitCode.DONE


def _files(path: Path) -> Iterable[Path]:
    """Return the YAML files of a path; hidden folders and runs are left out.

    Raises:
        RecipeError: there is nothing at the path.
    """
    if not path.is_dir():
        if _OVERRIDE.match(str(path)) and not path.exists():
            what = f"'{path}' is a value, and recipes check reads files"
            raise RecipeError(
                what,
                f"try it out: recipes show RECIPE '{path}'",
                f"of an eval or a study: recipes eval EVAL RUN '{path}', recipes study plan STUDY"
                f" '{path}'",
            )
        path = recipe_path(path)
        if not os.path.lexists(path):  # a link that leads nowhere is there
            raise no_such_file(path, str(path))
        return [path]

    def left_out(file: Path) -> bool:
        folders = file.relative_to(path).parts[:-1]
        return any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in folders)

    files = sorted(file for file in path.rglob("*.y*ml") if file.suffix in (".yaml", ".yml"))
    files = [file for file in files if not left_out(file)]
    if not files:
        raise RecipeError("holds no YAML file", file=path)
    return files


def _print_remarks(remarks: list[RecipeError]) -> None:
    """Print warnings once each; equal notes are counted instead of repeated."""
    by_text: dict[str, list[RecipeError]] = {}
    for one in remarks:
        text = one.what if one.what.startswith("note:") else str(one)
        by_text.setdefault(text, []).append(one)
    for first, *more in by_text.values():
        what = first.what
        if more and what.startswith("note:"):
            what += f" ({1 + len(more)} files)"
        print_error(RecipeError(what, *first.hints, file=first.file, line=first.line))


def _count(files: list[Path]) -> str:
    return f"{len(files)} file{'s' * (len(files) != 1)}"
