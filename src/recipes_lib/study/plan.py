"""`recipes study plan`: what would be done, why, and what it costs: counted, or measured
last time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from recipes_lib.compare.design import Study
from recipes_lib.compare.wording import question_text
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.terminal import aligned
from recipes_lib.study.arms import launch_words, train_words
from recipes_lib.study.graph import Graph, Step
from recipes_lib.study.status import StepRow, seconds_text, step_rows
from recipes_lib.suites.questions import load_questions
from recipes_lib.suites.recipe import EvalRecipe


def study_plan_object(
    study: Study, graph: Graph, steps: Sequence[Step], estimates: Mapping[str, str]
) -> dict[str, Any]:
    """Return the plan for --json; `estimates` says per arm what one training takes."""
    rows = {row.name: row for row in step_rows(study, graph)}
    todo = [step for step in steps if rows[step.name].state != "fresh"]
    turns = _turns(study)
    return {
        "study": study.name,
        "question": study.question,
        "steps": [
            {
                **rows[step.name].to_dict(),
                "arm": step.arm,
                "run": step.run,
                "cost": cost_of(study, step, estimates, turns),
            }
            for step in steps
        ],
        "todo": [step.name for step in todo],
        "seconds_measured": sum(rows[step.name].seconds or 0.0 for step in todo),
    }


def study_plan_lines(
    study: Study, graph: Graph, steps: Sequence[Step], estimates: Mapping[str, str]
) -> Iterator[str]:
    """Yield the plan as text: the arms, then every step that would be done with its reason and
    cost.

    Args:
        estimates: per arm, what one training takes.
    """
    rows = {row.name: row for row in step_rows(study, graph)}
    todo = [step for step in steps if rows[step.name].state != "fresh"]
    yield question_text(study.question)
    yield (
        f"{len(study.arms)} arms{' and their base' if study.include_base else ''};"
        f" {len(study.evals)} evals; seeds {_listed(study.seeds)}"
    )
    yield ""
    if not todo:
        yield f"nothing to do: all {len(steps)} steps are fresh"
        return
    turns = _turns(study)
    table = [
        (
            step.name,
            _cut(_why(rows[step.name])),
            cost_of(study, step, estimates, turns),
            seconds_text(rows[step.name].seconds),
        )
        for step in todo
    ]
    yield from aligned([("step", "because", "cost", "took before"), *table])
    yield ""
    yield f"{len(todo)} of {len(steps)} steps to do"
    for step in todo:
        if step.kind == "train":
            arm = study.arm(step.arm)
            yield (
                "$ recipes train"
                f" {' '.join([*train_words(study, arm, step.seed or 0), *launch_words(arm)])}"
            )


def _cut(text: str, width: int = 72) -> str:
    """A reason on a line with three other columns; the whole of it stands in `status` and in
    --json.
    """
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _why(row: StepRow) -> str:
    if row.state == "waiting":
        return "never done"
    return {
        "missing": "never done",
        "failed": f"failed: {row.detail}",
        "running": f"running: {row.detail}",
    }.get(row.state, row.detail)


def cost_of(
    study: Study, step: Step, estimates: Mapping[str, str], turns_of: Mapping[str, int | None]
) -> str:
    """Return what a step takes, counted from its inputs.

    Args:
        turns_of: per eval, how many answers it asks for.
    """
    if step.kind == "train":
        estimate = estimates.get(step.arm)
        return training_cost(study, step) + (f": {estimate}" if estimate else "")
    recipe = next((recipe for recipe in study.evals if recipe.name == step.eval), None)
    if recipe is None:
        return {"check": "loads the adapter", "statistics": "seconds", "report": "seconds"}.get(
            step.kind, ""
        )
    if step.kind == "lm_eval":
        limit = f", {recipe.suite.limit} items each" if recipe.suite.limit else ""
        return f"{_listed(recipe.suite.tasks or [])}{limit}"
    turns = turns_of[recipe.name]
    if turns is None:
        return (
            "answers, as many as there are questions (not on this machine yet)"
            if step.kind == "answers"
            else "judgments"
        )
    if step.kind == "answers":
        return f"{turns:,} answers of at most {recipe.generation.max_new_tokens:,} tokens"
    if step.kind == "judgments" and recipe.suite.name == "mt_bench":
        return f"{turns:,} judgments"
    absolute = turns if recipe.metrics.absolute and step.kind == "judgments" else 0
    probes = 12 * recipe.metrics.probe_pairs if step.kind == "judgments" else 0
    return f"{2 * turns + absolute:,} judgments" + (
        f" and at most {probes:,} probes" if probes else ""
    )


def _turns(study: Study) -> dict[str, int | None]:
    return {
        recipe.name: count_turns(recipe) for recipe in study.evals if recipe.suite.name != "lm_eval"
    }


def count_turns(recipe: EvalRecipe) -> int | None:
    """Return how many answers an eval asks for, or None where its questions are not on this
    machine.
    """
    named = {"data.questions": recipe.data.questions, "data.references": recipe.data.references}
    if all(recipe.resolve(key, name).is_file() for key, name in named.items() if name):
        with suppress(RecipesError):
            return sum(len(question.turns) for question in load_questions(recipe).questions)
    return None


def training_cost(study: Study, step: Step) -> str:
    """Return the processes of a training and its length."""
    arm = study.arm(step.arm)
    assert arm.recipe is not None
    steps, epochs = (
        arm.recipe.train.get("max_steps", -1),
        arm.recipe.train.get("num_train_epochs", 3),
    )
    length = f"{steps:,} steps" if steps > 0 else f"{epochs:g} epoch{'s' * (epochs != 1)}"
    return f"{length} on {arm.world_size} process{'es' * (arm.world_size > 1)} ({arm.accelerate})"


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
