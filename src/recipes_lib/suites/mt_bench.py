"""MT-Bench: two turns with the conversation as context, each graded 1-5 and, where there is an
opponent, compared in both orders.

Questions in math, reasoning and coding are graded against their reference answer by the correctness
rubric, the others by the helpfulness rubric. A second turn is always shown with the first one
before it. Nothing vanishes from a mean: a turn without a verdict is counted and enters the bounds,
once as 1 and once as 5. Files go out in FastChat's formats.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.schema import COUNT, NUMBER, fields_of, object_schema
from recipes_lib.core.terminal import aligned
from recipes_lib.eval_files import write_lines
from recipes_lib.eval_log import EvalLog, Measure, Sample
from recipes_lib.generation.judges import OpenJudge
from recipes_lib.judging.judge import Item
from recipes_lib.judging.outcomes import grade_sample, pair_sample, pair_samples, summarise
from recipes_lib.judging.prometheus import OUR_GRADING
from recipes_lib.judging.store import Row
from recipes_lib.statistics.intervals import Interval, mean_interval
from recipes_lib.suites.answering import AnswerSet
from recipes_lib.suites.judged import (
    JUDGED_NUMBERS,
    JudgedNumbers,
    JudgedSuite,
    MeanGrade,
    ToJudge,
    judgments_file,
    sample_file,
    within_scale,
)
from recipes_lib.suites.questions import NEEDS_REFERENCE, Question
from recipes_lib.suites.suite import footer, interval, number, percent_interval

_STYLE = {
    "svg.hashsalt": "recipes",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
}
_GRADE = object_schema(
    fields_of(Interval)
    | {
        "turns": COUNT,
        "without_grade": COUNT,
        "bounds": object_schema({"all_1": NUMBER, "all_5": NUMBER}),
        "scale": {"type": "string"},
        "doubled_2_10": NUMBER,
    }
)
_GRADES: JsonSchema = {"type": "object", "additionalProperties": _GRADE}
_Cell = tuple[Question, int, Row | None]  # a turn, with its judgment
_COLOURS = ("#4477aa", "#cc6677", "#ddaa33", "#228833")


class Summary(JudgedNumbers):
    """Mean grades over all turns, by turn, and by category and turn (or `all`); the rates of the
    comparison where there is an opponent.
    """

    by_turn: dict[str, MeanGrade]
    by_category: dict[str, dict[str, MeanGrade]]
    statuses: dict[str, int]
    with_reference: int


class _Numbers(Summary):
    """The suite's numbers in a result. The store keeps every judgment there ever was; those behind
    the numbers are named.
    """

    judgment_keys: list[str]


class MTBench(JudgedSuite):
    """MT-Bench for the targets of one eval recipe."""

    HELP = "two turns, graded 1-5."
    TITLE = "MT-Bench"

    NUMBERS = JUDGED_NUMBERS | {
        "score": _GRADE,
        "by_turn": _GRADES,
        "by_category": {"type": "object", "additionalProperties": _GRADES},
        "pairs": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pairs"}]},
        "statuses": {},
        "judgment_keys": {},
    }

    def pair_items(
        self, questions: Sequence[Question], answers: AnswerSet, opponent: AnswerSet
    ) -> list[Item]:
        """Return the turns to compare."""
        return pair_items(questions, answers, opponent)

    def to_judge(
        self,
        questions: Sequence[Question],
        answers: AnswerSet,
        opponent: AnswerSet | None,
        judge: OpenJudge,
    ) -> Iterator[ToJudge]:
        """Yield the turns to grade, without and with a reference, then those to compare."""
        folder = answers.folder(self.recipe.name)
        for reference in (False, True):
            items = grading_items(questions, answers, reference)
            plan = judge.plan("absolute", reference)
            yield ToJudge(items, plan, judgments_file(folder, "reference"), answers.name)
        if opponent is not None and self.recipe.metrics.pairwise:
            pairs, plan = self.pair_items(questions, answers, opponent), judge.plan("relative")
            file = judgments_file(folder, opponent.name)
            yield ToJudge(pairs, plan, file, f"{answers.name} pairs")

    def numbers(
        self,
        answers: AnswerSet,
        opponent: AnswerSet | None,
        judge: OpenJudge,
        rows: Sequence[Row],
        file: Path,
    ) -> tuple[JudgedNumbers, list[Measure]]:
        """Return mean grades and win rate; FastChat's files and a figure are written."""
        questions, name = self.chosen.questions, self.judge_file.path.stem
        write_fastchat(file.parent, questions, answers, opponent, rows, name)
        numbers: _Numbers = {
            "judgment_keys": [row["key"] for row in rows],
            **summary(questions, rows),
        }
        figure = file.parent / "figures" / "grades"
        draw_grades(numbers, figure, f"{answers.name}: {self.recipe.name}, judge {name}")
        grades, pairs = samples(questions, answers, opponent, rows)
        measures = [self.mean_grade(numbers["score"], grades, file)]
        if opponent and numbers["pairs"]:
            measures.append(self.win_rate(numbers["pairs"], pairs, file, opponent))
        return numbers, measures

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        found = [cast(Summary, log.numbers) for log in logs]
        turns = list(found[0]["by_turn"])
        head = [
            "model",
            "n",
            "turns",
            "no grade",
            "mean 1-5 [95%]",
            "all 1 .. 5",
            *(f"turn {turn}" for turn in turns),
            "win rate",
        ]
        rows = []
        for log, numbers in zip(logs, found, strict=True):
            score = numbers["score"]
            pairs = numbers["pairs"]
            rows.append(
                [
                    *(
                        log.target,
                        str(log.n),
                        str(score["turns"]),
                        str(score["without_grade"]),
                        interval(score),
                    ),
                    f"{number(score['bounds']['all_1'])} .. {number(score['bounds']['all_5'])}",
                    *(number(numbers["by_turn"][turn]["estimate"]) for turn in turns),
                    "-"
                    if not pairs
                    else f"{percent_interval(pairs['score'])} against {log.against}",
                ]
            )
        lines = aligned([head, *rows])
        lines += [
            "",
            *aligned(
                [
                    ["category", *(log.target for log in logs)],
                    *(
                        [name, *(_cell(one["by_category"][name]) for one in found)]
                        for name in found[0]["by_category"]
                    ),
                ]
            ),
        ]
        lines += ["", "grades are 1-5, as the judge gives them"]
        return [*lines, *footer(logs)]


def _cell(turns: Mapping[str, MeanGrade]) -> str:
    return (
        " / ".join(number(turns[turn]["estimate"]) for turn in turns if turn != "all")
        + f"  (n {turns['all']['turns']})"
    )


def grading_items(questions: Sequence[Question], answers: AnswerSet, reference: bool) -> list[Item]:
    """Return the turns to grade.

    Args:
        reference: True for the questions that are graded against a reference answer, False for the
            others.
    """
    return [
        Item(
            f"{one.id}:{turn}",
            conversation(one, answers, turn),
            answers.text(one.id, turn),
            None,
            _expected(one, turn),
            meta=_meta(one, turn),
        )
        for one, turn in turns_of(questions)
        if uses_reference(one) == reference
    ]


def pair_items(
    questions: Sequence[Question], answers: AnswerSet, opponent: AnswerSet
) -> list[Item]:
    """Return the turns to compare; for a later turn each side's answer is its whole conversation,
    the last part marked.
    """
    return [
        Item(
            f"{one.id}:{turn}",
            one.turns[0] if turn == 1 else _numbered(one.turns[:turn]),
            _side(one, answers, turn),
            _side(one, opponent, turn),
            _expected(one, turn),
            meta=_meta(one, turn),
        )
        for one, turn in turns_of(questions)
    ]


def turns_of(questions: Sequence[Question]) -> list[tuple[Question, int]]:
    """Return every turn of every question."""
    return [(one, turn) for one in questions for turn in range(1, len(one.turns) + 1)]


def _expected(question: Question, turn: int) -> str | None:
    """The reference answer to a turn, where it is graded against one."""
    return question.reference[turn - 1] if question.reference and uses_reference(question) else None


def uses_reference(question: Question) -> bool:
    """Whether a question is graded against a reference: its category needs one, and there
    is one.
    """
    return question.category in NEEDS_REFERENCE and question.reference is not None


def conversation(question: Question, answers: AnswerSet, turn: int) -> str:
    """Return what was asked in a turn: the question, for a later turn with the conversation before
    it.
    """
    if turn == 1:
        return question.turns[0]
    parts = [
        f"User: {question.turns[n - 1]}\n\nAssistant: {answers.text(question.id, n)}"
        for n in range(1, turn)
    ]
    last = question.turns[turn - 1]
    return (
        "\n\n".join([*parts, f"User: {last}"])
        + "\n\n(The response to evaluate answers the last message of this conversation.)"
    )


def samples(
    questions: Sequence[Question],
    answers: AnswerSet,
    opponent: AnswerSet | None,
    rows: Sequence[Row],
) -> tuple[list[Sample], list[Sample]]:
    """Return the grades and the comparisons of judgments."""
    asked = {question.id: question for question in questions}
    orders: dict[tuple[str, int], dict[str, Row]] = {}
    grades, pairs = [], []

    def known(name: str, turn: int, row: Row, lengths: Sequence[int]) -> dict[str, Any]:
        return {
            "turn": turn,
            "category": row["meta"]["category"],
            "lengths": tuple(lengths),
            "input": asked[name].turns[turn - 1],
            "answer": answers.text(name, turn),
        }

    for row in rows:
        name, _, turn = row["question_id"].rpartition(":")
        if row["kind"] == "relative":
            orders.setdefault((name, int(turn)), {})[row["order"]] = row
        else:
            grades.append(grade_sample(name, row, **known(name, int(turn), row, row["lengths"])))
    for (name, turn), verdicts in orders.items():
        one = next(iter(verdicts.values()))
        lengths = one["lengths"] if one["order"] == "AB" else one["lengths"][::-1]
        theirs = opponent.text(name, turn) if opponent else ""
        texts = known(name, turn, one, lengths)
        pairs.append(pair_sample(name, verdicts, opponent=theirs, **texts))
    return grades, pairs


def summary(questions: Sequence[Question], rows: Sequence[Row]) -> Summary:
    """Return the suite's numbers: means 1-5 over all turns, per turn and per category, with
    intervals clustered by question.
    """
    grades = {row["question_id"]: row for row in rows if row["kind"] == "absolute"}
    turns = turns_of(questions)
    table = [(question, turn, grades.get(f"{question.id}:{turn}")) for question, turn in turns]
    pairs = [row for row in rows if row["kind"] == "relative"]
    last = max(turn for _, turn in turns)

    def by_turn(some: Sequence[_Cell]) -> dict[str, MeanGrade]:
        return {
            str(turn): _mean([cell for cell in some if cell[1] == turn])
            for turn in range(1, last + 1)
        }

    groups: dict[str, list[_Cell]] = {}
    for cell in table:
        groups.setdefault(cell[0].category, []).append(cell)
    comparison = None
    if pairs:
        compared = pair_samples(pairs, [f"{question.id}:{turn}" for question, turn in turns])
        comparison = summarise(compared, cluster_of=lambda one: one.id.rpartition(":")[0]).to_dict()
    return {
        "score": _mean(table),
        "by_turn": by_turn(table),
        "by_category": {
            name: by_turn(some) | {"all": _mean(some)} for name, some in groups.items()
        },
        "pairs": comparison,
        "statuses": dict(Counter(row["status"] for row in rows if row["kind"] == "absolute")),
        "with_reference": sum(uses_reference(question) for question in questions),
    }


def _mean(cells: Sequence[_Cell]) -> MeanGrade:
    """A mean grade: the interval over graded turns, and the means if every turn without a grade had
    got 1, or 5.

    `doubled_2_10` is twice the mean, the scale of the original study; it is no MT-Bench score.
    """
    graded = [
        (question.id, float(row["value"]))
        for question, _, row in cells
        if row is not None and row["status"] == "ok"
    ]
    interval = mean_interval([value for _, value in graded], [name for name, _ in graded] or None)
    missing, total = len(cells) - len(graded), sum(value for _, value in graded)
    worst, best = ((total + missing * grade) / len(cells) if cells else None for grade in (1, 5))
    doubled = None if interval.estimate is None else 2 * interval.estimate
    return {
        **within_scale(interval),
        "turns": len(cells),
        "without_grade": missing,
        "bounds": {"all_1": worst, "all_5": best},
        "doubled_2_10": doubled,
    }


def write_fastchat(
    folder: Path,
    questions: Sequence[Question],
    answers: AnswerSet,
    opponent: AnswerSet | None,
    rows: Sequence[Row],
    judge: str,
) -> None:
    """Write samples/question.jsonl, model_answer.jsonl and single.jsonl (and pair.jsonl) in
    FastChat's formats.
    """
    now = time.time()
    lines = [
        {
            "question_id": _number(question.id),
            "answer_id": f"{answers.name}-{question.id}",
            "model_id": answers.name,
            "choices": [
                {
                    "index": 0,
                    "turns": [
                        answers.text(question.id, turn)
                        for turn in range(1, len(question.turns) + 1)
                    ],
                }
            ],
            "tstamp": now,
        }
        for question in questions
    ]
    asked = [
        {"question_id": _number(one.id), "category": one.category, "turns": list(one.turns)}
        for one in questions
    ]
    single = [_single(row, answers.name, judge, now) for row in rows if row["kind"] == "absolute"]
    write_lines(sample_file(folder, "question.jsonl", None), asked)
    write_lines(sample_file(folder, "model_answer.jsonl", None), lines)
    write_lines(sample_file(folder, "single.jsonl", None), single)
    if opponent is not None and any(row["kind"] == "relative" for row in rows):
        write_lines(
            sample_file(folder, "pair.jsonl", opponent),
            _pairs(rows, answers.name, opponent.name, judge, now),
        )


def _single(row: Row, model: str, judge: str, now: float) -> dict[str, object]:
    """A grade as FastChat writes it; a turn without a grade has score -1 there."""
    question, _, turn = row["question_id"].rpartition(":")
    score = row["value"] if row["status"] == "ok" else -1
    facts = {
        "question_id": _number(question),
        "model": model,
        "judge": [judge, OUR_GRADING],
        "user_prompt": "",
        "judgment": row.get("raw") or "",
    }
    return facts | {"score": score, "turn": int(turn), "tstamp": now, "status": row["status"]}


def _pairs(
    rows: Sequence[Row], model: str, opponent: str, judge: str, now: float
) -> list[dict[str, object]]:
    """Both orders of each comparison in one line: g1 shows the model first, g2 the opponent."""
    orders: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "relative":
            orders.setdefault(row["question_id"], {})[row["order"]] = row
    lines = []
    for name, pair in orders.items():
        question, _, turn = name.rpartition(":")
        line: dict[str, object] = {
            "question_id": _number(question),
            "model_1": model,
            "model_2": opponent,
        }
        for game, order, winners in (
            ("g1", "AB", {"A": "model_1", "B": "model_2"}),
            ("g2", "BA", {"A": "model_2", "B": "model_1"}),
        ):
            row = pair.get(order, {"status": "missing", "value": None})
            won = winners.get(str(row["value"]), "tie") if row["status"] == "ok" else "error"
            line |= {
                f"{game}_winner": won,
                f"{game}_user_prompt": "",
                f"{game}_judgment": row.get("raw") or "",
            }
        lines.append(
            line | {"judge": [judge, "prometheus-relative"], "turn": int(turn), "tstamp": now}
        )
    return lines


def _side(question: Question, answers: AnswerSet, turn: int) -> str:
    """One side of a comparison; nothing where the turn's own answer is empty, which then loses by
    rule.
    """
    if turn == 1 or not answers.text(question.id, turn).strip():
        return answers.text(question.id, turn)
    return "\n\n".join(
        f"(to question {n})\n{answers.text(question.id, n)}" for n in range(1, turn + 1)
    )


def _numbered(turns: Sequence[str]) -> str:
    listed = "\n\n".join(f"Question {number}: {text}" for number, text in enumerate(turns, 1))
    return f"{listed}\n\n(Compare the two conversations by their answers to question {len(turns)}.)"


def _meta(question: Question, turn: int) -> dict[str, str | int]:
    return {"category": question.category, "turn": turn, "question": question.id}


def _number(name: str) -> int | str:
    return int(name) if name.isdigit() else name


def draw_grades(summary: Summary, stem: Path, title: str) -> list[Path]:
    """Draw the grades of one model and return the files written.

    A dot that is missing has no grade; a dot without a line has too few grades for an interval.

    Args:
        summary: `by_category` and `by_turn` of a result.
        stem: where to, without a suffix.
        title: above the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    categories, turns = list(summary["by_category"]), list(summary["by_turn"])
    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({**_STYLE, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            figsize=(1.6 + 0.9 * len(categories), 3.8), layout="constrained"
        )
        width = 0.5 / len(turns)
        for number, turn in enumerate(turns):
            cells = [summary["by_category"][category][turn] for category in categories] + [
                summary["by_turn"][turn]
            ]
            places = [
                place - 0.25 + width * (number + 0.5)
                for place in (*range(len(categories)), len(categories) + 0.4)
            ]
            _dots(axes, places, cells, f"turn {turn}", _COLOURS[number % len(_COLOURS)])
        names = [
            *(
                f"{category}\nn {summary['by_category'][category]['all']['n']}"
                for category in categories
            ),
            "all",
        ]
        axes.set_xticks([*range(len(categories)), len(categories) + 0.4], names)
        axes.axvline(len(categories) - 0.3, color="0.7", linewidth=0.8)
        axes.set(
            ylim=(0.8, 5.2), yticks=range(1, 6), ylabel="mean grade, 1-5, 95% interval", title=title
        )
        axes.legend(frameon=False, ncols=len(turns), loc="upper left", bbox_to_anchor=(0, -0.18))
        files = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
        figure.savefig(files[0], metadata={"Date": None})
        figure.savefig(files[1], dpi=120, metadata={"Software": None})
        plt.close(figure)
    return files


def _dots(
    axes: Any, places: Sequence[float], cells: Sequence[MeanGrade], label: str, colour: str
) -> None:
    """One turn's means, with a line where there is an interval."""
    known = [
        (place, cell)
        for place, cell in zip(places, cells, strict=True)
        if cell["estimate"] is not None
    ]
    axes.plot(
        [place for place, _ in known],
        [cell["estimate"] for _, cell in known],
        "o",
        markersize=7,
        label=label,
        color=colour,
    )
    ranges = [
        (place, cell["low"], cell["high"]) for place, cell in known if cell["low"] is not None
    ]
    if ranges:
        axes.vlines(*zip(*ranges, strict=True), color=colour, linewidth=1.6)
