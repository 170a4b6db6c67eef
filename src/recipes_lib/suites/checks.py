"""Answers checked by rules over rows of your own: no judge, one model call per row.

A row is a prompt with what the answer must be. `data.questions` names a file of such rows (JSON
lines or JSON):

    {"prompt": "What is the capital of France?", "check": "contains", "expected": "Paris"}
    {"prompt": "6 x 7?", "check": "number", "expected": 42, "category": "sums"}
    {"prompt": "A city as JSON.", "checks": [{"check": "json", "expected": {"required": ["name"]}},
                                             {"check": "max_words", "expected": 20}]}

An answer passes if it passes every check of its row. Pass rates of two arms are compared question
by question, as every other metric is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, TypedDict, cast

from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.schema import COUNT, fields_of, object_schema
from recipes_lib.core.terminal import aligned
from recipes_lib.eval_files import log_file
from recipes_lib.eval_log import EvalLog, Measure, Sample
from recipes_lib.eval_recipe import EvalRecipe
from recipes_lib.generation.subjects import Subject
from recipes_lib.statistics.intervals import Interval, StoredInterval, share_interval
from recipes_lib.suites.answering import AnswerSet, answer_questions
from recipes_lib.suites.judged import answer_banners
from recipes_lib.suites.questions import Question, load_questions
from recipes_lib.suites.suite import Suite, percent_interval

_RATE = object_schema(fields_of(Interval) | {"unresolved": COUNT})


class _Rate(StoredInterval):
    """A share of answers that pass, as a result holds it."""

    unresolved: int


class _Numbers(TypedDict):
    """The suite's numbers in a result."""

    pass_rate: _Rate
    by_category: dict[str, _Rate]


class Checks(Suite):
    """The checks of one eval recipe's rows, for its targets."""

    TITLE = "checks"
    HELP = "answers checked by rules: exact, contains, regex, number, json, choice, length."
    NUMBERS: ClassVar[dict[str, JsonSchema]] = {
        "pass_rate": _RATE,
        "by_category": {"type": "object", "additionalProperties": _RATE},
    }

    def __init__(self, recipe: EvalRecipe, words: Sequence[str], remote_code: bool = False) -> None:
        self.chosen = load_questions(recipe)
        super().__init__(recipe, words, remote_code)
        self.served = recipe.generation.engine == "openai"

    def visit(self, subject: Subject) -> list[EvalLog]:
        """Let one of `targets` answer what is missing, and return its log.

        Raises:
            GenerationIncomplete: answers are missing.
        """
        return [self._log(answer_questions(self.recipe, subject, self.chosen.questions))]

    def _log(self, answers: AnswerSet) -> EvalLog:
        """Return one target's log."""
        recipe, run = self.recipe, answers.run
        assert run is not None
        file = log_file(run.path, recipe.name, None)
        facts = answers.facts(recipe.metrics.max_identical_fraction)
        assert facts.answers is not None
        samples = [
            self._sample(one, answers, draw)
            for draw in range(1, answers.draws + 1)
            for one in self.chosen.questions
        ]
        by_category: dict[str, list[Sample]] = {}
        for sample in samples:
            by_category.setdefault(sample.category, []).append(sample)
        measure = Measure(
            recipe.name, recipe.suite.name, "pass_rate", "answers that pass", tuple(samples), file
        )
        return EvalLog(
            suite=recipe.suite.name,
            eval=recipe.name,
            target=answers.name,
            subset=self.chosen.subset,
            banners=[
                line
                for line in (*answer_banners(answers, None, facts.answers), self.chosen.subset)
                if line
            ],
            answers=facts,
            numbers={
                "pass_rate": _rate(samples),
                "by_category": {name: _rate(mine) for name, mine in by_category.items()},
            },
            measures=(measure,),
            file=file,
        )

    def _sample(self, question: Question, answers: AnswerSet, draw: int) -> Sample:
        """Return one answer's sample: 0 if a check fails for certain, unresolved if the answer was
        cut where more text could decide, else 1.
        """
        answer = answers.rows[question.id, 1, draw]
        text, cut = answer.text, answer.finish_reason != "stop"
        results = [(check.name, check.passes(text, cut)) for check in question.checks]
        failed = [name for name, passed in results if passed is False]
        is_open = not failed and any(passed is None for _, passed in results)
        return Sample(
            id=question.id,
            category=question.category,
            value=None if is_open else float(not failed),
            outcome="unresolved" if is_open else "graded",
            verdicts=("cut" if is_open else f"fails {', '.join(failed)}" if failed else "passes",),
            raws=(None,),
            by_rule=True,
            lengths=(len(text),),
            input=question.turns[0],
            answer=text,
            draw=draw,
        )

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs: all rows, then category by category where there are
        several.
        """
        found = [cast(_Numbers, log.numbers) for log in logs]
        groups: dict[str, list[_Rate | None]] = {"all": [one["pass_rate"] for one in found]}
        categories = dict.fromkeys(name for one in found for name in one["by_category"])
        if len(categories) > 1:
            for name in categories:
                groups[name] = [one["by_category"].get(name) for one in found]
        rows = []
        for name, cells in groups.items():
            n = next(cell["n"] for cell in cells if cell)
            shown = (percent_interval(cell) if cell else "-" for cell in cells)
            rows.append([name, str(n), *shown])
        head = ["answers that pass [95%]", "n", *(log.target for log in logs)]
        return aligned([head, *rows])


def _rate(samples: Sequence[Sample]) -> _Rate:
    """Return the share of answers that pass, with Wilson limits: the lower one as if all that are
    unresolved failed, the upper one as if all passed.
    """
    resolved = [one for one in samples if one.resolved]

    def share(some: Sequence[Sample], *passing: float | None) -> Interval:
        hits = [one.value in passing for one in some]
        return share_interval(hits, [one.id for one in some])

    low, high = share(samples, 1.0).low, share(samples, 1.0, None).high
    limits = dataclasses.replace(share(resolved, 1.0), low=low, high=high, n=len(samples))
    return _Rate(**limits.to_dict(), unresolved=len(samples) - len(resolved))
