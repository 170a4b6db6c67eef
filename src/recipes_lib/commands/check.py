"""`recipes check`: what is wrong with YAML files of any kind. Imports no torch, but with --full."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from recipes_lib.config.documents import Document, no_such_file, read, wrong_kind
from recipes_lib.config.launch import AccelerateConfig, accelerate_rules, plan_launch
from recipes_lib.config.parsing import judge
from recipes_lib.config.preflight import check_model_files, check_upstream, planned_launch
from recipes_lib.config.recipe import Recipe, check_recipe, recipe_of
from recipes_lib.config.upstream_sections import GOING_IN_TRL_2
from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.errors import (
    DataError,
    RecipeError,
    RecipeErrors,
    RecipesError,
    missing_extra,
    print_error,
)
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.core.terminal import count, next_step, say
from recipes_lib.data.errors import place
from recipes_lib.data.prompts import chat_template
from recipes_lib.data.reading import check_rows

if TYPE_CHECKING:
    from recipes_lib.evals.recipe import EvalRecipe

# What reads the other kinds of files is imported where it is needed: most files are recipes, and
# jinja2, numpy and the schema of evals take as long as the rest.

# To read more rows than this takes longer than to import torch.
_MOST_BYTES = 50_000_000


def run_check(
    paths: Annotated[list[str], "YAML files, names of recipes, or folders with YAML files"],
    *,
    full: Annotated[bool, "also build the objects of TRL and PEFT"] = False,
) -> int:
    """Check every file; print notes, then all errors."""
    files: dict[Path, None] = {}  # each once, in order
    for path in paths:
        files |= dict.fromkeys(_files(Path(path)))
    if full:
        quiet_libraries()
    notes: list[RecipeError] = []
    errors: dict[str, RecipesError] = {}  # by text: two recipes may share a base's error
    num_wrong = 0
    for file in files:
        errors_of_file: list[RecipesError] = []
        try:
            errors_of_file.extend(_faults(file, full, notes))
        except (RecipeError, DataError) as error:
            errors_of_file += getattr(error, "errors", [error])
        except ModuleNotFoundError as error:  # what needs no extra is checked
            missing = missing_extra(error)
            if missing is None:
                raise
            notes.append(RecipeError(f"note: not all is checked: {missing}", file=file))
        errors |= {str(error): error for error in errors_of_file}
        if errors_of_file:
            num_wrong += 1
    for note in {str(note): note for note in notes}.values():
        print_error(note)
    num_files = count(len(files), "file")
    if errors:
        failure = RecipeErrors(errors.values())
        print_error(failure)
        print_error(f"{count(len(errors), 'error')} in {num_wrong} of {num_files}")
        return failure.exit_code
    say(f"{num_files} ok")
    verbs = {"recipe": ("data",), "study": ("study", "plan")}
    for file in files:
        document = read(file)
        if document.kind in verbs and not document.is_base:
            return next_step(*verbs[document.kind], shown_path(file))
    return next_step("ls")


def _faults(path: Path, full: bool, notes: list[RecipeError]) -> Iterator[RecipesError]:
    """Yield what is wrong with a YAML file; `full` asks upstream too, and notes what it cannot."""
    document = read(path)
    kind = document.kind
    if kind == "recipe":
        yield from recipe_faults(document, full, notes)
    elif kind == "study":
        from recipes_lib.study.config import load_study
        from recipes_lib.study.progress import nothing_to_compare, unmet

        study = load_study(path)
        yield from unmet(study, study.arms)
        notes.extend(nothing_to_compare(study))
        for arm in study.arms:
            notes.extend(_going_keys(arm.recipe))
        notes.extend(_warnings([arm.recipe for arm in study.arms], study.evals, full))
        if full:
            for arm in study.arms:
                for variant in (arm, *arm.candidates):
                    launch = planned_launch(variant.launch)
                    yield from check_upstream(variant.recipe, launch=launch, notes=notes)
    elif kind == "accelerate":
        yield from judge(AccelerateConfig, document, accelerate_rules)[1]
    elif kind == "profile":
        from recipes_lib.slurm.profile import load_profile

        load_profile(str(path))
    elif kind == "judge":
        from recipes_lib.evals.recipe import load_judge_file

        load_judge_file(path)
    elif kind == "eval":
        from recipes_lib.evals.questions import local_questions
        from recipes_lib.evals.recipe import load_eval

        evaluation = load_eval(path)
        local_questions(evaluation)
        notes.extend(_warnings([], [evaluation], full))
    elif kind != "lm_eval_task":  # it is seen with the eval recipe that names it
        raise wrong_kind(document, "recipe")


def _warnings(
    recipes: Sequence[Recipe], evals: "Sequence[EvalRecipe]", full: bool
) -> Iterator[RecipeError]:
    """Yield a warning for what is not there yet: a judge's key or server, a tracker's login."""
    from recipes_lib.study.needs import Host, missing_needs

    # `full` finds packages that are missing by itself
    for need in missing_needs(recipes, evals, Host(own_python=not full)):
        yield RecipeError(f"warning: {need.what}", *need.hints, file=need.file, line=need.line)


def refuse_faults(recipe: Recipe) -> None:
    """Raise what `recipes check` finds in a recipe, before torch is loaded for it."""
    errors = list(recipe_faults(recipe.document, False, [], most_bytes=_MOST_BYTES))
    if errors:
        raise RecipeErrors(errors)


def recipe_faults(
    document: Document, full: bool, notes: list[RecipeError], most_bytes: int | None = None
) -> Iterator[RecipesError]:
    """Yield what is wrong with a recipe; rows of more than `most_bytes` are not read."""
    file, wrong = check_recipe(document)
    yield from wrong
    if file is None or document.is_base:
        return
    recipe = recipe_of(file, document)
    notes.extend(_going_keys(recipe))
    folder = Path(recipe.model.name_or_path)
    errors: list[RecipeError] = []
    if not wrong and full:
        launch = planned_launch(plan_launch(recipe.launch))
        errors += check_upstream(recipe, launch=launch, notes=notes)
    elif not wrong and folder.is_dir():
        errors += check_model_files(recipe, folder)
    yield from errors
    if not errors:
        yield from check_rows(recipe, most_bytes)
        if recipe.train.get("report_to", "none") != "none":
            notes.extend(_warnings([recipe], [], full))
    try:
        if recipe.data.chat_template:
            chat_template(recipe.data, None)
    except DataError as error:
        yield place(recipe, error)


def _going_keys(recipe: Recipe) -> Iterator[RecipeError]:
    """Yield a warning for each value of `train` that TRL 2.0 removes."""
    for key, (removed, instead) in GOING_IN_TRL_2.items():
        value = recipe.train.get(key)
        if value is not None and removed in (None, value):
            what = f"warning: TRL 2.0 removes train.{key}: {json.dumps(value)}"
            yield recipe.error(f"train.{key}", what, instead)


def _files(path: Path) -> Iterable[Path]:
    """Return the YAML files of a path; hidden folders and runs are left out."""
    if not path.is_dir():
        path = recipe_path(path)
        if "=" in path.name and not path.exists():
            what = f"recipes check takes files, not overrides: {path}"
            raise RecipeError(what, f"recipes show FILE {path} checks a recipe with it")
        if not os.path.lexists(path):  # a link that leads nowhere is there
            raise no_such_file(path)
        return [path]
    files = sorted([*path.rglob("*.yaml"), *path.rglob("*.yml")])
    hidden = re.compile(r"(^|/)(\..*|runs)/")
    files = [file for file in files if not hidden.search(str(file.relative_to(path)))]
    if not files:
        raise RecipeError("holds no YAML file", file=path)
    return files
