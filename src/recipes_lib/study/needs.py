"""What a study needs for its evaluations, looked for before the first training: a test split, files
of prompts, an opponent, a tracker, rows that hold none of its questions. Needs no torch.
"""

from __future__ import annotations

import importlib.util
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from recipes_lib.analysis.text import sentence_list
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import DataError, RecipeError, RecipeErrors, print_error
from recipes_lib.core.project import shown_path
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.data.leaks import Leaks
from recipes_lib.evals.leaks import leak_error, search_recipe
from recipes_lib.evals.log import REFERENCE
from recipes_lib.evals.questions import local_questions
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.study.config import BASE_ARM, Arm, Study, load_study
from recipes_lib.study.runs import runs_left

_TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
_HELD_OUT = ("test", "validation")
ANSWER_S = 3.0


def refuse_unmet(study: Study, fetch: bool = False, ask_judges: bool = True) -> None:
    """Refuse a study whose evaluations would fail, or mean nothing, after its trainings; print what
    is only a warning.

    Args:
        fetch: whether rows and questions may be fetched from the Hub.
        ask_judges: whether judges should answer from here; a job starts its own.

    Raises:
        RecipeErrors: everything that is wrong.
    """
    left = {one.arm.name for one in runs_left(study)}
    arms = [
        arm
        for arm in study.arms
        if left & {arm.name, *(one.name for one in (arm.tuning.candidates if arm.tuning else ()))}
    ]
    errors, remarks = leaks_of_study(study, arms, fetch)
    errors += unmet(study)
    unreachable = unreachable_judges(study) if ask_judges else ()
    for remark in (*remarks, *unreachable):
        print_error(remark)
    if errors:
        raise RecipeErrors(errors)


def check_study_needs(path: Path) -> tuple[list[RecipeError], list[RecipeError]]:
    """Return the errors about a study's arms and evals, and warnings, for `recipes check`; what
    could not be searched is left to the training.
    """
    study = load_study(path)
    errors, remarks = leaks_of_study(study, study.arms)
    warnings = [one for one in remarks if not one.what.startswith("note:")]
    return [*errors, *unmet(study)], warnings


# ---- What an evaluation needs ----


def unmet(study: Study) -> list[RecipeError]:
    """Return what is missing for the study's evals and trackers, each at its line."""
    errors: list[RecipeError] = []
    for position, recipe in enumerate(study.evals):
        origin = study.origins.get(("evals", position))
        for what, hint in _unmet(study, recipe):
            file, line = (origin.file, origin.line) if origin else (study.path, None)
            errors.append(RecipeError(f"{recipe.name}: {what}", hint, file=file, line=line))
    for trained, names in _by_data(study.arms, "report_to"):
        asked = trained.train.get("report_to") or []
        for tracker in [asked] if isinstance(asked, str) else asked:
            if tracker in _TRACKERS and importlib.util.find_spec(tracker) is None:
                what = f"{sentence_list(names)}: train.report_to: {tracker} is not installed"
                errors.append(RecipeError(what, f"pip install {tracker}", file=trained.path))
    return errors


def _unmet(study: Study, recipe: EvalRecipe) -> Iterator[tuple[str, str]]:
    """Yield what one eval misses, and what to do."""
    split = recipe.data.questions
    if recipe.suite.name == "heldout_loss" and split in _HELD_OUT:
        without = [arm.name for arm in study.arms if not getattr(arm.recipe.data.split, split)]
        if without:
            what = (
                f"{sentence_list(without)} {'has' if len(without) == 1 else 'have'} no {split} rows"
            )
            yield what, f"set data.split.{split} in the recipe, or name a file of rows in the eval"
    elif recipe.suite.name == "heldout_loss" and split:
        path = recipe.path_of("data.questions")
        if path.suffix and not path.exists():
            yield f"there is no {shown_path(path)}", "correct data.questions"
    else:
        try:
            local_questions(recipe)
        except DataError as error:
            yield str(error).splitlines()[0], "correct the questions"
    own = recipe.opponent(None) if recipe.is_judged else None
    if own not in (None, REFERENCE, BASE_ARM) and not _is_run(str(own)):
        what = f"its opponent '{own}' (metrics.against) is no run in the runs folder"
        yield what, "in a study it is reference, base, or the name of a finished run"
    if own == BASE_ARM and not study.include_base:
        yield "it compares with the base, which is not evaluated", "set include_base: true"
    if recipe.judge is None:
        return
    model = recipe.judge.judge.model
    here = recipe.judge.judge.engine == "transformers" and model.startswith(("/", "./", "../", "~"))
    if here and not Path(model).expanduser().is_dir():
        yield f"there is no judge model {model}", "correct judge.model"


def _is_run(name: str) -> bool:
    with suppress(RecipeError):
        return RunDirectory(name).exists()
    return False


def unreachable_judges(study: Study) -> Iterator[RecipeError]:
    """Yield a warning for each judge's server that does not answer now."""
    addresses = {
        one.judge.judge.base_url: one.name
        for one in study.evals
        if one.judge and one.judge.judge.engine == "openai" and one.judge.judge.base_url
    }
    for address, name in addresses.items():
        try:
            urllib.request.urlopen(f"{address.rstrip('/')}/models", timeout=ANSWER_S).close()
        except urllib.error.HTTPError:
            continue  # it answers, and wants a key
        except (OSError, ValueError) as error:
            what = f"warning: the judge of {name} does not answer at {address}: {error}"
            yield RecipeError(what, "it must be there when the trainings are done")


# ---- Leaks ----


def leaks_of_study(
    study: Study, arms: Sequence[Arm], fetch: bool = False
) -> tuple[list[RecipeError], list[RecipeError]]:
    """Return the errors and the remarks about arms that would train on rows with questions of the
    study's evals; arms that train on the same data share one.
    """
    errors: list[RecipeError] = []
    remarks: list[RecipeError] = []
    evals = [one for one in study.evals if one.suite.name != "lm_eval"]  # with each evaluation
    for recipe, names in _by_data(arms):
        whose, unknown = f"rows of {sentence_list(names)}", defaultdict(list)
        for name, leaks in search_recipe(recipe, evals, fetch).items():
            if leaks.why:
                unknown[leaks.why].append(name)
            elif leaks.found:
                error = leak_error(name, leaks, recipe, whose)
                (errors if leaks.is_error else remarks).append(error)
        for why, some in unknown.items():
            summary = Leaks(why=why).summary(sentence_list(some))
            remarks.append(RecipeError(f"note: {whose} {summary}"))
    return errors, remarks


def _by_data(arms: Sequence[Arm], train_key: str = "") -> list[tuple[Recipe, list[str]]]:
    """Return the recipes with different data, or with different values of a key of `train`, each
    with the names of its arms.
    """
    found: dict[str, tuple[Recipe, list[str]]] = {}
    for arm in arms:
        if arm.recipe:
            key = str(arm.recipe.train.get(train_key) if train_key else arm.recipe.data)
            found.setdefault(key, (arm.recipe, []))[1].append(arm.name)
    return list(found.values())
