"""What difference a study can find on its primary metric, before it is run.

The spread is assumed, and said: half of a question's variance is new in each training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from recipes_lib.analysis.aims import is_named
from recipes_lib.analysis.stats import ALPHA, detectable
from recipes_lib.analysis.text import count, difference_text
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.study.config import Study, full_name, known_metrics
from recipes_lib.study.runs import QUESTION_SETS


@dataclass(frozen=True)
class _Assumed:
    """Variance of two arms' difference on one question, standard deviation of a training's mean
    over seeds, and the largest difference there can be.
    """

    variance: float
    seeds: float
    unit: str
    largest: float
    words: str


_RIGHT = _Assumed(0.25, 0.01, "share", 1.0, "arms that differ on a quarter of the questions")
_KINDS = {
    "win_rate": _Assumed(0.175, 0.01, "share", 0.5, "30% ties"),
    "pass_rate": _RIGHT,
    "grade": _Assumed(1.44, 0.05, "grade", 4.0, "grades that differ by 1.2 on a question"),
}
# Questions of sets whose files may not be here yet.
_SIZES = {
    **QUESTION_SETS,
    "mmlu": 14042,
    "gsm8k": 1319,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "truthfulqa_mc2": 817,
}


@dataclass(frozen=True)
class Foresight:
    """What a study finds in 80% of cases: `finds` is None where `why_not` says why."""

    metric: str
    comparisons: int
    seeds: int
    questions: int | None
    unit: str
    finds: float | None
    assumed: str
    why_not: str = ""

    def lines(self) -> list[str]:
        """Return it as text."""
        size = f"{count(self.seeds, 'seed')} per arm"
        if self.questions:
            size = f"{count(self.questions, 'question')}, {size}"
        first = f"primary question: {self.metric} ({size}, {count(self.comparisons, 'comparison')})"
        if self.finds is None:
            return [first, f"what it can find is not known: {self.why_not}"]
        found = difference_text(self.finds, self.unit, signed=False)
        return [first, f"finds {found} in 80% of studies (assumed: {self.assumed})"]


def foresee(study: Study, turns: Mapping[str, int | None]) -> Foresight | None:
    """Return what a study can find; None without a primary metric among its evals.

    Args:
        turns: how many turns the questions of each eval have; None where that is not known here.
    """
    primary = study.aims.primary
    recipe = next((one for one in study.evals if primary and full_name(one, primary)), None)
    arms = len(study.arms) + study.include_base
    if primary is None or recipe is None or arms < 2:
        return None
    comparisons = math.comb(arms, 2)
    kind = _RIGHT if recipe.suite.name == "lm_eval" else _KINDS.get(primary.rpartition("/")[2])
    seeds = min(len(arm.seeds) for arm in study.arms)
    questions = _questions(recipe, primary, turns.get(recipe.name))
    found = Foresight(
        primary, comparisons, seeds, questions, kind.unit if kind else "number", None, ""
    )
    if kind is None or not questions:
        why = "its spread, which a first run shows" if questions else "how many questions there are"
        return Foresight(**vars(found) | {"why_not": why})
    alone = len(study.evals) == 1 and len(known_metrics(recipe)) == 1
    level = ALPHA * (1.0 if alone else 0.8) / comparisons
    finds = smallest(kind, questions, seeds, level)
    words = kind.words
    if seeds > 1:
        apart = difference_text(kind.seeds, kind.unit, signed=False)
        words += f", trainings of one recipe that differ by {apart} (SD)"
    else:
        words += "; of one training each, so of these models alone"
    if finds > kind.largest:
        why = "no difference is found in 80% of studies, however large"
        return Foresight(**vars(found) | {"why_not": why})
    return Foresight(**vars(found) | {"finds": finds, "assumed": words})


def smallest(kind: _Assumed, questions: int, seeds: int, level: float) -> float:
    """Return the smallest true difference that is found with 80% probability."""
    of_questions = detectable(max(1, questions - 1), level)
    if seeds == 1:
        return of_questions * math.sqrt(kind.variance / questions)
    own, new = kind.variance / 2 / questions, kind.variance / 2 / questions / seeds
    over_seeds = 2 * kind.seeds**2 / seeds + new
    crossed = of_questions**2 * own + detectable(seeds - 1, level) ** 2 * over_seeds
    return math.sqrt(max(crossed, of_questions**2 * (own + new)))


def _questions(recipe: EvalRecipe, primary: str, turns: int | None) -> int | None:
    """How many questions an eval has, as far as that is known before it is run."""
    if recipe.suite.name == "lm_eval":
        size = next((size for name, size in _SIZES.items() if is_named(name, primary)), None)
        limit = recipe.suite.limit
        return size if limit is None or size is None else int(min(limit, size))
    if turns is not None:
        return turns // 2 if recipe.suite.name == "mt_bench" else turns
    name = str(recipe.data.questions)
    size = _SIZES.get(name.partition(":")[0]) or _SIZES.get(name)
    most = recipe.data.max_questions
    return min(size, most) if size and most else size
