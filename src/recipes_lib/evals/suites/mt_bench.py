"""MT-Bench: two turns with the conversation as context, each graded 1-5 and, where there is an
opponent, compared in both orders.

Questions in math, reasoning and coding are graded against their reference answer. A turn without a
verdict is counted and enters the bounds, once as 1 and once as 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from recipes_lib.core.terminal import aligned
from recipes_lib.evals.judge import Item, JudgedSuite
from recipes_lib.evals.log import EvalLog, Sample
from recipes_lib.evals.models import Answers
from recipes_lib.evals.questions import NEEDS_REFERENCE, Question
from recipes_lib.evals.suites import bounds_of, number, shown_rate


class MTBench(JudgedSuite):
    """MT-Bench for the models of one eval recipe."""

    title = "MT-Bench"
    metric_order = ("grade", "win_rate")
    always_graded = True

    def item(
        self, question: Question, turn: int, answers: Answers, opponent: Answers | None
    ) -> Item:
        """Return a turn with the reference answer where its category needs one. In a comparison a
        side is its whole conversation; a grade has the conversation in the instruction.
        """
        name, needs_reference = f"{question.id}:{turn}", question.category in NEEDS_REFERENCE
        reference = question.reference[turn - 1] if needs_reference and question.reference else None
        instruction, turns = question.turns[0], range(1, turn + 1)
        if opponent is not None:
            text, other = _side(question, answers, turn), _side(question, opponent, turn)
            if turn > 1:
                listed = [f"Question {n}: {question.turns[n - 1]}" for n in turns]
                last = f"(Compare the two conversations by their answers to question {turn}.)"
                instruction = "\n\n".join([*listed, last])
            return Item(name, instruction, text, other, reference, question, turn)
        if turn > 1:
            before = [
                f"User: {question.turns[n - 1]}\n\nAssistant: {answers.texts[question.id, n]}"
                for n in turns[:-1]
            ]
            last = f"User: {question.turns[turn - 1]}"
            note = "(The response to evaluate answers the last message of this conversation.)"
            instruction = "\n\n".join([*before, last, note])
        item = Item(
            name, instruction, answers.texts[question.id, turn], None, reference, question, turn
        )
        return replace(item, by_reference=needs_reference)

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        metrics = [{metric.metric: metric for metric in log.metrics} for log in logs]
        grades = [by_name["grade"].samples for by_name in metrics]
        turns = sorted({sample.turn for sample in grades[0]})
        head = ["model", "n", "turns", "no grade", "mean 1-5 [95%]", "all 1 .. 5"]
        rows = [[*head, *(f"turn {turn}" for turn in turns), "win rate"]]
        for log, by_name, samples in zip(logs, metrics, grades, strict=True):
            grade, pairs = by_name["grade"], by_name.get("win_rate")
            lowest, highest = bounds_of(samples, "grade")
            cells = [log.target, str(log.n), str(len(samples)), str(len(samples) - grade.n)]
            cells += [shown_rate(grade, unit="grade"), f"{lowest:.2f} .. {highest:.2f}"]
            cells += [_mean(samples, turn) for turn in turns]
            rows.append([*cells, f"{shown_rate(pairs)} against {log.against}" if pairs else "-"])
        by_category = [["category", *(log.target for log in logs)]]
        for name in dict.fromkeys(sample.category for sample in grades[0]):
            cells = [" / ".join(_mean(samples, turn, name) for turn in turns) for samples in grades]
            by_category.append([name, *cells])
        lines = [*aligned(rows), "", *aligned(by_category), ""]
        return [*lines, "grades are 1-5, as the judge gives them"]


def _mean(samples: Sequence[Sample], turn: int, category: str | None = None) -> str:
    grades = [
        sample.value
        for sample in samples
        if sample.turn == turn and category in (None, sample.category) and sample.value
    ]
    return number(fmean(grades) if grades else None)


def _side(question: Question, answers: Answers, turn: int) -> str:
    """One side of a comparison; nothing where the turn's answer is empty, so it loses by rule."""
    if turn == 1 or not answers.texts[question.id, turn].strip():
        return answers.texts[question.id, turn]
    parts = [f"(to question {n})\n{answers.texts[question.id, n]}" for n in range(1, turn + 1)]
    return "\n\n".join(parts)
