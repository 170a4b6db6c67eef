"""AlpacaEval style: one answer per instruction, compared with an opponent's in both orders.

`model_outputs.json` and `annotations.json` beside a result are in alpaca_eval's format, for its own
tools.
"""

from collections import Counter
from collections.abc import Sequence

from recipes_lib.core.files import write_json
from recipes_lib.core.terminal import aligned
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.judged import JudgedSuite
from recipes_lib.evals.judgments import Item
from recipes_lib.evals.log import EvalLog
from recipes_lib.evals.questions import Question
from recipes_lib.evals.suites import bounds_of, shown_rate


class AlpacaEval(JudgedSuite):
    """AlpacaEval for the models of one eval recipe."""

    title = "AlpacaEval"

    def item(
        self, question: Question, turn: int, answers: Answers, opponent: Answers | None
    ) -> Item:
        """Return an answer with its opponent's."""
        assert opponent
        text = answers.texts[question.id, 1]
        other = opponent.texts[question.id, 1]
        return Item(question.id, question.turns[0], text, other)

    def write(self, log: EvalLog) -> None:
        """Write the files that alpaca_eval reads."""
        assert log.judge
        outputs: list[object] = []
        annotations: list[object] = []
        for sample in log.metrics[0].samples:
            question: dict[str, object] = {"dataset": sample.category, "instruction": sample.input}
            outputs.append(question | {"output": sample.answer or "", "generator": log.target})
            preference = None
            if sample.value is not None:
                preference = 1 + sample.value  # 1: the opponent wins, 1.5: a tie, 2: the candidate
            pair = {
                "output_1": sample.opponent or "",
                "generator_1": log.against,
                "output_2": sample.answer or "",
                "generator_2": log.target,
                "annotator": f"judge-{log.judge.fingerprint[:12]}",
                "preference": preference,
            }
            annotations.append(question | pair)
        folder = log.file.parent / "samples"
        write_json(folder / "model_outputs.json", outputs)
        write_json(folder / log.file.name.replace("result", "annotations", 1), annotations)

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        outcomes = ("win", "loss", "tie", "unresolved")
        head = ["model", "against", "n", *outcomes, "win rate, tie = half [95%]", "all lost .. won"]
        rows = [head]
        for log in logs:
            (wins,) = log.metrics
            counts = Counter(sample.outcome for sample in wins.samples)
            lowest, highest = bounds_of(wins.samples)
            cells = [log.target, str(log.against), str(len(wins.samples))]
            cells += [str(counts[outcome]) for outcome in outcomes]
            cells += [shown_rate(wins), f"{lowest:.1%} .. {highest:.1%}"]
            rows.append(cells)
        return [*aligned(rows), "", "judged in both orders; orders that disagree are a tie"]
