"""Answers checked by rules over rows of your own: no judge, one answer per row.

A row is a prompt with what the answer must be. `data.questions` names a file of such rows (JSON
lines or JSON):

    {"prompt": "What is the capital of France?", "check": "contains", "expected": "Paris"}
    {"prompt": "6 x 7?", "check": "number", "expected": 42, "category": "sums"}
    {"prompt": "A city as JSON.", "checks": [{"check": "json", "expected": {"required": ["name"]}},
                                             {"check": "max_words", "expected": 20}]}

An answer passes if it passes every check of its row.
"""

from __future__ import annotations

from collections.abc import Sequence

from recipes_lib.core.terminal import aligned
from recipes_lib.evals.answers import Answers, answer_all
from recipes_lib.evals.judged import answer_banners
from recipes_lib.evals.log import EvalLog, Sample, log_file
from recipes_lib.evals.models import Loaded
from recipes_lib.evals.questions import Question, load_questions
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.evals.served import engine_for
from recipes_lib.evals.verdicts import Rate, metric_of, shown_rate


class Checks:
    """The checks of one eval recipe's rows."""

    title = "checks"

    def __init__(self, recipe: EvalRecipe) -> None:
        self.recipe, self.chosen = recipe, load_questions(recipe)

    def run(self, loaded: Loaded, key: str) -> EvalLog:
        """Let a model answer what is missing, and return its log.

        Raises:
            EvaluationIncomplete: answers are missing.
        """
        recipe, model = self.recipe, loaded.model
        engine = engine_for(recipe, loaded)
        answers = answer_all(recipe, model, engine, self.chosen.questions).with_faults()
        samples = [
            _sample(one, answers, draw)
            for draw in range(1, answers.draws + 1)
            for one in self.chosen.questions
        ]
        banners = answer_banners(answers, recipe.metrics.max_identical_fraction)
        subset = self.chosen.subset
        return EvalLog(
            suite=recipe.suite.name,
            eval=recipe.name,
            target=model.name,
            key=key,
            n=len(self.chosen.questions),
            subset=subset,
            banners=(*banners, *([subset] if subset else [])),
            metrics=(metric_of("pass_rate", f"answers that pass on {recipe.name}", samples),),
            answers=answers.facts,
            file=log_file(model.run.path, recipe.name, None),
        )

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs: all rows, then category by category where there are
        several.
        """
        found = [log.metrics[0].samples for log in logs]
        categories = dict.fromkeys(one.category for samples in found for one in samples)
        rows = [["answers that pass [95%]", "n", *(log.target for log in logs)]]
        for name in ("", *(categories if len(categories) > 1 else ())):
            cells = [[one for one in samples if name in ("", one.category)] for samples in found]
            values = [shown_rate(Rate.of(samples)) for samples in cells]
            rows.append([name or "all", str(max(map(len, cells))), *values])
        return aligned(rows)


def _sample(question: Question, answers: Answers, draw: int) -> Sample:
    """Return one answer's sample: 1 if it passes every check, else 0."""
    text = answers.text(question.id, draw=draw)
    failed = [check.name for check in question.checks if not check.passes(text)]
    return Sample(
        id=question.id,
        draw=draw,
        category=question.category,
        value=float(not failed),
        outcome="graded",
        verdicts=(f"fails {', '.join(failed)}" if failed else "passes",),
        raws=(None,),
        by_rule=True,
        lengths=(len(text),),
        cut=answers.is_cut(question.id, draw=draw),
        input=question.turns[0],
        answer=text,
    )
