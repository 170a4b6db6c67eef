"""MT-Bench: two turns with the conversation as context, each graded 1-5 and, where there is an
opponent, compared in both orders.

Questions in math, reasoning and coding are graded against their reference answer. A turn without a
verdict is counted and enters the bounds, once as 1 and once as 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from recipes_lib.core.terminal import aligned
from recipes_lib.evals.judge import Item, JudgedSuite
from recipes_lib.evals.log import EvalLog, Sample
from recipes_lib.evals.models import Answers
from recipes_lib.evals.questions import NEEDS_REFERENCE, Question
from recipes_lib.evals.suites import bounds_of, shown_rate


class MTBench(JudgedSuite):
    """MT-Bench for the models of one eval recipe."""

    title = "MT-Bench"
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
            return Item(name, instruction, text, other, reference)
        if turn > 1:
            before = [
                f"User: {question.turns[n - 1]}\n\nAssistant: {answers.texts[question.id, n]}"
                for n in turns[:-1]
            ]
            last = f"User: {question.turns[turn - 1]}"
            note = "(The response to evaluate answers the last message of this conversation.)"
            instruction = "\n\n".join([*before, last, note])
        text = answers.texts[question.id, turn]
        return Item(name, instruction, text, None, reference, by_reference=needs_reference)

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        rows = [["model", "n", "no grade", "mean 1-5 [95%]", "all 1 .. 5", "win rate"]]
        for log in logs:
            grade, *pairs = log.metrics
            lowest, highest = bounds_of(grade.samples, "grade")
            cells = [log.target, str(log.n), str(len(grade.samples) - grade.n)]
            cells += [shown_rate(grade, unit="grade"), f"{lowest:.2f} .. {highest:.2f}"]
            rows.append([*cells, f"{shown_rate(pairs[0])} against {log.against}" if pairs else "-"])
        by_category = [["turn 1 / turn 2", *(log.target for log in logs)]]
        categories = dict.fromkeys(sample.category for sample in logs[0].metrics[0].samples)
        for name in ("all", *categories):
            cells = [_means(log.metrics[0].samples, name) for log in logs]
            by_category.append([name, *cells])
        lines = [*aligned(rows), "", *aligned(by_category), ""]
        return [*lines, "grades are 1-5, as the judge gives them"]


def _means(samples: Sequence[Sample], category: str) -> str:
    """The mean grade of each turn."""
    grades: dict[int, list[float]] = {sample.turn: [] for sample in samples}
    for sample in samples:
        if category in ("all", sample.category) and sample.value:
            grades[sample.turn].append(sample.value)
    return " / ".join(f"{fmean(values):.2f}" if values else "n/a" for values in grades.values())


def _side(question: Question, answers: Answers, turn: int) -> str:
    """One side of a comparison; nothing where the turn's answer is empty, so it loses by rule."""
    if turn == 1 or not answers.texts[question.id, turn].strip():
        return answers.texts[question.id, turn]
    parts = [f"(to question {n})\n{answers.texts[question.id, n]}" for n in range(1, turn + 1)]
    return "\n\n".join(parts)
