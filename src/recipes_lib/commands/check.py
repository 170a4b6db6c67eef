"""recipes check: recipes, bases and every other YAML of a project, files or whole folders,
everything wrong at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from recipes_lib.config.documents import kind_of, no_such_file, read, wrong_kind
from recipes_lib.config.launch import AccelerateConfig, accelerate_rules
from recipes_lib.config.parsing import judge
from recipes_lib.config.recipe import Recipe, check_recipe, recipe_of
from recipes_lib.core.errors import (
    DataError,
    ExitCode,
    RecipeError,
    RecipesError,
    print_error,
)
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.splits import check_rows

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
    remarks: dict[str, RecipeError] = {}
    broken, alone = 0, len(files) == 1
    for file in files:
        found, notes = check_file(file, args.full)
        remarks |= {
            note.what if note.what.startswith("note:") else str(note): note for note in notes
        }
        broken += bool(found)
        errors |= {str(error): error for error in found}
    for remark in remarks.values():
        print_error(remark)
    count = f"{len(files)} file{'s' * (len(files) != 1)}"
    if errors:
        for error in sorted(errors.values(), key=lambda error: (str(error.file), error.line or 0)):
            print_error(error)
        what = f"{len(errors)} error{'s' * (len(errors) > 1)} in {broken} of {count}"
        print(what, file=sys.stderr)
        of_data = all(isinstance(error, DataError) for error in errors.values())
        return ExitCode.DATA if of_data else ExitCode.USAGE
    say(f"{count} ok")
    next_step(f"recipes data {shown_path(files[0])} --show 3" if alone else "recipes ls")
    return ExitCode.DONE


def check_file(path: Path, full: bool) -> tuple[list[RecipesError], list[RecipeError]]:
    """Return what is wrong with a file, and warnings and notes.

    Args:
        path: a YAML file of any kind.
        full: whether upstream's classes, the model's files and all rows are asked too.
    """
    try:
        document = read(path)
        kind = kind_of(document.values, document.text, document.file)
        if kind.name == "accelerate":
            document = read(path, yaml_1_1=True)
            _, errors = judge(AccelerateConfig, document, accelerate_rules)
            return [*errors], document.warnings
        if kind.name == "flat":
            return [RecipeError(f"is {kind.title}", kind.use, file=document.file)], []
        if kind.name == "profile":
            from recipes_lib.slurm.profile import load_profile

            load_profile(str(path))
            return [], []
        if kind.name in ("eval", "judge"):
            return _check_eval(path, kind.name)
        if kind.name == "lm_eval_task":
            return [], []  # seen with the eval recipe that names it
        if kind.name == "study":
            return _check_study(path, full)
        if kind.name not in ("recipe", "base"):
            return [wrong_kind(kind, "recipe", document.file)], []
        file, errors = check_recipe(document)
        if file is None or kind.name == "base":
            return [*errors], document.warnings
        if errors:
            with contextlib.suppress(RecipeError):  # a run's name, which is among the errors
                rows = check_rows(recipe_of(file, document), False)
                return [*errors, *rows], document.warnings
            return [*errors], document.warnings
        recipe, notes = recipe_of(file, document), document.warnings
        found: list[RecipesError] = [*_check_model(recipe, full, notes)]
        return found or [*check_rows(recipe, full)], notes
    except RecipeError as error:
        return [*error.errors], []
    except DataError as error:
        return [error], []


def _check_eval(path: Path, kind: str) -> tuple[list[RecipesError], list[RecipeError]]:
    from recipes_lib.evals.questions import local_questions
    from recipes_lib.evals.recipe import load_eval, load_judge_file

    if kind == "judge":
        load_judge_file(path)
    else:
        local_questions(load_eval(path))
    return [], []


def _check_study(path: Path, full: bool) -> tuple[list[RecipesError], list[RecipeError]]:
    from recipes_lib.config.preflight import check_upstream
    from recipes_lib.study.config import load_study
    from recipes_lib.study.run import unmet

    study = load_study(path)
    errors, warnings = unmet(study, study.arms)
    for arm in study.arms if full else ():
        for variant in (arm, *arm.candidates):
            errors += check_upstream(variant.recipe, notes=warnings)
    return [*{str(error): error for error in errors}.values()], warnings


def _check_model(recipe: Recipe, full: bool, notes: list[RecipeError]) -> Iterable[RecipeError]:
    """Return what is wrong with the model: a folder's files, and with `full` all that upstream
    says.
    """
    folder = Path(recipe.model.name_or_path)
    if not full and not folder.is_dir():
        return []
    from recipes_lib.config.preflight import check_model_files, check_upstream

    return check_upstream(recipe, notes=notes) if full else check_model_files(recipe, folder)


def _files(path: Path) -> Iterable[Path]:
    """Return the YAML files of a path; hidden folders and runs are left out.

    Raises:
        RecipeError: there is nothing at the path.
    """
    if not path.is_dir():
        if _OVERRIDE.match(str(path)) and not path.exists():
            what = f"'{path}' is a value, and recipes check reads files"
            hint = f"try it out: recipes show RECIPE '{path}', recipes eval EVAL RUN '{path}'"
            raise RecipeError(what, hint)
        path = recipe_path(path)
        if not os.path.lexists(path):  # a link that leads nowhere is there
            raise no_such_file(path)
        return [path]

    def left_out(file: Path) -> bool:
        folders = file.relative_to(path).parts[:-1]
        return any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in folders)

    files = sorted(file for file in path.rglob("*.y*ml") if file.suffix in (".yaml", ".yml"))
    files = [file for file in files if not left_out(file)]
    if not files:
        raise RecipeError("holds no YAML file", file=path)
    return files
