"""AlpacaEval: one answer per instruction, compared with an opponent's in both orders; win, loss and
tie with bounds and intervals.

The mean score comes from absolute grading, where it is asked for. The alpaca_eval library's own
numbers stand beside ours: its metric on each order, and on the mean of both; they know one answer
per question, so where there are several they are of the first. The verdicts become
annotations as its annotator would write them (a test holds the two beside each other); the
annotator itself has nothing to ask, and takes minutes for tens of thousands of questions. Nothing
is downloaded, except `df_gamed.csv` where its length-controlled rate is asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.errors import EnvironmentFault, first_line
from recipes_lib.core.fingerprints import hash_of
from recipes_lib.core.terminal import aligned
from recipes_lib.eval_files import finite, write_lines
from recipes_lib.eval_log import ORDERS, REFERENCE, EvalLog, Measure, Sample
from recipes_lib.eval_recipe import EvalRecipe
from recipes_lib.generation.judges import OpenJudge
from recipes_lib.judging.human_labels import texts_of
from recipes_lib.judging.judge import Item
from recipes_lib.judging.outcomes import grade_sample, pair_sample, summarise
from recipes_lib.judging.store import Row
from recipes_lib.statistics.intervals import mean_interval
from recipes_lib.suites.answering import AnswerSet
from recipes_lib.suites.judged import (
    JUDGED_NUMBERS,
    JudgedNumbers,
    JudgedSuite,
    ScaledInterval,
    ToJudge,
    judgments_file,
    sample_file,
    within_scale,
)
from recipes_lib.suites.questions import Question, QuestionSet
from recipes_lib.suites.suite import footer, interval, percent, percent_interval

# hash of AlpacaEval's 805, in their order
_INSTRUCTIONS = "3e053e0aef9e138ba0c5b5a6e773a1a1750d96dfea70852f892a637a92c34179"
# what samples.jsonl shows of a judgment
_SHOWN = ("kind", "order", "status", "value", "source", "mass", "raw")
# preference by (order, verdict): output_1 is the opponent's, output_2 the candidate's; 2 says that
# the candidate wins.
_PREFERENCE = {("BA", "A"): 1.0, ("BA", "B"): 2.0, ("AB", "A"): 2.0, ("AB", "B"): 1.0}


class _LengthControlled(TypedDict):
    """The win rate at equal length, in percent."""

    estimate: float | None
    low: float | None
    high: float | None
    n: int
    length_term: float | None
    method: str


class _Numbers(JudgedNumbers):
    """The suite's numbers in a result. `alpaca_eval` are the library's, in percent."""

    alpaca_eval: LibraryNumbers
    length_controlled: _LengthControlled | None
    mean_length: dict[str, float]
    by_category: dict[str, dict[str, int]]


class AlpacaEval(JudgedSuite):
    """AlpacaEval for the targets of one eval recipe."""

    HELP = "answers compared with an opponent's."
    TITLE = "AlpacaEval"

    NUMBERS = JUDGED_NUMBERS | {
        "pairs": {"$ref": "#/$defs/pairs"},
        "alpaca_eval": {
            "description": "The library's numbers in percent; n_total leaves pairs without both"
            " verdicts out.",
            "type": "object",
            "required": [
                *("win_rate", "standard_error", "n", "n_total"),
                *("n_wins", "n_wins_base", "n_draws", "by_order"),
            ],
        },
        "length_controlled": {},
        "mean_score": {},
        "mean_length": {},
        "by_category": {},
    }

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

    def pair_items(
        self, questions: Sequence[Question], answers: AnswerSet, opponent: AnswerSet
    ) -> list[Item]:
        """Return what is to be compared."""
        return [
            Item(
                _drawn(one.id, draw),
                one.turns[0],
                answers.text(one.id, draw=draw),
                opponent.text(one.id, draw=draw),
                meta={"category": one.category},
            )
            for draw in range(1, answers.draws + 1)
            for one in questions
        ]

    def to_judge(
        self,
        questions: Sequence[Question],
        answers: AnswerSet,
        opponent: AnswerSet | None,
        judge: OpenJudge,
    ) -> Iterator[ToJudge]:
        """Yield what is to be compared, then what is to be graded: both in the opponent's file."""
        if opponent is None:
            return
        file = judgments_file(answers.folder(self.recipe.name), opponent.name)
        pairs = self.pair_items(questions, answers, opponent)
        yield ToJudge(pairs, judge.plan("relative"), file, answers.name)
        if self.recipe.metrics.absolute:
            items = single_items(questions, answers)
            yield ToJudge(items, judge.plan("absolute"), file, f"{answers.name} 1-5")

    def numbers(
        self,
        answers: AnswerSet,
        opponent: AnswerSet | None,
        judge: OpenJudge,
        rows: Sequence[Row],
        file: Path,
    ) -> tuple[JudgedNumbers, list[Measure]]:
        """Return win rate, bounds and grades; samples, model_outputs.json and annotations.json are
        written.
        """
        assert opponent is not None
        recipe, metrics = self.recipe, self.recipe.metrics
        pairs, grades = self._samples(answers, opponent, rows, file.parent)
        first = [one for one in pairs if one.draw == 1]
        library = _library(recipe, first, answers, opponent, judge)
        scores = [one.value for one in grades if one.value is not None]
        several = answers.draws > 1
        graded = [one.id for one in grades if one.value is not None] if several else None
        compared = summarise(pairs, (lambda one: one.id) if several else None).to_dict()
        grade: ScaledInterval | None = (
            {**within_scale(mean_interval(scores, graded)), "questions": len(first)}
            if metrics.absolute
            else None
        )
        numbers: _Numbers = {
            "pairs": compared,
            "alpaca_eval": {**library, "n": library["n_total"]},
            "length_controlled": (
                own_length_controlled(pairs) if metrics.length_controlled != "none" else None
            ),
            "mean_score": grade,
            "mean_length": {
                "answers": _mean([one.lengths[0] for one in pairs]),
                "opponent": _mean([one.lengths[1] for one in pairs]),
            },
            "by_category": _by_category(pairs),
        }
        measures = [self.win_rate(compared, pairs, file, opponent)]
        if grade and grades:
            measures.append(self.mean_grade(grade, grades, file))
        return numbers, measures

    def _samples(
        self, answers: AnswerSet, opponent: AnswerSet, rows: Sequence[Row], folder: Path
    ) -> tuple[list[Sample], list[Sample]]:
        """Return every answer's comparison, and its grade where there is one; samples.jsonl has
        them for reading.
        """
        by_item: dict[str, dict[str, Row]] = {}
        for row in rows:
            by_item.setdefault(row["question_id"], {})[row["order"]] = row
        pairs, grades, lines = [], [], []
        for draw in range(1, answers.draws + 1):
            for one in self.chosen.questions:
                verdicts = by_item.get(_drawn(one.id, draw), {})
                answer, other = answers.text(one.id, draw=draw), opponent.text(one.id, draw=draw)
                known: dict[str, Any] = {
                    "category": one.category,
                    "input": one.turns[0],
                    "answer": answer,
                    "draw": draw,
                }
                human = self.chosen.labels.get(texts_of(one.turns[0], answer, other))
                lengths = (len(answer), len(other))
                pair = pair_sample(
                    one.id, verdicts, lengths=lengths, opponent=other, human=human, **known
                )
                pairs.append(pair)
                lines.append(
                    {
                        "question_id": one.id,
                        **({"draw": draw} if draw > 1 else {}),
                        "category": one.category,
                        "instruction": one.turns[0],
                        "answer": answer,
                        "opponent_answer": other,
                        "verdicts": [
                            {name: row.get(name) for name in _SHOWN} for row in verdicts.values()
                        ],
                    }
                )
                if grade := verdicts.get("single"):
                    grades.append(grade_sample(one.id, grade, lengths=lengths[:1], **known))
        write_lines(sample_file(folder, "samples.jsonl", opponent), lines)
        return pairs, grades

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
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
        for log in logs:
            numbers = cast(_Numbers, log.numbers)
            pairs = numbers["pairs"]
            assert pairs is not None
            bounds = pairs["score_bounds"]
            equal = numbers["length_controlled"]
            counts = map(str, (pairs["win"], pairs["loss"], pairs["tie"], pairs["unresolved"]))
            rows.append(
                [
                    *(
                        log.target,
                        str(log.against),
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
                    "-" if not (mean := numbers.get("mean_score")) else interval(mean),
                ]
            )
        lines = aligned([head, *rows])
        lines += ["", "judged in both orders; a pair whose orders disagree is a tie"]
        return [*lines, *footer(logs)]


def single_items(questions: Sequence[Question], answers: AnswerSet) -> list[Item]:
    """Return what is to be graded 1-5; a reference output is shown to the judge where
    there is one.
    """
    return [
        Item(
            _drawn(question.id, draw),
            question.turns[0],
            answers.text(question.id, draw=draw),
            None,
            question.reference[0] if question.reference else None,
        )
        for draw in range(1, answers.draws + 1)
        for question in questions
    ]


def _drawn(question: str, draw: int) -> str:
    """The id under which an answer is judged: each of several is a pair of its own to the judge."""
    return question if draw == 1 else f"{question}#{draw}"


class LibraryNumbers(TypedDict):
    """The library's metric in percent, and its length-controlled rate where it was asked for; a
    result says `n_total` once more as `n`.
    """

    win_rate: float | None
    standard_error: float | None
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int
    discrete_win_rate: float | None
    by_order: NotRequired[dict[str, float | None]]
    length_controlled_winrate: NotRequired[float | None]
    lc_standard_error: NotRequired[float | None]
    n: NotRequired[int]


class Annotation(TypedDict):
    """One question as the library's annotator writes it: preference 1 for the opponent, 2 for the
    candidate, 1.5 for a tie.
    """

    dataset: str
    instruction: str | None
    output_1: str | None
    generator_1: str
    output_2: str | None
    generator_2: str
    annotator: str
    preference: float | None
    preference_by_order: dict[str, float | None]


def _library(
    recipe: EvalRecipe,
    compared: Sequence[Sample],
    answers: AnswerSet,
    opponent: AnswerSet,
    judge: OpenJudge,
) -> LibraryNumbers:
    """The library's numbers on these comparisons; files as it writes them go beside the samples."""
    folder = answers.folder(recipe.name)
    other = ", ".join(opponent.models) if opponent.name == REFERENCE else opponent.name
    plan = judge.plan("relative")
    identity = hash_of(judge.fingerprint, plan.template.fingerprint, plan.rubric.criterion)
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


def is_alpaca_eval(instructions: Sequence[str]) -> bool:
    """Whether these are AlpacaEval's 805 instructions in their order, by which the library looks
    their difficulty up.
    """
    return hash_of(list(instructions)) == _INSTRUCTIONS


def library_numbers(
    samples: Sequence[Sample],
    candidate: str,
    opponent: str,
    judge: str,
    *,
    length_controlled: bool = False,
) -> tuple[LibraryNumbers, list[Annotation]]:
    """Return the library's metrics and its annotations.

    Args:
        samples: one comparison per question in order, with its texts.
        candidate: name of the evaluated model (generator_2).
        opponent: name of its opponent (generator_1).
        judge: hash of judge, prompt and decoding, part of the annotator's name.
        length_controlled: also compute the library's length-controlled rate; only for its 805
            questions in order.

    Returns:
        {win_rate, standard_error, n_total, n_wins, n_wins_base, n_draws, by_order, ...} in percent,
        and one annotation per question.

    Raises:
        EnvironmentFault: alpaca_eval is not installed, or its file for length control cannot be
            fetched.
    """
    annotations = [_annotation(one, candidate, opponent, f"judge-{judge[:12]}") for one in samples]
    with _quiet_library():
        numbers = _win_rate([row["preference"] for row in annotations])
        numbers["by_order"] = {
            name: _win_rate([row["preference_by_order"][name] for row in annotations])["win_rate"]
            for name in ("reference_first", "model_first")
        }
        if length_controlled:
            controlled = _length_controlled(annotations)
            for name in ("length_controlled_winrate", "lc_standard_error"):
                numbers[name] = controlled[name]
    return numbers, annotations


def _annotation(one: Sample, candidate: str, opponent: str, annotator: str) -> Annotation:
    said = dict(zip(ORDERS, one.verdicts, strict=True))
    tie = one.opponent == one.answer
    first, second = (
        1.5 if tie or said[order] == "tie" else _PREFERENCE.get((order, said[order]))
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


def _win_rate(preferences: Sequence[float | None]) -> LibraryNumbers:
    """The library's metric; what it would say where there is no verdict, on which it fails."""
    from alpaca_eval import metrics

    if all(preference is None for preference in preferences):
        return {
            "win_rate": None,
            "standard_error": None,
            "n_wins": 0,
            "n_wins_base": 0,
            "n_draws": 0,
            "n_total": 0,
            "discrete_win_rate": None,
        }
    found = metrics.get_winrate([{"preference": preference} for preference in preferences])
    return cast(LibraryNumbers, _plain(found))


def _plain(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers without numpy types; NaN becomes None."""
    return finite(
        {key: value.item() if hasattr(value, "item") else value for key, value in values.items()}
    )


def _length_controlled(annotations: list[Annotation]) -> dict[str, float | None]:
    """The library's length-controlled win rate, which looks the difficulty of an instruction up by
    its place among the 805.
    """
    import pandas as pd
    from alpaca_eval import metrics

    try:
        found = metrics.get_length_controlled_winrate(
            pd.DataFrame(annotations), save_weights_dir=None
        )
    except OSError as error:
        raise EnvironmentFault(
            f"alpaca_eval's file for length control cannot be fetched: {first_line(error)}",
            "set metrics.length_controlled: own",
        ) from None
    return _plain(found)


def own_length_controlled(samples: Sequence[Sample]) -> _LengthControlled:
    """Return the win rate at equal length by a logistic model with the length term only: P(win) =
    s(a + b tanh(d)).

    d is the difference of the answers' lengths in characters, candidate minus opponent, over its
    standard deviation. The library's model has terms for the instruction's difficulty and two gamed
    baselines as well, so the two numbers differ.

    Args:
        samples: comparisons; those without an outcome are left out.

    Returns:
        {estimate, low, high (percent), n, b}; None where lengths or outcomes do not vary.

    Source: Dubois et al. (2024), "Length-Controlled AlpacaEval", without its instruction and
        regularisation terms.
    """
    known = [
        (one.lengths[0] - one.lengths[1], one.value) for one in samples if one.value is not None
    ]
    empty: _LengthControlled = {
        "estimate": None,
        "low": None,
        "high": None,
        "n": len(known),
        "length_term": None,
        "method": "own: length term only",
    }
    lengths, outcomes = np.array(known, dtype=float).reshape(-1, 2).T
    if len(known) < 10 or lengths.std() == 0 or outcomes.std() == 0:
        return empty
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
    meat = design.T @ (
        design * ((outcomes - p) ** 2)[:, None]
    )  # robust: a tie is half an outcome, not a coin flip
    error = math.sqrt((inverse @ meat @ inverse)[0, 0])

    def percent(logit: float) -> float:
        return 100 / (1 + math.exp(-max(-30.0, min(30.0, logit))))

    a = float(weights[0])
    return {
        **empty,
        "estimate": percent(a),
        "low": percent(a - 1.96 * error),
        "high": percent(a + 1.96 * error),
        "length_term": float(weights[1]),
    }


def annotations_text(annotations: Sequence[Annotation]) -> str:
    """Return annotations.json's text as the library writes it: a list of records."""
    return json.dumps(list(annotations), indent=2, ensure_ascii=False, default=str) + "\n"


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Import and run the library without its chatter: it sets the root logger to INFO and draws
    progress bars.
    """
    root = logging.getLogger()
    level = root.level
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter(
                "ignore"
            )  # alpaca_eval imports pkg_resources, which says that it will go
            try:
                import alpaca_eval  # noqa: F401
            except ImportError as error:
                hint = (
                    "pip install 'setuptools<82'"
                    if "pkg_resources" in str(error)
                    else "pip install -e '.[eval]'"
                )
                raise EnvironmentFault(f"alpaca_eval cannot be imported: {error}", hint) from None
            root.setLevel(logging.ERROR)
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(logging.NOTSET)
        root.setLevel(level)
