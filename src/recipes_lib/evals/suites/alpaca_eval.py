"""AlpacaEval style: one answer per instruction, compared with an opponent's in both orders; win,
loss and tie with bounds and intervals.

`model_outputs.json` and `annotations.json` beside a result are in alpaca_eval's format, for its own
tools. Its length-controlled win rate is made of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from recipes_lib.core.files import write_text
from recipes_lib.core.terminal import aligned
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.judge import Item
from recipes_lib.evals.judged import Judged, JudgedSuite
from recipes_lib.evals.log import ORDERS, REFERENCE, EvalLog, Metric, Sample
from recipes_lib.evals.questions import Question
from recipes_lib.evals.verdicts import bounds_of, shown_rate

# by order and verdict: 1 where the opponent (output_1) wins, 2 where the candidate (output_2) does
_PREFERENCE = {("BA", "A"): 1.0, ("BA", "B"): 2.0, ("AB", "A"): 2.0, ("AB", "B"): 1.0}


class AlpacaEval(JudgedSuite):
    """AlpacaEval for the models of one eval recipe."""

    title = "AlpacaEval"

    def item(
        self, question: Question, turn: int, draw: int, answers: Answers, opponent: Answers | None
    ) -> Item:
        """Return an answer alone, with the reference where there is one, or with its opponent's."""
        name = question.id if draw == 1 else f"{question.id}#{draw}"
        text, other = answers.text(question.id, draw=draw), None
        reference = question.reference[0] if question.reference else None
        if opponent is not None:
            other, reference = opponent.text(question.id, draw=draw), None
        return Item(name, question.turns[0], text, other, reference, question, draw=draw)

    def metrics(self, judged: Judged) -> list[Metric]:
        """Return the metrics, and write the files that alpaca_eval reads, of the first answers."""
        metrics = super().metrics(judged)
        opponent, name = judged.opponent, judged.answers.name
        assert opponent is not None
        is_reference = opponent.name == REFERENCE
        other = ", ".join(opponent.facts.models) if is_reference else opponent.name
        annotator = f"judge-{judged.rows[0]['judge'][:12]}"
        first = [sample for sample in metrics[0].samples if sample.draw == 1]
        outputs: list[dict[str, object]] = [
            {
                "dataset": sample.category,
                "instruction": sample.input,
                "output": sample.answer,
                "generator": name,
            }
            for sample in first
        ]
        annotations = [annotation(sample, name, other, annotator) for sample in first]
        suffix = "" if is_reference else f".against-{opponent.name}"
        folder = judged.answers.folder(self.recipe.name) / "samples"
        files = {"model_outputs.json": outputs, f"annotations{suffix}.json": annotations}
        for file, rows in files.items():
            write_text(folder / file, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        return metrics

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        outcomes = ("win", "loss", "tie", "unresolved")
        head = ["model", "against", "n", *outcomes]
        rows = [[*head, "win rate, tie = half [95%]", "all lost .. won", "mean 1-5"]]
        for log in logs:
            by_name = {metric.metric: metric for metric in log.metrics}
            wins, grade = by_name["win_rate"], by_name.get("grade")
            counts = Counter(sample.outcome for sample in wins.samples)
            lowest, highest = bounds_of(wins.samples)
            cells = [log.target, str(log.against), str(len(wins.samples))]
            cells += [str(counts[outcome]) for outcome in outcomes]
            cells += [shown_rate(wins), f"{lowest:.1%} .. {highest:.1%}"]
            rows.append([*cells, shown_rate(grade, unit="grade") if grade else "-"])
        return [*aligned(rows), "", "judged in both orders; a pair whose orders disagree is a tie"]


def annotation(sample: Sample, candidate: str, opponent: str, annotator: str) -> dict[str, object]:
    """Return a comparison as alpaca_eval's annotator writes it: 1 for the opponent, 1.5 a tie."""
    verdicts = dict(zip(ORDERS, sample.verdicts, strict=True))
    is_tie = sample.opponent == sample.answer
    first, second = (
        1.5 if is_tie or verdicts[order] == "tie" else _PREFERENCE.get((order, verdicts[order]))
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
