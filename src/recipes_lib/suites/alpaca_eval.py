"""AlpacaEval: one answer per instruction, compared with an opponent's in both orders; win, loss and
tie with bounds and intervals.

The library's own numbers stand beside ours (`alpaca_library`). The mean score comes from absolute
grading, where it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.fingerprints import hash_of
from recipes_lib.eval_files import alpaca_measures, alpaca_samples, write_lines
from recipes_lib.eval_log import REFERENCE, Measure, Sample
from recipes_lib.generation.judges import OpenJudge
from recipes_lib.judging.judge import Item
from recipes_lib.judging.outcomes import summarise
from recipes_lib.judging.store import JudgmentStore, Row
from recipes_lib.statistics.intervals import mean_interval
from recipes_lib.suites.alpaca_library import (
    annotations_text,
    is_alpaca_eval,
    library_numbers,
    own_length_controlled,
)
from recipes_lib.suites.answering import AnswerSet
from recipes_lib.suites.judged import (
    JUDGED_NUMBERS,
    Judged,
    JudgedSuite,
    judge_all,
    judgments_file,
    sample_file,
    within_scale,
)
from recipes_lib.suites.questions import Question, QuestionSet
from recipes_lib.suites.recipe import EvalRecipe
from recipes_lib.suites.suite import footer, grid, interval, percent, percent_interval


class AlpacaEval(JudgedSuite):
    """AlpacaEval for the targets of one eval recipe."""

    NUMBERS = JUDGED_NUMBERS | {
        "pairs": {"$ref": "#/$defs/pairs"},
        "alpaca_eval": {"type": "object", "required": ["win_rate", "n", "n_total", "by_order"]},
        "length_controlled": {},
        "mean_score": {},
        "mean_length": {},
        "by_category": {},
    }

    def opponent(self, against: str | None) -> str | None:
        """Return who is compared with: without a word the recipe's, which is the reference unless
        it says otherwise.
        """
        return against or self.recipe.metrics.against

    def questions(self) -> QuestionSet:
        """Return the questions of the recipe.

        Raises:
            RecipeError: the library's length-controlled rate is asked for, where a place in the
                list is a question, and these questions are others than AlpacaEval's, fewer, or in
                another order.
        """
        chosen = super().questions()
        instructions = [question.turns[0] for question in chosen.questions]
        if self.recipe.metrics.length_controlled == "library" and not is_alpaca_eval(instructions):
            known = (
                f"for AlpacaEval's 805 instructions in their order, and these {len(instructions)}"
                " are not"
            )
            what = f"metrics.length_controlled: library is {known}"
            raise self.recipe.error(
                "metrics.length_controlled", what, "own (length term only) is for any questions"
            )
        return chosen

    def pair_items(self, answers: AnswerSet, opponent: AnswerSet) -> list[Item]:
        """Return what is to be compared."""
        return [
            Item(
                one.id,
                one.turns[0],
                answers.text(one.id),
                opponent.text(one.id),
                meta={"category": one.category},
            )
            for one in self.chosen.questions
        ]

    def judge_answers(
        self, answers: AnswerSet, opponent: AnswerSet | None, judge: OpenJudge
    ) -> Judged:
        """Ask for all verdicts about one target."""
        assert opponent is not None
        store = JudgmentStore(judgments_file(answers.folder(self.recipe.name), opponent.name))
        judged = judge_all(
            self.pair_items(answers, opponent), judge, judge.plan("relative"), store, answers.name
        )
        if self.recipe.metrics.absolute:
            judged.add(
                judge_all(
                    single_items(self.chosen.questions, answers),
                    judge,
                    judge.plan("absolute"),
                    store,
                    f"{answers.name} 1-5",
                )
            )
        return judged

    def numbers(
        self,
        answers: AnswerSet,
        opponent: AnswerSet | None,
        judge: OpenJudge,
        rows: Sequence[Row],
        file: Path,
    ) -> tuple[dict[str, Any], list[Measure]]:
        """Return win rate, bounds and grades; samples, model_outputs.json and annotations.json are
        written.
        """
        assert opponent is not None
        recipe, metrics = self.recipe, self.recipe.metrics
        lines = samples(self.chosen.questions, answers, opponent, rows)
        write_lines(sample_file(file.parent, "samples.jsonl", opponent), lines)
        pairs, grades = alpaca_samples(lines)
        library = _library(recipe, pairs, answers, opponent, judge)
        scores = [one.value for one in grades if one.value is not None]
        numbers = {
            "pairs": summarise(pairs).to_dict(),
            "alpaca_eval": library | {"n": library["n_total"]},
            "length_controlled": (
                own_length_controlled(pairs) if metrics.length_controlled != "none" else None
            ),
            "mean_score": (
                {**within_scale(mean_interval(scores)), "questions": len(pairs)}
                if metrics.absolute
                else None
            ),
            "mean_length": {
                "answers": _mean([one.lengths[0] for one in pairs]),
                "opponent": _mean([one.lengths[1] for one in pairs]),
            },
            "by_category": _by_category(pairs),
        }
        told = {**numbers, "against": opponent.name}
        return numbers, list(alpaca_measures(recipe.name, file, told, pairs, grades))

    @staticmethod
    def table(results: Sequence[dict[str, Any]]) -> list[str]:
        """Return the lines of a table of results."""
        head = [
            "model",
            "against",
            "n",
            "win",
            "loss",
            "tie",
            "unresolved",
            "win rate, tie = half [95%]",
            "all lost .. won",
            "at equal length",
            "mean 1-5",
        ]
        rows = []
        for result in results:
            pairs = result["pairs"]
            bounds = pairs["score_bounds"]
            equal = result["length_controlled"]
            counts = [str(pairs[name]) for name in ("win", "loss", "tie", "unresolved")]
            rows.append(
                [
                    *(
                        result["target"],
                        result["against"],
                        str(pairs["n"]),
                        *counts,
                        percent_interval(pairs["score"]),
                    ),
                    (
                        f"{percent(bounds['all_lost']['estimate'])} .."
                        f" {percent(bounds['all_won']['estimate'])}"
                    ),
                    (
                        "n/a"
                        if not equal or equal["estimate"] is None
                        else f"{equal['estimate']:.1f}% [{equal['low']:.1f}, {equal['high']:.1f}]"
                    ),
                    "-" if not result["mean_score"] else interval(result["mean_score"]),
                ]
            )
        lines = grid(head, rows)
        lines += ["", "judged in both orders; a pair whose orders disagree is a tie"]
        return [*lines, *footer(results)]


def single_items(questions: Sequence[Question], answers: AnswerSet) -> list[Item]:
    """Return what is to be graded 1-5; a reference output is shown to the judge where
    there is one.
    """
    return [
        Item(
            question.id,
            question.turns[0],
            answers.text(question.id),
            None,
            question.reference[0] if question.reference else None,
        )
        for question in questions
    ]


def samples(
    questions: Sequence[Question], answers: AnswerSet, opponent: AnswerSet, rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """Return one line per question with both answers and both verdicts, for reading."""
    by_question: dict[str, list[Row]] = {}
    for row in rows:
        by_question.setdefault(row["question_id"], []).append(row)
    return [
        {
            "question_id": question.id,
            "category": question.category,
            "instruction": question.turns[0],
            "answer": answers.text(question.id),
            "opponent_answer": opponent.text(question.id),
            "verdicts": [
                {
                    name: row.get(name)
                    for name in ("kind", "order", "status", "value", "source", "mass", "raw")
                }
                for row in by_question.get(question.id, [])
            ],
        }
        for question in questions
    ]


def _library(
    recipe: EvalRecipe,
    compared: Sequence[Sample],
    answers: AnswerSet,
    opponent: AnswerSet,
    judge: OpenJudge,
) -> dict[str, Any]:
    """The library's numbers on these comparisons; files as it writes them go beside the samples."""
    folder = answers.folder(recipe.name)
    other = ", ".join(opponent.models) if opponent.name == REFERENCE else opponent.name
    plan = judge.plan("relative")
    identity = hash_of(judge.judge.fingerprint, plan.template.fingerprint, plan.rubric.criterion)
    wanted = recipe.metrics.length_controlled == "library"
    numbers, annotations = library_numbers(
        compared, answers.name, other, identity, length_controlled=wanted
    )
    names = {
        "model_outputs.json": _outputs(compared, answers.name),
        "annotations.json": annotations_text(annotations),
    }
    for name, text in names.items():
        write_text(sample_file(folder, name, opponent), text)
    return numbers


def _outputs(compared: Sequence[Sample], generator: str) -> str:
    rows = [
        {
            "dataset": one.category,
            "instruction": one.input,
            "output": one.answer,
            "generator": generator,
        }
        for one in compared
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def _by_category(compared: Sequence[Sample]) -> dict[str, dict[str, int]]:
    """Counts of outcomes per category."""
    counts: dict[str, dict[str, int]] = {}
    for one in compared:
        group = counts.setdefault(
            one.category, dict.fromkeys(("win", "loss", "tie", "unresolved"), 0)
        )
        group[one.outcome] += 1
    return counts


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
