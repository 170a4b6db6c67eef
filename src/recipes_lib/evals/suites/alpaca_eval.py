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
from recipes_lib.evals.judge import Item, Judged, JudgedSuite
from recipes_lib.evals.log import REFERENCE, EvalLog, Metric
from recipes_lib.evals.models import Answers
from recipes_lib.evals.questions import Question
from recipes_lib.evals.suites import bounds_of, shown_rate


class AlpacaEval(JudgedSuite):
    """AlpacaEval for the models of one eval recipe."""

    title = "AlpacaEval"

    def item(
        self, question: Question, turn: int, answers: Answers, opponent: Answers | None
    ) -> Item:
        """Return an answer alone, with the reference where there is one, or with its opponent's."""
        text, other = answers.texts[question.id, 1], None
        reference = question.reference[0] if question.reference else None
        if opponent is not None:
            other, reference = opponent.texts[question.id, 1], None
        return Item(question.id, question.turns[0], text, other, reference, question)

    def metrics(self, judged: Judged) -> list[Metric]:
        """Return the metrics, and write the files that alpaca_eval reads."""
        metrics = super().metrics(judged)
        opponent, name = judged.opponent, judged.answers.name
        assert opponent is not None
        is_reference = opponent.name == REFERENCE
        outputs, annotations = list[object](), list[object]()
        for sample in metrics[0].samples:
            asked = {"dataset": sample.category, "instruction": sample.input}
            outputs.append({**asked, "output": sample.answer, "generator": name})
            pair: dict[str, object] = {
                "output_1": sample.opponent,
                "generator_1": ", ".join(opponent.facts.models) if is_reference else opponent.name,
                "output_2": sample.answer,
                "generator_2": name,
                "annotator": f"judge-{judged.rows[0]['judge'][:12]}",
                # 1: the opponent wins, 1.5: a tie, 2: the candidate wins
                "preference": None if sample.value is None else 1 + sample.value,
            }
            annotations.append({**asked, **pair})
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
