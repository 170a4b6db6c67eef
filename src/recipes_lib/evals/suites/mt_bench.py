"""MT-Bench: two turns with the conversation as context, each graded 1-5 and, where there is an
opponent, compared in both orders.

Questions in math, reasoning and coding are graded against their reference answer by the correctness
rubric, the others by the helpfulness rubric. A second turn is always shown with the first one
before it. Nothing vanishes from a mean: a turn without a verdict is counted and enters the bounds,
once as 1 and once as 5.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from recipes_lib.core.files import Row
from recipes_lib.core.terminal import aligned
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.judge import Item
from recipes_lib.evals.judged import Judged, JudgedSuite, ToJudge, footer
from recipes_lib.evals.judges import Judge
from recipes_lib.evals.log import EvalLog, Metric, Sample
from recipes_lib.evals.outcomes import (
    Rate,
    grade_sample,
    metric_of,
    number,
    pair_sample,
    shown_rate,
)
from recipes_lib.evals.questions import NEEDS_REFERENCE, Question, load_questions
from recipes_lib.evals.recipe import EvalRecipe


class MTBench(JudgedSuite):
    """MT-Bench for the models of one eval recipe."""

    title = "MT-Bench"

    def __init__(self, recipe: EvalRecipe) -> None:
        super().__init__(recipe, load_questions(recipe))
        self.turns = [
            (question, turn)
            for question in self.chosen.questions
            for turn in range(1, len(question.turns) + 1)
        ]

    def pair_items(self, answers: Answers, opponent: Answers) -> list[Item]:
        """Return the turns to compare; for a later turn each side's answer is its whole
        conversation, the last part marked.
        """
        return [
            Item(
                f"{one.id}:{turn}",
                one.turns[0] if turn == 1 else _numbered(one.turns[:turn]),
                _side(one, answers, turn),
                _side(one, opponent, turn),
                _expected(one, turn),
                meta=_meta(one),
            )
            for one, turn in self.turns
        ]

    def to_judge(
        self, answers: Answers, opponent: Answers | None, judge: Judge
    ) -> Iterator[ToJudge]:
        """Yield the turns to grade, without and with a reference, then those to compare."""
        for reference in (False, True):
            items = [
                Item(
                    f"{one.id}:{turn}",
                    _conversation(one, answers, turn),
                    answers.text(one.id, turn),
                    reference=_expected(one, turn),
                    meta=_meta(one),
                )
                for one, turn in self.turns
                if _uses_reference(one) == reference
            ]
            yield ToJudge(items, judge.plan("absolute", reference), answers.name)
        if opponent is not None and self.recipe.metrics.pairwise:
            pairs = self.pair_items(answers, opponent)
            yield ToJudge(pairs, judge.plan("relative"), f"{answers.name} pairs")

    def metrics(self, judged: Judged) -> list[Metric]:
        """Return the mean grade, and the win rate where there is an opponent."""
        rows: dict[str, dict[str, Row]] = defaultdict(dict)
        for row in judged.rows:
            rows[row["question_id"]][row["order"]] = row
        answers, opponent = judged.answers, judged.opponent
        grades, pairs = [], []
        for one, turn in self.turns:
            found = rows[f"{one.id}:{turn}"]
            text = answers.text(one.id, turn)
            known: dict[str, Any] = {
                "turn": turn,
                "category": one.category,
                "input": one.turns[turn - 1],
                "answer": text,
                "cut": answers.is_cut(one.id, turn),
            }
            grades.append(grade_sample(one.id, found.get("single"), lengths=(len(text),), **known))
            if opponent is not None:
                other = opponent.text(one.id, turn)
                lengths = (len(text), len(other))
                pairs.append(pair_sample(one.id, found, lengths=lengths, opponent=other, **known))
        found_metrics = [metric_of("grade", self.name_of("mean grade, 1-5"), grades, "grade")]
        if opponent is not None and self.recipe.metrics.pairwise:
            name = self.name_of("win rate")
            found_metrics.append(metric_of("win_rate", name, pairs, opponent=opponent.name))
        return found_metrics

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        grades = [
            next((one.samples for one in log.metrics if one.metric == "grade"), ()) for log in logs
        ]
        turns = sorted({one.turn for one in grades[0]})
        head = ["model", "n", "turns", "no grade", "mean 1-5 [95%]", "all 1 .. 5"]
        rows = [[*head, *(f"turn {turn}" for turn in turns), "win rate"]]
        for log, samples in zip(logs, grades, strict=True):
            rate = Rate.of(samples, "grade")
            pairs = next((one for one in log.metrics if one.metric == "win_rate"), None)
            cells = [log.target, str(log.n), str(len(samples)), str(rate.unresolved)]
            cells += [
                shown_rate(rate, unit="grade"),
                f"{number(rate.lowest)} .. {number(rate.highest)}",
            ]
            cells += [number(_mean(samples, turn=turn)) for turn in turns]
            rows.append([*cells, f"{shown_rate(pairs)} against {log.against}" if pairs else "-"])
        by_category = [["category", *(log.target for log in logs)]]
        for name in dict.fromkeys(one.category for one in grades[0]):
            cells = [
                " / ".join(number(_mean(samples, category=name, turn=turn)) for turn in turns)
                for samples in grades
            ]
            by_category.append([name, *cells])
        lines = [*aligned(rows), "", *aligned(by_category), ""]
        return [*lines, "grades are 1-5, as the judge gives them", *footer(logs)]


def _mean(samples: Sequence[Sample], **where: object) -> float | None:
    values = [
        one.value
        for one in samples
        if one.value is not None and all(getattr(one, name) == it for name, it in where.items())
    ]
    return sum(values) / len(values) if values else None


def _meta(question: Question) -> dict[str, str]:
    return {"category": question.category, "question": question.id}


def _uses_reference(question: Question) -> bool:
    """Whether a question is graded against a reference: its category needs one, and there
    is one.
    """
    return question.category in NEEDS_REFERENCE and question.reference is not None


def _expected(question: Question, turn: int) -> str | None:
    """The reference answer to a turn, where it is graded against one."""
    used = _uses_reference(question) and question.reference
    return question.reference[turn - 1] if used and question.reference else None


def _conversation(question: Question, answers: Answers, turn: int) -> str:
    """What was asked in a turn: the question, for a later turn with the conversation before it."""
    if turn == 1:
        return question.turns[0]
    parts = [
        f"User: {question.turns[n - 1]}\n\nAssistant: {answers.text(question.id, n)}"
        for n in range(1, turn)
    ]
    last = f"User: {question.turns[turn - 1]}"
    note = "(The response to evaluate answers the last message of this conversation.)"
    return "\n\n".join([*parts, last, note])


def _numbered(turns: Sequence[str]) -> str:
    """The user's messages of a conversation of which the last answer is compared."""
    listed = "\n\n".join(f"Question {number}: {text}" for number, text in enumerate(turns, 1))
    return f"{listed}\n\n(Compare the two conversations by their answers to question {len(turns)}.)"


def _side(question: Question, answers: Answers, turn: int) -> str:
    """One side of a comparison; nothing where the turn's own answer is empty, which then loses by
    rule.
    """
    if turn == 1 or not answers.text(question.id, turn).strip():
        return answers.text(question.id, turn)
    parts = [f"(to question {n})\n{answers.text(question.id, n)}" for n in range(1, turn + 1)]
    return "\n\n".join(parts)
