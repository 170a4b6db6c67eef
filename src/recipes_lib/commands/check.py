"""`recipes check`: recipes, bases and every other YAML of a project, everything wrong at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from recipes_lib.config.documents import Document, kind_of, no_such_file, read, wrong_kind
from recipes_lib.config.launch import AccelerateConfig, accelerate_rules
from recipes_lib.config.parsing import judge
from recipes_lib.config.recipe import check_recipe, recipe_of
from recipes_lib.core.errors import DataError, ExitCode, RecipeError, RecipesError, print_error
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.splits import check_rows

Findings = tuple[list[RecipesError], list[RecipeError]]  # errors; warnings and notes


def run(
    paths: Annotated[list[str], "YAML files, names of recipes, or folders with YAML files"],
    *,
    full: Annotated[bool, "also build upstream's objects, and read all local rows"] = False,
) -> int:
    """Check every file; print warnings and notes, then all errors."""
    files = list(dict.fromkeys(file for path in paths for file in _files(Path(path))))
    errors: dict[str, RecipesError] = {}
    notes: dict[str, RecipesError] = {}
    broken = 0
    for file in files:
        wrong, noted = check_file(file, full)
        errors |= {str(error): error for error in wrong}
        notes |= {note.what if note.what.startswith("note:") else str(note): note for note in noted}
        broken += bool(wrong)
    by_place = sorted(errors.values(), key=lambda error: (str(error.file), error.line or 0))
    for message in (*notes.values(), *by_place):
        print_error(message)
    count = f"{len(files)} file{'s' * (len(files) != 1)}"
    if errors:
        summary = f"{len(errors)} error{'s' * (len(errors) > 1)} in {broken} of {count}"
        print(summary, file=sys.stderr)
        of_data = all(error.exit_code == ExitCode.DATA for error in by_place)
        return ExitCode.DATA if of_data else ExitCode.USAGE
    say(f"{count} ok")
    for file in files:
        kind = read(file).kind
        if kind == "recipe":
            return next_step("recipes", "data", shown_path(file), "--show", "3")
        if kind == "study":
            return next_step("recipes", "study", "plan", shown_path(file))
    return next_step("recipes ls")


def check_file(path: Path, full: bool) -> Findings:
    """Return what is wrong with a YAML file of any kind, and notes; `full` asks upstream too."""
    try:
        document = read(path)
        kind = kind_of(document)
        if kind.name in ("recipe", "base"):
            return _check_recipe(document, full, kind.name == "base")
        if kind.name == "study":
            return _check_study(path, full)
        if kind.name == "accelerate":
            document = read(path, yaml_1_1=True)
            return [*judge(AccelerateConfig, document, accelerate_rules)[1]], document.warnings
        if kind.name == "profile":
            from recipes_lib.slurm.profile import load_profile

            load_profile(str(path))
        elif kind.name == "judge":
            from recipes_lib.evals.recipe import load_judge_file

            load_judge_file(path)
        elif kind.name == "eval":
            from recipes_lib.evals.questions import local_questions
            from recipes_lib.evals.recipe import load_eval

            local_questions(load_eval(path))
        elif kind.name != "lm_eval_task":  # it is seen with the eval recipe that names it
            raise wrong_kind(kind, "recipe", document.file)
    except RecipeError as error:
        return [*error.errors], []
    except DataError as error:
        return [error], []
    return [], []


def _check_recipe(document: Document, full: bool, is_base: bool) -> Findings:
    file, wrong = check_recipe(document)
    if file is None or is_base:
        return [*wrong], document.warnings
    try:
        recipe = recipe_of(file, document)
    except RecipeError:  # a run's name
        return [*wrong], document.warnings
    errors: list[RecipesError] = [*wrong]
    folder = Path(recipe.model.name_or_path)
    if not wrong and (full or folder.is_dir()):
        from recipes_lib.config.preflight import check_model_files, check_upstream

        notes = document.warnings
        errors += check_upstream(recipe, notes=notes) if full else check_model_files(recipe, folder)
    if wrong or not errors:
        errors += check_rows(recipe, full and not wrong)
    return errors, document.warnings


def _check_study(path: Path, full: bool) -> Findings:
    from recipes_lib.config.preflight import check_upstream
    from recipes_lib.study.config import load_study
    from recipes_lib.study.run import unmet

    study = load_study(path)
    errors, warnings = unmet(study, study.arms)
    for arm in study.arms if full else ():
        for variant in (arm, *arm.candidates):
            errors += check_upstream(variant.recipe, notes=warnings)
    return errors, warnings


def _files(path: Path) -> Iterable[Path]:
    """Return the YAML files of a path; hidden folders and runs are left out."""
    if not path.is_dir():
        path = recipe_path(path)
        if not os.path.lexists(path):  # a link that leads nowhere is there
            raise no_such_file(path)
        return [path]
    files = []
    for file in sorted([*path.rglob("*.yaml"), *path.rglob("*.yml")]):
        folders = file.relative_to(path).parts[:-1]
        if not any(part.startswith(".") or part == "runs" for part in folders):
            files.append(file)
    if not files:
        raise RecipeError("holds no YAML file", file=path)
    return files
