"""AlpacaEval: one answer per instruction, compared with an opponent's in both orders; win, loss and tie with bounds and intervals.

The library's own numbers stand beside ours (`alpaca_library`). The mean score comes from absolute grading, where it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes_lib.atomic_files import write_text
from recipes_lib.generation.fingerprints import hash_of
from recipes_lib.generation.judges import OpenJudge
from recipes_lib.judging.judge import Item
from recipes_lib.judging.outcomes import SCORE, ItemOutcome, pair_outcomes, summarise
from recipes_lib.judging.store import JudgmentStore, Row
from recipes_lib.statistics.intervals import mean_interval
from recipes_lib.suites.alpaca_library import Row as LibraryRow
from recipes_lib.suites.alpaca_library import annotations_text, library_numbers, own_length_controlled
from recipes_lib.suites.answering import REFERENCE, AnswerSet
from recipes_lib.suites.judged import Judged, judge_all, judgments_file, within_scale
from recipes_lib.suites.questions import Question
from recipes_lib.suites.recipe import EvalRecipe


def pair_items(questions: Sequence[Question], answers: AnswerSet, opponent: AnswerSet) -> list[Item]:
    """Return what is to be compared."""
    return [
        Item(question.id, question.turns[0], answers.text(question.id), opponent.text(question.id), meta={"category": question.category})
        for question in questions
    ]


def single_items(questions: Sequence[Question], answers: AnswerSet) -> list[Item]:
    """Return what is to be graded 1-5; a reference output is shown to the judge where there is one."""
    return [
        Item(question.id, question.turns[0], answers.text(question.id), None, question.reference[0] if question.reference else None)
        for question in questions
    ]


def judge_answers(recipe: EvalRecipe, questions: Sequence[Question], answers: AnswerSet, opponent: AnswerSet, judge: OpenJudge) -> Judged:
    """Ask for all verdicts about one target."""
    store = JudgmentStore(judgments_file(answers.folder(recipe.name), opponent.name))
    judged = judge_all(pair_items(questions, answers, opponent), judge, judge.plan("relative"), store, answers.name)
    if recipe.metrics.absolute:
        judged.add(judge_all(single_items(questions, answers), judge, judge.plan("absolute"), store, f"{answers.name} 1-5"))
    return judged


def summary(
    recipe: EvalRecipe, questions: Sequence[Question], answers: AnswerSet, opponent: AnswerSet, judge: OpenJudge, rows: Sequence[Row]
) -> dict[str, Any]:
    """Return the suite's numbers for one target, and write model_outputs.json and annotations.json beside its samples."""
    outcomes = pair_outcomes([row for row in rows if row["kind"] == "relative"], [question.id for question in questions])
    pairs = summarise(outcomes)
    library = _library(recipe, questions, answers, opponent, judge, outcomes)
    lengths = [
        (len(answers.text(item.question_id)), len(opponent.text(item.question_id)), SCORE[item.outcome])
        for item in outcomes
        if item.resolved
    ]
    scores = [row["value"] for row in rows if row["kind"] == "absolute" and row["status"] == "ok"]
    return {
        "pairs": pairs.to_dict(),
        "alpaca_eval": library | {"n": library["n_total"]},
        "length_controlled": own_length_controlled(lengths) if recipe.metrics.length_controlled != "none" else None,
        "mean_score": {**within_scale(mean_interval(scores)), "questions": len(questions)} if recipe.metrics.absolute else None,
        "mean_length": {
            "answers": _mean([len(answers.text(question.id)) for question in questions]),
            "opponent": _mean([len(opponent.text(question.id)) for question in questions]),
        },
        "by_category": _by_category(questions, outcomes),
    }


def samples(questions: Sequence[Question], answers: AnswerSet, opponent: AnswerSet, rows: Sequence[Row]) -> list[dict[str, Any]]:
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
                {name: row.get(name) for name in ("kind", "order", "status", "value", "source", "mass", "raw")}
                for row in by_question.get(question.id, [])
            ],
        }
        for question in questions
    ]


def _library(
    recipe: EvalRecipe,
    questions: Sequence[Question],
    answers: AnswerSet,
    opponent: AnswerSet,
    judge: OpenJudge,
    outcomes: Sequence[ItemOutcome],
) -> dict[str, Any]:
    """The library's numbers on these outcomes; files as it writes them go beside the samples."""
    verdict_of = {item.question_id: {"AB": _verdict(item.first), "BA": _verdict(item.second)} for item in outcomes}
    rows = [
        LibraryRow(question.turns[0], question.category, opponent.text(question.id), answers.text(question.id), verdict_of[question.id])
        for question in questions
    ]
    folder = answers.folder(recipe.name)
    other = ", ".join(opponent.models) if opponent.name == REFERENCE else opponent.name
    plan = judge.plan("relative")
    identity = hash_of(judge.judge.fingerprint, plan.template.fingerprint, plan.rubric.criterion)
    wanted = recipe.metrics.length_controlled == "library"
    numbers, annotations = library_numbers(rows, answers.name, other, identity, length_controlled=wanted)
    names = {"model_outputs.json": _outputs(questions, answers, answers.name), "annotations.json": annotations_text(annotations)}
    for name, text in names.items():
        write_text(sample_file(folder, name, opponent), text)
    return numbers


def sample_file(folder: Path, name: str, opponent: AnswerSet | None) -> Path:
    """Return samples/<name>, with the opponent in the name unless it is the reference."""
    path = folder / "samples" / name
    if opponent is None or opponent.name == REFERENCE or name == "model_outputs.json":
        return path
    return path.with_name(f"{path.stem}.against-{opponent.name}{path.suffix}")


def _outputs(questions: Sequence[Question], answers: AnswerSet, generator: str) -> str:
    rows = [
        {"dataset": question.category, "instruction": question.turns[0], "output": answers.text(question.id), "generator": generator}
        for question in questions
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def _verdict(shown: str) -> str | None:
    return shown if shown in ("A", "B", "tie") else None


def _by_category(questions: Sequence[Question], outcomes: Sequence[ItemOutcome]) -> dict[str, dict[str, int]]:
    """Counts of outcomes per category."""
    category_of = {question.id: question.category for question in questions}
    counts: dict[str, dict[str, int]] = {}
    for item in outcomes:
        group = counts.setdefault(category_of[item.question_id], dict.fromkeys(("win", "loss", "tie", "unresolved"), 0))
        group[item.outcome] += 1
    return counts


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
