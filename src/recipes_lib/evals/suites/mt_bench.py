"""MT-Bench: two turns with the conversation as context, each graded 1-5 and, where there is an
opponent, compared in both orders.

Questions in math, reasoning and coding are graded against their reference answer by the correctness
rubric, the others by the helpfulness rubric. A second turn is always shown with the first one
before it. Nothing vanishes from a mean: a turn without a verdict is counted and enters the bounds,
once as 1 and once as 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from recipes_lib.core.terminal import aligned
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.judge import Item
from recipes_lib.evals.judged import JudgedSuite
from recipes_lib.evals.log import EvalLog, Sample
from recipes_lib.evals.questions import NEEDS_REFERENCE, Question
from recipes_lib.evals.verdicts import Rate, number, shown_rate


class MTBench(JudgedSuite):
    """MT-Bench for the models of one eval recipe."""

    title = "MT-Bench"
    metric_order = ("grade", "win_rate")
    graded_by_reference = True

    def _turns(self) -> Iterator[tuple[Question, int]]:
        for question in self.chosen.questions:
            for turn in range(1, len(question.turns) + 1):
                yield question, turn

    def compared(self, answers: Answers, opponent: Answers) -> list[Item]:
        """Return the turns to compare; for a later turn each side's answer is its whole
        conversation, the last part marked.
        """
        items = []
        for question, turn in self._turns() if self.recipe.metrics.pairwise else ():
            instruction = question.turns[0]
            if turn > 1:
                listed = [f"Question {n}: {question.turns[n - 1]}" for n in range(1, turn + 1)]
                last = f"(Compare the two conversations by their answers to question {turn}.)"
                instruction = "\n\n".join([*listed, last])
            sides = _side(question, answers, turn), _side(question, opponent, turn)
            items.append(_item(question, turn, instruction, *sides))
        return items

    def graded(self, answers: Answers) -> list[Item]:
        """Return the turns to grade."""
        items = []
        for question, turn in self._turns():
            instruction = question.turns[0]
            if turn > 1:
                before = [
                    f"User: {question.turns[n - 1]}\n\nAssistant: {answers.text(question.id, n)}"
                    for n in range(1, turn)
                ]
                last = f"User: {question.turns[turn - 1]}"
                note = "(The response to evaluate answers the last message of this conversation.)"
                instruction = "\n\n".join([*before, last, note])
            text = answers.text(question.id, turn)
            items.append(_item(question, turn, instruction, text))
        return items

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        metrics = [{each.metric: each for each in log.metrics} for log in logs]
        grades = [by_name["grade"].samples for by_name in metrics]
        turns = sorted({each.turn for each in grades[0]})
        head = ["model", "n", "turns", "no grade", "mean 1-5 [95%]", "all 1 .. 5"]
        rows = [[*head, *(f"turn {turn}" for turn in turns), "win rate"]]
        for log, by_name, samples in zip(logs, metrics, grades, strict=True):
            rate, pairs = Rate.of(samples, "grade"), by_name.get("win_rate")
            cells = [log.target, str(log.n), str(len(samples)), str(rate.unresolved)]
            cells.append(shown_rate(rate, unit="grade"))
            cells.append(f"{number(rate.lowest)} .. {number(rate.highest)}")
            cells += [number(_mean(samples, turn)) for turn in turns]
            rows.append([*cells, f"{shown_rate(pairs)} against {log.against}" if pairs else "-"])
        by_category = [["category", *(log.target for log in logs)]]
        for name in dict.fromkeys(each.category for each in grades[0]):
            cells = [
                " / ".join(number(_mean(samples, turn, name)) for turn in turns)
                for samples in grades
            ]
            by_category.append([name, *cells])
        lines = [*aligned(rows), "", *aligned(by_category), ""]
        return [*lines, "grades are 1-5, as the judge gives them"]


def _mean(samples: Sequence[Sample], turn: int, category: str | None = None) -> float | None:
    chosen = [each for each in samples if each.turn == turn and category in (None, each.category)]
    return Rate.of(chosen, "grade").value


def _item(
    question: Question, turn: int, instruction: str, answer: str, opponent: str | None = None
) -> Item:
    """What is asked about a turn, with the reference answer where its category needs one."""
    expected = None
    if question.category in NEEDS_REFERENCE and question.reference is not None:
        expected = question.reference[turn - 1]
    name = f"{question.id}:{turn}"
    return Item(name, instruction, answer, opponent, expected, question, turn)


def _side(question: Question, answers: Answers, turn: int) -> str:
    """One side of a comparison; nothing where the turn's own answer is empty, which then loses by
    rule.
    """
    if turn == 1 or not answers.text(question.id, turn).strip():
        return answers.text(question.id, turn)
    parts = [f"(to question {n})\n{answers.text(question.id, n)}" for n in range(1, turn + 1)]
    return "\n\n".join(parts)
