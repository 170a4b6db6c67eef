"""Whether a study would train its arms on what it evaluates them with: found before the first
training. Needs no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from recipes_lib.compare.design import Arm, Study, load_study
from recipes_lib.compare.wording import sentence_list
from recipes_lib.config.loader import Document
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipeError, RecipeErrors, print_error
from recipes_lib.data.leaks import Leaks
from recipes_lib.study.graph import TRAININGS, Step
from recipes_lib.suites.leaks import leak_error, search_recipe


def refuse_leaks(study: Study, steps: Sequence[Step], fetch: bool = False) -> None:
    """Refuse trainings on rows that hold questions or answers of the study's evals; print what is
    only a warning, and what could not be searched.

    Args:
        steps: those that would be done; only arms that are to be trained are looked at.
        fetch: whether rows and questions may be fetched from the Hub.

    Raises:
        RecipeErrors: one error for each eval and each data, with the rows.
    """
    names = {step.arm for step in steps if step.kind in TRAININGS}

    def is_trained(arm: Arm) -> bool:
        tried = arm.tuning.candidates if arm.tuning else ()
        return any(one.name in names for one in (arm, *tried))

    errors, remarks = leaks_of_study(study, list(filter(is_trained, study.arms)), fetch)
    for remark in remarks:
        print_error(remark)
    if errors:
        raise RecipeErrors(errors)


def check_study_rows(document: Document, full: bool) -> list[RecipeError]:
    """Return the errors about a study's arms, for `recipes check`; what could not be searched is
    left to the training.
    """
    study = load_study(document.path)
    errors, remarks = leaks_of_study(study, study.arms)
    document.warnings += [one for one in remarks if not one.what.startswith("note:")]
    return errors


def leaks_of_study(
    study: Study, arms: Sequence[Arm], fetch: bool = False
) -> tuple[list[RecipeError], list[RecipeError]]:
    """Return the errors and the remarks about arms; arms that train on the same data share one."""
    errors: list[RecipeError] = []
    remarks: list[RecipeError] = []
    evals = [one for one in study.evals if one.suite.name != "lm_eval"]  # with each evaluation
    alike: list[tuple[Recipe, list[str]]] = []
    for arm in arms:
        if arm.trained and (recipe := arm.recipe) is not None:
            same = (names for other, names in alike if other.data == recipe.data)
            if (names := next(same, None)) is not None:
                names.append(arm.name)
            else:
                alike.append((recipe, [arm.name]))
    for recipe, names in alike:
        whose, unknown = f"rows of {sentence_list(names)}", defaultdict(list)
        for name, leaks in search_recipe(recipe, evals, fetch).items():
            if leaks.why:
                unknown[leaks.why].append(name)
            elif leaks.found:
                error = leak_error(name, leaks, recipe, whose)
                (errors if leaks.is_error else remarks).append(error)
        for why, some in unknown.items():
            told = Leaks(why=why).summary(sentence_list(some))
            remarks.append(RecipeError(f"note: {whose} {told}"))
    return errors, remarks
