"""Foreign judgments as items and as rows of judgments.jsonl: comparisons and grades, with what their source made of them.

A comparison that was judged in one order keeps one verdict: its outcome is the recorded one, and nothing stands for the other order.
A text without a verdict has no value, whatever its source counted it as.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from recipes_lib.foreign.files import Foreign
from recipes_lib.foreign.parts import Part, Row, check_unique, mt_bench_category, one_model, question_id
from recipes_lib.judging.replay_readers import ForeignFile, Record
from recipes_lib.judging.store import judgment_key, text_hash

REFERENCE = "reference"
_VALUE = {"win": 1.0, "tie": 0.5, "loss": 0.0}
_MIRROR = {"win": "loss", "loss": "win", "tie": "tie", None: None}
_SWAPPED = {"A": "B", "B": "A"}
# AlpacaEval's reference answers by any of the names they go under.
_DAVINCI = ("text_davinci_003", "text-davinci-003", "")
_NO_ANSWERS = "the answers are not in a file of judgments: import model_answer too"
_SHORT_ANSWERS = "the answers: the file holds their first 200 characters"
WITHOUT_ANSWERS = (_NO_ANSWERS, _SHORT_ANSWERS)  # what a file of answers beside the judgments makes good
_LACKS = {
    "original-alpaca-eval-csv": ("the second order was never judged", "the prompt of the judge is not in the file"),
    "alpaca-eval-annotations": ("which answer stood first is not in the file, and each pair was judged once",),
    "original-mt-bench-jsonl": (
        _SHORT_ANSWERS,
        "reference answers and the second turn's context were never shown to the judge",
    ),
    "fastchat-single": (_NO_ANSWERS,),
    "fastchat-pair": (_NO_ANSWERS,),
}
_FLAGS = {
    "original-alpaca-eval-csv": ("one order, the model always first",),
    "alpaca-eval-annotations": ("one order per pair",),
    "original-mt-bench-jsonl": ("each turn judged alone",),
}


def read_judgments(file: Foreign, model: str | None, against: str | None) -> Part:
    """Return the judgments of one model, against one opponent where it is a comparison.

    Raises:
        DataError: several models or opponents and none was named, or a question was judged twice with different results.
        RecipeError: the model or opponent that was named is not there.
    """
    source = file.judgments
    assert source is not None
    if source.kind == "pair":
        name, opponent, records = _pairs_of(file, source, model, against)
    else:
        name = one_model(file, [record.model for record in source.records], model)
        opponent, records = None, [record for record in source.records if record.model == name]
    records = check_unique(file, [(record.item, record.turn) for record in records], records)
    judge_name = _judge_name(source)
    judge = f"imported:{text_hash(judge_name or file.format)[:16]}"
    part = Part(
        _suite(source),
        file,
        models=(name,) if name else (),
        opponent=opponent,
        rows_of=name if len({side for record in source.records for side in (record.model, record.opponent)} - {""}) > 1 else None,
        flags=_FLAGS.get(file.format, ()),
        lacks=_LACKS[file.format],
        facts={"judge": judge, "judge_name": judge_name, "report": _report(source, records), "missing": _missing(records)},
    )
    part.lacks += tuple(f"question {turn['question_id']} turn {turn['turn']}: no judgment" for turn in part.facts["missing"][:20])
    part.judgments = [row for record in records for row in _rows(record, source, judge)]
    (_add_pairs if source.kind == "pair" else _add_grades)(part, source, records)
    if file.format == "original-alpaca-eval-csv":
        from recipes_lib.foreign.answers import answer_row

        part.answers = [answer_row(_id(record), 1, record.answer or "", name, instruction=record.item) for record in records]
    return part


def _judge_name(source: ForeignFile) -> str | None:
    """The judge's name where the rows of a file tell it; the original study had one judge."""
    if source.format.startswith("original"):
        return "prometheus-7b-v2.0"
    named = _first_row(source).get("judge") or _first_row(source).get("annotator")
    return str(named[0]) if isinstance(named, list) and named else named if isinstance(named, str) else None


def _first_row(source: ForeignFile) -> Row:
    text = source.data.decode("utf-8-sig").strip()
    row = json.loads(text)[0] if text.startswith("[") else json.loads(text.split("\n", 1)[0])
    return dict(row)


def _pairs_of(file: Foreign, source: ForeignFile, model: str | None, against: str | None) -> tuple[str, str, list[Record]]:
    """The comparisons of one model with one opponent, the model's side first."""
    records = source.records
    sides = {(record.model, record.opponent) for record in records}
    if source.format == "fastchat-pair" and not (model is None and len(sides) == 1):
        name = one_model(file, [side for pair in sides for side in sorted(pair)], model)
        records = [_seen_from(record, name) for record in records if name in (record.model, record.opponent)]
    else:
        name = one_model(file, [record.model for record in records], model)
        records = [record for record in records if record.model == name]
    opponents = list(dict.fromkeys(record.opponent for record in records))
    if against is not None and against not in (*opponents, REFERENCE):
        raise file.error(f"holds no comparison with '{against}'", f"opponents there: {', '.join(opponents[:8])}")
    chosen = against if against in opponents else opponents[0]
    if len(opponents) > 1 and against is None:
        raise file.error(f"compares with {len(opponents)} opponents: {', '.join(opponents[:8])}", f"name one: --against {opponents[0]}")
    is_reference = "alpaca" in file.format and chosen in _DAVINCI
    return name, REFERENCE if is_reference else chosen, [record for record in records if record.opponent == chosen]


def _seen_from(record: Record, name: str) -> Record:
    """A comparison of FastChat's with `name` as the first of the two."""
    if record.model == name:
        return record
    # Game 1 shows model_1 first: seen from model_2 it is the game in which it stood second.
    games = tuple(reversed(record.texts))
    return dataclasses.replace(
        record, model=record.opponent, opponent=record.model, recorded=_MIRROR[record.recorded], texts=games, answer=record.opponent_answer,
        opponent_answer=record.answer,
    )  # fmt: skip


def _id(record: Record) -> str:
    """The question's id: FastChat's number, or a hash of the instruction."""
    return record.item if len(record.item) <= 40 and record.item.replace("-", "").isalnum() else question_id(record.item)


def _suite(source: ForeignFile) -> str:
    return "alpaca_eval" if "alpaca" in source.format else "mt_bench"


def _category(record: Record, source: ForeignFile) -> str:
    return mt_bench_category(record.item) if _suite(source) == "mt_bench" else "all"


def _said(record: Record, source: ForeignFile) -> list[str]:
    """What the judge said, as our items have it: a verdict per order, or the grade."""
    if source.kind == "grade":
        return [str(int(record.score)) if record.score is not None and float(record.score).is_integer() else _shown(record)]
    if source.format == "alpaca-eval-annotations":
        return [{"win": "A", "loss": "B", "tie": "tie", None: "unparsed"}[record.recorded]]
    if not record.parsed and source.format == "original-alpaca-eval-csv":
        return ["unparsed"]
    return [str(letter) if letter in ("A", "B") else "tie" if record.parsed else "unparsed" for _, letter in record.texts]


def _shown(record: Record) -> str:
    return "unparsed" if record.score is None else str(record.score)


def _common(record: Record, source: ForeignFile) -> Row:
    """The fields of an item that do not depend on the metric."""
    shortened = source.format == "original-mt-bench-jsonl"
    texts = {"instruction": record.shown or record.item, "answer": record.answer, "opponent_answer": record.opponent_answer}
    lengths = [len(text) for text in (record.answer, record.opponent_answer) if text is not None] if not shortened else []
    return {
        "question_id": _id(record),
        "turn": record.turn,
        "category": _category(record, source),
        "verdicts": _said(record, source),
        "raws": [text for text, _ in record.texts],
        "lengths": lengths,
        **{key: text for key, text in texts.items() if text is not None},
        **({"shortened": True} if shortened else {}),
    }


def _add_pairs(part: Part, source: ForeignFile, records: Sequence[Record]) -> None:
    """Win rate, and for the original study its comparison score."""
    title = "AlpacaEval win rate" if part.eval == "alpaca_eval" else "MT-Bench win rate"
    part.measures.append({"metric": "win_rate", "label": title, "opponent": part.opponent, "unit": "share"})
    for record in records:
        value = None
        if record.parsed and record.recorded is not None:
            value = record.preference - 1 if record.preference is not None else _VALUE[record.recorded]
        outcome = record.recorded if value is not None else "unresolved"
        part.items.append({"metric": "win_rate", "value": value, "outcome": outcome, **_common(record, source)})
    if source.format == "original-alpaca-eval-csv":
        label = "AlpacaEval comparison score, 1-5 (5: the model's answer is much better)"
        part.measures.append({"metric": "comparison_score", "label": label, "opponent": part.opponent, "unit": "grade"})
        for record in records:
            value = record.score if record.parsed else None
            outcome = "graded" if value is not None else "unresolved"
            said = {"verdicts": [str(int(value)) if value is not None else "unparsed"]}
            part.items.append({"metric": "comparison_score", "value": value, "outcome": outcome, **_common(record, source), **said})


def _add_grades(part: Part, source: ForeignFile, records: Sequence[Record]) -> None:
    """Grades on their own scale; FastChat's 1-10 are another metric than ours of 1-5, which we write in its format too."""
    ten = source.highest == 10
    metric = "grade_1_10" if ten else "grade"
    label = f"MT-Bench mean grade, {'1-10' if ten else '1-5'}"
    part.measures.append({"metric": metric, "label": label, "unit": "number" if ten else "grade"})
    for record in records:
        outcome = "graded" if record.score is not None else "unresolved"
        part.items.append({"metric": metric, "value": record.score, "outcome": outcome, **_common(record, source)})


def _rows(record: Record, source: ForeignFile, judge: str) -> Iterator[Row]:
    """Rows of judgments.jsonl: one per verdict that was asked for, none for an order that was not."""
    said = _said(record, source)
    pair = source.kind == "pair"
    if not pair:
        orders = ["single"]
    elif source.format == "alpaca-eval-annotations":
        orders = ["unknown"]
    else:
        orders = ["AB", "BA"][: len(said)]
    name = _id(record) if _suite(source) == "alpaca_eval" else f"{_id(record)}:{record.turn}"
    raws: list[str | None] = [text for text, _ in record.texts]
    raws = raws or [None]
    for order, verdict, raw in zip(orders, said, raws, strict=False):
        answers = [record.answer, record.opponent_answer] if pair else [record.answer]
        shown = answers[::-1] if order == "BA" else answers
        known = [text for text in shown if text is not None and source.format != "original-mt-bench-jsonl"]
        hashes = [text_hash(text) for text in known] if len(known) == len(shown) else []
        ok = verdict != "unparsed"
        value: Any = verdict if pair and ok else record.score if ok else None
        yield {
            "key": judgment_key(name, order, judge, text_hash(raw or ""), hashes),
            "kind": "relative" if pair else "absolute",
            "question_id": name,
            "order": order,
            "status": "ok" if ok else "empty" if raw is not None and not raw.strip() else "unparsed",
            "value": int(value) if isinstance(value, float) and value.is_integer() else value,
            "reason": None,
            "source": "imported",
            "judge": judge,
            "prompt_hash": None,
            "answer_hashes": hashes,
            "lengths": [len(text) for text in known] if hashes else [],
            "marker_in_answer": None,
            "cut": None,
            "seed": None,
            "temperature": None,
            "attempts": [],
            "meta": {"category": _category(record, source), "turn": record.turn, "question": _id(record)},
            "raw": raw,
            "finish_reason": None,
        }


def _missing(records: Sequence[Record]) -> list[Row]:
    """Turns that other questions have and this one lacks."""
    turns: dict[str, set[int]] = {}
    for record in records:
        turns.setdefault(_id(record), set()).add(record.turn)
    every = set().union(*turns.values()) if turns else set()
    return [{"question_id": question, "turn": turn} for question, seen in turns.items() for turn in sorted(every - seen)]


def _report(source: ForeignFile, records: Sequence[Record]) -> Row:
    """What `recipes judge replay` says about these rows: the published numbers, bounds, and findings by name."""
    from recipes_lib.judging.replay import report_of

    return {**report_of(dataclasses.replace(source, records=list(records))), "file": source.path.name}
