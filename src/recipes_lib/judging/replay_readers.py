"""Reading foreign judgments: four file formats, one sample per judgment.

Formats: the original study's AlpacaEval CSV and MT-Bench JSONL, the alpaca_eval library's
annotations.json, and FastChat's gpt-4_single / gpt-4_pair JSONL. A record keeps what the study made
of the judge's text beside what the text says.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import refuse_pipe
from recipes_lib.eval_log import SCORE, Sample
from recipes_lib.judging.verdicts import parse_absolute

CSV_COLUMNS = (
    "instruction",
    "your_answer (A)",
    "baseline_answer (B)",
    "score (A vs B)",
    "preference",
    "feedback",
)
# the prompt's name in the FastChat files that we write, whose grades are 1-5 and not 1-10
OUR_GRADING = "prometheus-absolute"
_STANDALONE_DIGIT = re.compile(
    r"\b[1-5]\b"
)  # the original study's rule; its last match is the score
_OUTCOMES = {"A": "win", "B": "loss", "Tie": "tie"}


@dataclass(frozen=True, kw_only=True)
class Record(Sample):
    """One judgment of a foreign file: a sample, unresolved where the judge's text holds no verdict
    by the study's own rule.

    `recorded` is the outcome the study counted (win, loss, tie; None in grading) and `score` the
    number it averaged (None if it has none). `strict` says whether our parser finds a verdict too
    (None: not our format). `input` is what the judge was shown.
    """

    model: str = ""
    against: str = ""
    recorded: str | None = None
    score: float | None = None
    flipped: bool | None = None
    strict: bool | None = None


@dataclass(frozen=True)
class ForeignFile:
    """A foreign file as read: format, whether it compares ("pair") or grades ("grade"), orders
    judged, records, the highest grade.
    """

    path: Path
    format: str
    kind: str
    both_orders: bool
    records: list[Record] = field(repr=False)
    data: bytes = field(repr=False)
    highest: int = 5


def read_foreign(path: str | Path) -> ForeignFile:
    """Read a file of judgments, its format recognised by its fields.

    Raises:
        DataError: if the file cannot be read, is damaged (with the line) or has none of the known
            formats.
    """
    path = Path(path)
    refuse_pipe(path)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as fault:
        raise DataError(f"cannot be read: {fault.strerror}", file=path) from None
    except UnicodeDecodeError as fault:
        raise DataError(
            f"not UTF-8: byte {fault.start}", file=path, line=data[: fault.start].count(b"\n") + 1
        ) from None
    if path.suffix == ".csv":
        return ForeignFile(
            path, "original-alpaca-eval-csv", "pair", False, list(_original_csv(text, path)), data
        )
    rows = _json_rows(text, path)
    fields = set(rows[0][1])
    for needed, name, kind, both, read in (
        (
            {"g1_winner", "g2_winner", "model_1", "model_2"},
            "fastchat-pair",
            "pair",
            True,
            _fastchat_pair,
        ),
        (
            {"judgment", "score", "turn", "model"},
            "fastchat-single",
            "grade",
            False,
            _fastchat_single,
        ),
        (
            {"raw", "turn", "question_id"},
            "original-mt-bench-jsonl",
            "grade",
            False,
            _original_mt_bench,
        ),
        (
            {"preference", "output_1", "output_2", "instruction"},
            "alpaca-eval-annotations",
            "pair",
            False,
            _alpaca_eval,
        ),
    ):
        if needed <= fields:
            records = []
            for line, row in rows:
                try:
                    records.append(read(row))
                except (KeyError, TypeError, ValueError, AttributeError) as fault:
                    raise DataError(
                        f"not a row of {name}: {type(fault).__name__} {fault}", file=path, line=line
                    ) from None
            highest = (
                10
                if name == "fastchat-single" and OUR_GRADING not in (rows[0][1].get("judge") or ())
                else 5
            )
            seen = any(
                record.flipped is not None for record in records
            )  # our own annotations say what each order gave
            return ForeignFile(
                path, name, kind, both or seen or _swapped_pairs(records), records, data, highest
            )
    raise _not_judgments(path, fields)


# What a file is whose fields give it away, and who reads it.
_OTHER_KINDS = (
    ({"key", "kind", "order"}, "these are judgments of this project", "recipes judge audit FILE"),
    ({"instruction", "output"}, "these are answers", "recipes eval EVAL FILE judges them"),
    (
        {"choices", "model_id", "question_id"},
        "these are answers",
        "recipes eval EVAL FILE judges them",
    ),
    (
        {"annotator1", "response1"},
        "these are pairs that people labelled",
        "recipes judge audit --judge JUDGE.yaml --labels FILE",
    ),
    (
        {"label", "output_1", "output_2"},
        "these are pairs that people labelled",
        "recipes judge audit --judge JUDGE.yaml --labels FILE",
    ),
    ({"results"}, "these are results of lm_eval", "recipes import FILE --as RUN"),
    ({"loss", "step"}, "this is a training log", "recipes import FILE --as RUN"),
)


class NotJudgments(DataError):
    """A file that can be read and holds something else."""


def _not_judgments(path: Path, fields: set[str]) -> NotJudgments:
    """The error for a file that is something else: what it is, where its fields tell."""
    known = "known: the original study's CSV and JSONL, alpaca_eval annotations, FastChat JSONL"
    for needed, what, use in _OTHER_KINDS:
        if needed <= fields:
            return NotJudgments(
                f"not a known format of judgments: {what}",
                use.replace("FILE", str(path)),
                known,
                file=path,
            )
    return NotJudgments(
        "not a known format of judgments",
        known,
        f"fields here: {', '.join(sorted(fields))[:300]}",
        file=path,
    )


def _json_rows(text: str, path: Path) -> list[tuple[int | None, dict[str, Any]]]:
    """The objects of a JSON array or of JSON lines, with line numbers where there are any."""
    rows: list[tuple[int | None, Any]] = []
    if text.lstrip().startswith("["):
        try:
            rows = [(None, row) for row in json.loads(text)]
        except json.JSONDecodeError as fault:
            raise DataError(f"not JSON: {fault.msg}", file=path, line=fault.lineno) from None
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except json.JSONDecodeError as fault:
                    if not rows and (report := _one_object(text)):
                        raise _not_judgments(path, set(report)) from None
                    raise DataError(f"not JSON: {fault.msg}", file=path, line=number) from None
    if not rows:
        raise DataError("0 judgments", file=path)
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError("a judgment must be an object", file=path, line=place)
    return rows


def _one_object(text: str) -> dict[str, Any] | None:
    """The one object that a file of several lines holds (a report, a configuration), or None."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return None
    return whole if isinstance(whole, dict) else None


def _original_csv(text: str, path: Path) -> Iterator[Record]:
    """The original study's comparison: the model is always A, the score is the last standalone
    digit, no digit became a tie.
    """
    csv.field_size_limit(10_000_000)
    reader = csv.DictReader(io.StringIO(text.replace("\0", "")), strict=True)
    if missing := [name for name in CSV_COLUMNS if name not in (reader.fieldnames or ())]:
        what = f"not the original study's detailed_results.csv: no column {missing[0]!r}"
        raise DataError(what, f"columns: {', '.join(reader.fieldnames or ())}", file=path, line=1)
    count = 0
    for count, row in enumerate(_csv_rows(reader, path), 1):
        try:
            feedback, preference = row["feedback"] or "", row["preference"]
            recorded, parsed = _OUTCOMES[preference], bool(_STANDALONE_DIGIT.search(feedback))
            answer, opponent = row["your_answer (A)"] or "", row["baseline_answer (B)"] or ""
            yield Record(
                id=row["instruction"],
                value=SCORE[recorded] if parsed else None,
                outcome=recorded if parsed else "unresolved",
                verdicts=(preference.replace("Tie", "tie") if parsed else "unparsed",),
                lengths=(len(answer), len(opponent)),
                answer=answer,
                opponent=opponent,
                raws=(feedback,),
                recorded=recorded,
                score=float(row["score (A vs B)"]),
                strict=parse_absolute(feedback).value is not None,
            )
        except (KeyError, TypeError, ValueError) as fault:
            raise DataError(
                f"row {count} has no preference A, B or Tie or no score: {fault}",
                file=path,
                line=reader.line_num,
            ) from None
    if not count:
        raise DataError("0 judgments", file=path)


def _csv_rows(reader: csv.DictReader[str], path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV; one that ends inside a quoted text was cut off."""
    try:
        yield from reader
    except csv.Error as fault:
        raise DataError(
            f"not CSV after line {reader.line_num}: {fault}", "is the file whole?", file=path
        ) from None


def _original_mt_bench(row: dict[str, Any]) -> Record:
    """The original study's grading of one turn; question and answer are shortened in its files."""
    verdict = parse_absolute(row["raw"])
    score = verdict.value if isinstance(verdict.value, int) else None
    return Record(
        id=str(row["question_id"]),
        turn=int(row["turn"]),
        **graded_fields(score),
        input=row.get("question"),
        answer=row.get("answer"),
        raws=(row["raw"] or "",),
        shortened=True,
        strict=score is not None,
    )


def graded_fields(score: float | None) -> dict[str, Any]:
    """Return the fields that a grade gives a record, or that its absence does."""
    if score is None:
        return {"value": None, "outcome": "unresolved", "verdicts": ("unparsed",), "score": None}
    said = str(int(score)) if float(score).is_integer() else str(score)
    return {"value": score, "outcome": "graded", "verdicts": (said,), "score": score}


def _alpaca_eval(row: dict[str, Any]) -> Record:
    """The library's annotation: preference 1 = reference, 2 = model, 1.5 and 0 = draw, None = no
    verdict.
    """
    preference = None if row["preference"] is None else float(row["preference"])
    if preference is not None and not (preference == 0 or 1 <= preference <= 2):
        raise ValueError(f"preference {preference}")
    value = 1.5 if preference == 0 else preference
    outcome = None if value is None else "win" if value > 1.5 else "loss" if value < 1.5 else "tie"
    orders = [
        given for given in (row.get("preference_by_order") or {}).values() if given is not None
    ]
    return Record(
        id=row["instruction"],
        value=None if value is None else value - 1,
        outcome=outcome or "unresolved",
        verdicts=({"win": "A", "loss": "B", "tie": "tie", None: "unparsed"}[outcome],),
        lengths=tuple(len(text) for text in (row["output_2"], row["output_1"]) if text is not None),
        answer=row["output_2"],
        opponent=row["output_1"],
        model=str(row.get("generator_2", "")),
        against=str(row.get("generator_1", "")),
        recorded=outcome,
        flipped=orders[0] != orders[1] if len(orders) == 2 else None,
    )


def _fastchat_single(row: dict[str, Any]) -> Record:
    """FastChat's grading: score -1 is a judgment without a rating."""
    score = None if row["score"] == -1 else float(row["score"])
    return Record(
        id=str(row["question_id"]),
        turn=int(row["turn"]),
        **graded_fields(score),
        input=row.get("user_prompt"),
        raws=(row["judgment"] or "",),
        model=str(row["model"]),
    )


def _fastchat_pair(row: dict[str, Any]) -> Record:
    """FastChat's comparison: game 1 shows model_1 as A, game 2 as B; a win needs both, "error" is a
    game without a verdict.
    """
    games = (row["g1_winner"], row["g2_winner"])
    if not all(game in ("model_1", "model_2", "tie", "error") for game in games):
        raise ValueError(f"winners {games}")
    parsed = "error" not in games
    outcome = (
        None
        if not parsed
        else "tie"
        if games[0] != games[1]
        else {"model_1": "win", "model_2": "loss"}.get(games[0], "tie")
    )
    letters = (
        {"model_1": "A", "model_2": "B"}.get(games[0]),
        {"model_1": "B", "model_2": "A"}.get(games[1]),
    )
    return Record(
        id=str(row["question_id"]),
        turn=int(row.get("turn", 1)),
        value=SCORE.get(outcome or ""),
        outcome=outcome or "unresolved",
        verdicts=tuple(letter or ("tie" if parsed else "unparsed") for letter in letters),
        input=row.get("g1_user_prompt"),
        raws=(row.get("g1_judgment") or "", row.get("g2_judgment") or ""),
        model=str(row["model_1"]),
        against=str(row["model_2"]),
        recorded=outcome,
        flipped=parsed and games[0] != games[1],
    )


def _swapped_pairs(records: list[Record]) -> bool:
    """Whether every comparison occurs with its answers exchanged too."""
    pairs = {(record.id, record.answer, record.opponent) for record in records}
    distinct = {pair for pair in pairs if pair[1] != pair[2]}
    return bool(distinct) and all(
        (item, second, first) in distinct for item, first, second in distinct
    )
