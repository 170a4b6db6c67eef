"""What `recipes study plan` and `status` print: what is done, what is to do, and what that takes.
Reads files only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from recipes_lib.analysis.text import count, question_text
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import rows_from_the_end
from recipes_lib.core.lock import describe_holder, is_held
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.terminal import aligned
from recipes_lib.evals.questions import local_questions
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.study.arms import study_folder
from recipes_lib.study.config import Study
from recipes_lib.study.runs import (
    QUESTION_SETS,
    Evaluation,
    StudyRun,
    evaluations,
    has_diverged,
    is_evaluated,
    is_trained,
    runs_left,
    study_trainings,
    study_tunings,
)


@dataclass(frozen=True)
class StatusRow:
    """A training or a result, and how it stands: done, running, stopped, failed or missing."""

    what: str
    name: str
    state: str
    detail: str = ""


def status_rows(study: Study) -> list[StatusRow]:
    """Return every training and every result with its state."""
    rows = [_training_row(study, one) for one in (*study_tunings(study), *study_trainings(study))]
    evaluating = is_held(study_folder(study)) and all(row.state == "done" for row in rows)
    for one in evaluations(study):
        state = "done" if is_evaluated(study, one) else "running" if evaluating else "missing"
        rows.append(StatusRow("result", one.title, state))
    return rows


def status_lines(rows: list[StatusRow]) -> list[str]:
    """Return the table of what is not done, under one line of counts."""
    done = sum(row.state == "done" for row in rows)
    lines = [f"{done} of {count(len(rows), 'training and result', 'trainings and results')} done"]
    left = [(row.what, row.name, row.state, row.detail) for row in rows if row.state != "done"]
    return [*lines, *(aligned(left) if left else [])]


def _training_row(study: Study, training: StudyRun) -> StatusRow:
    run = training.directory
    if is_trained(study, training):
        return StatusRow("training", training.run, "done")
    if has_diverged(study, training) and training in study_tunings(study):
        return StatusRow("training", training.run, "done", "diverged")
    if is_held(run.path):
        holder = describe_holder(run.path / "lock.json")
        return StatusRow("training", training.run, "running", f"{_reached(run)}{holder}")
    if not run.exists():
        return StatusRow("training", training.run, "missing")
    state = run.read_state()
    if state["state"] == "failed":
        return StatusRow(
            "training", training.run, "failed", str(state.get("error")).splitlines()[0]
        )
    if state["state"] == "finished":
        return StatusRow("training", training.run, "missing", "trained with other settings or data")
    return StatusRow("training", training.run, "stopped", _reached(run))


def _reached(run: RunDirectory) -> str:
    """The last step and loss that a training wrote."""
    with suppress(OSError):
        rows = list(islice(rows_from_the_end(run.metrics), 2))  # one may be eval
        losses = [f", loss {row['loss']:.3f}" for row in rows if isinstance(row.get("loss"), float)]
        if rows:
            return f"step {rows[0]['step']}{''.join(losses[:1])}"
    return "starting"


# ---- The plan ----


def study_plan_lines(study: Study, gpu: str | None = None) -> Iterator[str]:
    """Yield what the study takes, in at most 15 lines.

    Args:
        gpu: the card for the estimate; None for this machine's.
    """
    plan = study_plan_object(study, gpu)
    arms = f"{count(len(study.arms), 'arm')}{' and their base' if study.include_base else ''}"
    yield question_text(study.question)
    yield f"{arms}, seeds {', '.join(map(str, study.seeds))}, {count(len(study.evals), 'eval')}"
    for arm in study.arms:
        if arm.tuning:
            chosen = arm.tuning.chosen
            state = "not chosen yet" if chosen is None else f"chosen: {chosen}"
            yield f"{arm.name}: {arm.tuning.key} is tuned over {arm.tuning.grid}; {state}"
            break  # a line for the first one; the others are tuned alike or stand in the file
    left = [
        one.run
        for one in (*study_tunings(study), *study_trainings(study))
        if not is_trained(study, one)
    ]
    names = f": {first_of(left)}" if left else ""
    yield f"trainings: {plan['trainings_to_do']} of {plan['trainings']} to do{names}"
    yield f"results: {plan['results_to_do']} of {plan['results']} to do"
    yield f"answers: {plan['answers']:,} for all results{plan['answers_unknown']}"
    yield f"judge requests: {plan['judge_requests']:,} for all results{plan['answers_unknown']}"
    hours = plan["device_hours"]
    if hours is not None:
        yield f"device hours of the trainings: about {hours:.2g} (estimated, not measured)"
    undeclared = [key for key in study.differing() if study.factor_of(key) is None]
    if undeclared:
        yield f"differences that no factor declares: {first_of(undeclared, 4)}"
    from recipes_lib.study.foresight import foresee  # scipy, which `status` does without

    power = foresee(study, {one.name: _turns(one) for one in study.evals})
    if power is not None:
        yield "; ".join(line.strip() for line in power.lines()[:2])


def first_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are.

    Example:
        >>> first_of(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def study_plan_object(study: Study, gpu: str | None = None) -> dict[str, object]:
    """Return the plan for --json: what is counted, and what the trainings are estimated to take."""
    runs = [*study_tunings(study), *study_trainings(study)]
    results = evaluations(study)
    turns = {one.name: _turns(one) for one in study.evals}
    unknown = [name for name, number in turns.items() if number is None]
    asked = {(one.recipe.name, one.run): one for one in results}
    answers = sum(_answers(one.recipe, turns[one.recipe.name] or 0) for one in asked.values())
    requests = sum(_requests(one, turns[one.recipe.name] or 0) for one in results)
    return {
        "study": study.name,
        "question": study.question,
        "trainings": len(runs),
        "trainings_to_do": sum(not is_trained(study, one) for one in runs),
        "results": len(results),
        "results_to_do": sum(not is_evaluated(study, one) for one in results),
        "answers": answers,
        "judge_requests": requests,
        "answers_unknown": f" (without {', '.join(unknown)})" * bool(unknown),
        "device_hours": _device_hours(study, gpu),
    }


def _turns(recipe: EvalRecipe) -> int | None:
    """How many turns an eval's questions have; None where that is not known here, 0 where it asks
    none of its own.
    """
    if recipe.suite.name in ("lm_eval", "heldout_loss"):
        return 0
    with suppress(RecipesError):  # files that cannot be used are the evaluation's error
        if chosen := local_questions(recipe):
            return sum(len(question.turns) for question in chosen.questions)
    name, most = str(recipe.data.questions), recipe.data.max_questions
    size = QUESTION_SETS.get(name) or QUESTION_SETS.get(name.partition(":")[0]) or most
    turns = 2 if recipe.suite.name == "mt_bench" else 1
    return size and min(size, most or size) * turns


def _answers(recipe: EvalRecipe, turns: int) -> int:
    return turns * recipe.generation.samples


def _requests(one: Evaluation, turns: int) -> int:
    """How often a result asks the judge: each pair in both orders, and each answer by itself where
    the eval grades; the judge's probes come on top, once for an eval.
    """
    if not one.recipe.is_judged:
        return 0
    answers = _answers(one.recipe, turns)
    pairs = 2 * answers if one.against or one.recipe.suite.name == "alpaca_eval" else 0
    graded = one.recipe.suite.name == "mt_bench" or one.recipe.metrics.absolute
    return pairs + (answers if graded and not one.head_to_head else 0)


def _device_hours(study: Study, gpu: str | None) -> float | None:
    """Hours of all trainings that are not done, times their devices; None where it is not known."""
    from recipes_lib.plan.plan import card_for, plan_of  # imports torch, and status does not

    hours = 0.0
    for training in runs_left(study):
        try:
            launch = training.arm.launch
            plan = plan_of(training.recipe(study), launch, card_for(launch, gpu))
            seconds = plan.seconds
        except RecipesError:
            return None
        if seconds is None:
            return None
        hours += seconds / 3600 * launch.world_size
    return hours
