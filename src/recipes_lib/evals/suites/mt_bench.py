"""MT-Bench: two turns with the conversation as context, each graded 1-5.

Questions in math, reasoning and coding are graded against their reference answer. A turn without a
verdict is counted and enters the bounds, once as 1 and once as 5.
"""

from collections.abc import Sequence
from statistics import fmean

from recipes_lib.core.terminal import aligned
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.judged import JudgedSuite
from recipes_lib.evals.judgments import Item
from recipes_lib.evals.log import EvalLog, Sample
from recipes_lib.evals.questions import NEEDS_REFERENCE, Question
from recipes_lib.evals.suites import bounds_of, shown_rate


class MTBench(JudgedSuite):
    """MT-Bench for the models of one eval recipe."""

    title = "MT-Bench"

    def item(
        self, question: Question, turn: int, answers: Answers, opponent: Answers | None
    ) -> Item:
        """Return a turn, the conversation before it in the instruction, with the reference answer
        where its category needs one.
        """
        reference = None
        if question.category in NEEDS_REFERENCE and question.reference:
            reference = dict(enumerate(question.reference, 1)).get(turn)
        instruction = question.turns[0]
        if turn > 1:
            messages = []
            for number, said in enumerate(question.turns[:turn], 1):
                messages.append(f"User: {said}")
                if number < turn:
                    messages.append(f"Assistant: {answers.texts[question.id, number]}")
            note = "(The response to evaluate answers the last message of this conversation.)"
            instruction = "\n\n".join([*messages, note])
        text = answers.texts[question.id, turn]
        return Item(f"{question.id}:{turn}", instruction, text, reference=reference)

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        rows = [["model", "n", "no grade", "mean 1-5 [95%]", "all 1 .. 5"]]
        for log in logs:
            (grade,) = log.metrics
            lowest, highest = bounds_of(grade.samples, "grade")
            cells = [log.target, str(log.n), str(len(grade.samples) - grade.n)]
            cells += [shown_rate(grade, unit="grade"), f"{lowest:.2f} .. {highest:.2f}"]
            rows.append(cells)
        by_category = [["turn 1 / turn 2", *(log.target for log in logs)]]
        categories = ["all"]
        categories += dict.fromkeys(sample.category for sample in logs[0].metrics[0].samples)
        for name in categories:
            means = [_means(log.metrics[0].samples, name) for log in logs]
            by_category.append([name, *means])
        return [*aligned(rows), "", *aligned(by_category)]


def _means(samples: Sequence[Sample], category: str) -> str:
    """The mean grade of each turn."""
    grades: dict[int, list[float]] = {sample.turn: [] for sample in samples}
    for sample in samples:
        if category in ("all", sample.category) and sample.value:
            grades[sample.turn].append(sample.value)
    return " / ".join(f"{fmean(values):.2f}" if values else "n/a" for values in grades.values())
