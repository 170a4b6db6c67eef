"""AlpacaEval style: one answer per instruction, compared with an opponent's in both orders; win,
loss and tie with bounds and intervals.

`model_outputs.json` and `annotations.json` beside a result are in alpaca_eval's format, for its own
tools. The rate at equal length is described in the table and tested nowhere.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from recipes_lib.core.files import Row, write_text
from recipes_lib.core.terminal import aligned
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.judge import Item
from recipes_lib.evals.judged import Judged, JudgedSuite, ToJudge, footer
from recipes_lib.evals.judges import Judge
from recipes_lib.evals.log import ORDERS, REFERENCE, EvalLog, Metric, Sample
from recipes_lib.evals.outcomes import (
    Rate,
    counts_of,
    grade_sample,
    metric_of,
    pair_sample,
    percent,
    shown_rate,
)
from recipes_lib.evals.questions import load_questions
from recipes_lib.evals.recipe import EvalRecipe

# by order and verdict: 1 where the opponent (output_1) wins, 2 where the candidate (output_2) does
_PREFERENCE = {("BA", "A"): 1.0, ("BA", "B"): 2.0, ("AB", "A"): 2.0, ("AB", "B"): 1.0}


class AlpacaEval(JudgedSuite):
    """AlpacaEval for the models of one eval recipe."""

    title = "AlpacaEval"

    def __init__(self, recipe: EvalRecipe) -> None:
        super().__init__(recipe, load_questions(recipe))

    def pair_items(self, answers: Answers, opponent: Answers) -> list[Item]:
        """Return what is to be compared."""
        return [
            Item(
                _drawn(one.id, draw),
                one.turns[0],
                answers.text(one.id, draw=draw),
                opponent.text(one.id, draw=draw),
                meta={"category": one.category, "question": one.id},
            )
            for draw in range(1, answers.draws + 1)
            for one in self.chosen.questions
        ]

    def to_judge(
        self, answers: Answers, opponent: Answers | None, judge: Judge
    ) -> Iterator[ToJudge]:
        """Yield what is to be compared, then what is to be graded."""
        assert opponent is not None
        pairs = self.pair_items(answers, opponent)
        yield ToJudge(pairs, judge.plan("relative"), answers.name)
        if self.recipe.metrics.absolute:
            items = [
                Item(
                    _drawn(one.id, draw),
                    one.turns[0],
                    answers.text(one.id, draw=draw),
                    reference=one.reference[0] if one.reference else None,
                )
                for draw in range(1, answers.draws + 1)
                for one in self.chosen.questions
            ]
            yield ToJudge(items, judge.plan("absolute"), f"{answers.name} 1-5")

    def metrics(self, judged: Judged) -> list[Metric]:
        """Return the win rate, and the mean grade where it was asked for."""
        pairs, grades = self._samples(judged)
        opponent = judged.opponent
        assert opponent is not None
        self._write_for_alpaca_eval(pairs, judged)
        rate = metric_of("win_rate", self.name_of("win rate"), pairs, opponent=opponent.name)
        if not self.recipe.metrics.absolute:
            return [rate]
        return [rate, metric_of("grade", self.name_of("mean grade, 1-5"), grades, "grade")]

    def _samples(self, judged: Judged) -> tuple[list[Sample], list[Sample]]:
        """Return every answer's comparison, and its grade."""
        by_item: dict[str, dict[str, Row]] = defaultdict(dict)
        for row in judged.rows:
            by_item[row["question_id"]][row["order"]] = row
        answers, opponent = judged.answers, judged.opponent
        assert opponent is not None
        pairs, grades = [], []
        for draw in range(1, answers.draws + 1):
            for one in self.chosen.questions:
                rows = by_item[_drawn(one.id, draw)]
                text, other = answers.text(one.id, draw=draw), opponent.text(one.id, draw=draw)
                known: dict[str, Any] = {
                    "category": one.category or "all",
                    "input": one.turns[0],
                    "answer": text,
                    "draw": draw,
                    "cut": answers.is_cut(one.id, draw=draw),
                }
                lengths = (len(text), len(other))
                pairs.append(pair_sample(one.id, rows, lengths=lengths, opponent=other, **known))
                grades.append(
                    grade_sample(one.id, rows.get("single"), lengths=lengths[:1], **known)
                )
        return pairs, grades

    def _write_for_alpaca_eval(self, pairs: Sequence[Sample], judged: Judged) -> None:
        """Write the files that alpaca_eval reads; it knows one answer per question, the first."""
        opponent = judged.opponent
        assert opponent is not None
        is_reference = opponent.name == REFERENCE
        other = ", ".join(opponent.facts.models) if is_reference else opponent.name
        suffix = "" if is_reference else f".against-{opponent.name}"
        first = [one for one in pairs if one.draw == 1]
        name, judge = judged.answers.name, judged.card.judge[:12]
        outputs = [
            {
                "dataset": one.category,
                "instruction": one.input,
                "output": one.answer,
                "generator": name,
            }
            for one in first
        ]
        annotations = [annotation(one, name, other, f"judge-{judge}") for one in first]
        folder = judged.answers.folder(self.recipe.name) / "samples"
        for file, rows in (
            ("model_outputs.json", outputs),
            (f"annotations{suffix}.json", annotations),
        ):
            write_text(folder / file, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        head = ["model", "against", "n", "win", "loss", "tie", "unresolved"]
        head += ["win rate, tie = half [95%]", "all lost .. won", "at equal length", "mean 1-5"]
        rows = []
        for log in logs:
            by_name = {one.metric: one for one in log.metrics}
            pairs = by_name["win_rate"].samples
            rate, grade = Rate.of(pairs), by_name.get("grade")
            equal = at_equal_length(pairs) if _shows_length(log) else None
            cells = [log.target, str(log.against), str(len(pairs))]
            cells += [str(count) for count in counts_of(pairs).values()]
            cells += [shown_rate(rate), f"{percent(rate.lowest)} .. {percent(rate.highest)}"]
            cells += [shown_rate(equal) if equal else "n/a"]
            rows.append([*cells, shown_rate(grade, unit="grade") if grade else "-"])
        note = "judged in both orders; a pair whose orders disagree is a tie"
        return [*aligned([head, *rows]), "", note, *footer(logs)]


def _shows_length(log: EvalLog) -> bool:
    return bool(log.recipe.get("metrics", {}).get("length_controlled", True))


def _drawn(question: str, draw: int) -> str:
    """The id under which an answer is judged: each of several is a pair of its own to the judge."""
    return question if draw == 1 else f"{question}#{draw}"


def annotation(one: Sample, candidate: str, opponent: str, annotator: str) -> dict[str, object]:
    """Return a comparison as alpaca_eval's annotator writes it: preference 1 for the opponent, 2
    for the candidate, 1.5 for a tie.
    """
    verdicts = dict(zip(ORDERS, one.verdicts, strict=True))
    tie = one.opponent == one.answer
    first, second = (
        1.5 if tie or verdicts[order] == "tie" else _PREFERENCE.get((order, verdicts[order]))
        for order in ("BA", "AB")
    )
    return {
        "dataset": one.category,
        "instruction": one.input,
        "output_1": one.opponent,
        "generator_1": opponent,
        "output_2": one.answer,
        "generator_2": candidate,
        "annotator": annotator,
        "preference": None if first is None or second is None else (first + second) / 2,
        "preference_by_order": {"reference_first": first, "model_first": second},
    }


def at_equal_length(samples: Sequence[Sample]) -> Rate | None:
    """Return the win rate at equal length by a logistic model with the length term only: P(win) =
    s(a + b tanh(d)); None where lengths or outcomes do not vary.

    d is the difference of the answers' lengths in characters, candidate minus opponent, over its
    standard deviation. The library's model has terms for the instruction's difficulty and two gamed
    baselines as well, so the two numbers differ. The draws of one question are one observation of
    the interval.

    Source: Dubois et al. (2024), "Length-Controlled AlpacaEval", without its instruction and
        regularisation terms; clustered sandwich variance of Liang and Zeger (1986).
    """
    known = [one for one in samples if one.value is not None and len(one.lengths) == 2]
    lengths = np.array([one.lengths[0] - one.lengths[1] for one in known], dtype=float)
    outcomes = np.array([one.value for one in known], dtype=float)
    if len(known) < 10 or lengths.std() == 0 or outcomes.std() == 0:
        return None
    design = np.stack([np.ones_like(lengths), np.tanh(lengths / lengths.std())], axis=1)
    ridge = np.diag([0.0, 1e-2])  # keeps the length term finite where length decides everything
    weights = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + ridge
        step = np.linalg.solve(hessian, design.T @ (outcomes - p) - ridge @ weights)
        weights += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    p = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
    inverse = np.linalg.inv(design.T @ (design * (p * (1 - p))[:, None]) + ridge)
    codes = np.unique([one.id for one in known], return_inverse=True)[1]
    scores = np.zeros((int(codes.max()) + 1, 2))
    np.add.at(scores, codes, design * (outcomes - p)[:, None])
    error = math.sqrt((inverse @ (scores.T @ scores) @ inverse)[0, 0])

    def share(logit: float) -> float:
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, logit))))

    a = float(weights[0])
    low, high = share(a - 1.96 * error), share(a + 1.96 * error)
    return Rate(share(a), low, high, len(known), len(samples) - len(known), None, None)
