"""AlpacaEval style: one answer per instruction, compared with an opponent's in both orders; win,
loss and tie with bounds and intervals.

`model_outputs.json` and `annotations.json` beside a result are in alpaca_eval's format, for its own
tools. Its length-controlled win rate is made of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from recipes_lib.core.files import write_text
from recipes_lib.core.terminal import aligned
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.judge import Item
from recipes_lib.evals.judged import Judged, JudgedSuite
from recipes_lib.evals.log import ORDERS, REFERENCE, EvalLog, Metric, Sample
from recipes_lib.evals.questions import Question
from recipes_lib.evals.verdicts import Rate, counts_of, percent, shown_rate

# by order and verdict: 1 where the opponent (output_1) wins, 2 where the candidate (output_2) does
_PREFERENCE = {("BA", "A"): 1.0, ("BA", "B"): 2.0, ("AB", "A"): 2.0, ("AB", "B"): 1.0}


class AlpacaEval(JudgedSuite):
    """AlpacaEval for the models of one eval recipe."""

    title = "AlpacaEval"

    def _draws(self, answers: Answers) -> Iterator[tuple[Question, int, str, str]]:
        """Yield each question with each draw of its answer, the id of that to the judge, and the
        answer.
        """
        for draw in range(1, answers.draws + 1):
            for question in self.chosen.questions:
                name = question.id if draw == 1 else f"{question.id}#{draw}"
                yield question, draw, name, answers.text(question.id, draw=draw)

    def compared(self, answers: Answers, opponent: Answers) -> list[Item]:
        """Return every answer with its opponent's."""
        items = []
        for question, draw, name, text in self._draws(answers):
            other = opponent.text(question.id, draw=draw)
            item = Item(name, question.turns[0], text, other, question=question, draw=draw)
            items.append(item)
        return items

    def graded(self, answers: Answers) -> list[Item]:
        """Return every answer, where grades are asked for."""
        items = []
        for question, draw, name, text in self._draws(answers):
            expected = question.reference[0] if question.reference else None
            turn = question.turns[0]
            items.append(Item(name, turn, text, None, expected, question=question, draw=draw))
        return items if self.recipe.metrics.absolute else []

    def metrics(self, judged: Judged) -> list[Metric]:
        """Return the metrics, and write the files that alpaca_eval reads; it knows one answer per
        question, the first.
        """
        metrics = super().metrics(judged)
        opponent, name = judged.opponent, judged.answers.name
        assert opponent is not None
        is_reference = opponent.name == REFERENCE
        other = ", ".join(opponent.facts.models) if is_reference else opponent.name
        annotator = f"judge-{judged.rows[0]['judge'][:12]}"
        first = [each for each in metrics[0].samples if each.draw == 1]
        outputs = [
            {
                "dataset": each.category,
                "instruction": each.input,
                "output": each.answer,
                "generator": name,
            }
            for each in first
        ]
        suffix = "" if is_reference else f".against-{opponent.name}"
        folder = judged.answers.folder(self.recipe.name) / "samples"
        for file, rows in (
            ("model_outputs.json", outputs),
            (
                f"annotations{suffix}.json",
                [annotation(each, name, other, annotator) for each in first],
            ),
        ):
            write_text(folder / file, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        return metrics

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        head = ["model", "against", "n", "win", "loss", "tie", "unresolved"]
        head += ["win rate, tie = half [95%]", "all lost .. won", "mean 1-5"]
        rows = []
        for log in logs:
            by_name = {each.metric: each for each in log.metrics}
            pairs, grade = by_name["win_rate"].samples, by_name.get("grade")
            rate = Rate.of(pairs)
            cells = [log.target, str(log.against), str(len(pairs))]
            cells += [str(count) for count in counts_of(pairs).values()]
            cells += [shown_rate(rate), f"{percent(rate.lowest)} .. {percent(rate.highest)}"]
            rows.append([*cells, shown_rate(grade, unit="grade") if grade else "-"])
        note = "judged in both orders; a pair whose orders disagree is a tie"
        return [*aligned([head, *rows]), "", note]


def annotation(sample: Sample, candidate: str, opponent: str, annotator: str) -> dict[str, object]:
    """Return a comparison as alpaca_eval's annotator writes it: preference 1 for the opponent, 2
    for the candidate, 1.5 for a tie.
    """
    verdicts = dict(zip(ORDERS, sample.verdicts, strict=True))
    tie = sample.opponent == sample.answer
    first, second = (
        1.5 if tie or verdicts[order] == "tie" else _PREFERENCE.get((order, verdicts[order]))
        for order in ("BA", "AB")
    )
    return {
        "dataset": sample.category,
        "instruction": sample.input,
        "output_1": sample.opponent,
        "generator_1": opponent,
        "output_2": sample.answer,
        "generator_2": candidate,
        "annotator": annotator,
        "preference": None if first is None or second is None else (first + second) / 2,
        "preference_by_order": {"reference_first": first, "model_first": second},
    }
