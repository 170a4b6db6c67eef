"""Foreign judgments as samples and as rows of judgments.jsonl: comparisons and grades, with what
their source made of them.

A comparison that was judged in one order keeps one verdict: its outcome is the recorded one, and
nothing stands for the other order. A text without a verdict has no value, whatever its source
counted it as.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from recipes_lib.core.json_files import Row
from recipes_lib.eval_log import REFERENCE, Measure, Sample
from recipes_lib.foreign.answers import answer_row
from recipes_lib.foreign.files import Foreign
from recipes_lib.foreign.parts import Part, check_unique, mt_bench_category, one_model, question_id
from recipes_lib.judging.replay import report_of
from recipes_lib.judging.replay_readers import ForeignFile, Record, graded_fields
from recipes_lib.judging.store import judgment_key, text_hash

_MIRROR: dict[str | None, Any] = {"win": "loss", "loss": "win"}
# AlpacaEval's reference answers by any of the names they go under.
_DAVINCI = ("text_davinci_003", "text-davinci-003", "")
_NO_ANSWERS = "the answers are not in a file of judgments: import model_answer too"
_SHORT_ANSWERS = "the answers: the file holds their first 200 characters"
WITHOUT_ANSWERS = (
    _NO_ANSWERS,
    _SHORT_ANSWERS,
)  # what a file of answers beside the judgments makes good
_LACKS = {
    "original-alpaca-eval-csv": (
        "the second order was never judged",
        "the prompt of the judge is not in the file",
    ),
    "alpaca-eval-annotations": (
        "which answer stood first is not in the file, and each pair was judged once",
    ),
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
        DataError: several models or opponents and none was named, or a question was judged twice
            with different results.
        RecipeError: the model or opponent that was named is not there.
    """
    source = file.judgments
    assert source is not None
    if source.kind == "pair":
        name, opponent, records = _pairs_of(file, source, model, against)
    else:
        name = one_model(file, [record.model for record in source.records], model)
        opponent, records = None, [record for record in source.records if record.model == name]
    records = check_unique(file, [(record.id, record.turn) for record in records], records)
    judge_name = _judge_name(source)
    judge = f"imported:{text_hash(judge_name or file.format)[:16]}"
    part = Part(
        _suite(source),
        file,
        models=(name,) if name else (),
        opponent=opponent,
        rows_of=name
        if len(
            {side for record in source.records for side in (record.model, record.against)} - {""}
        )
        > 1
        else None,
        flags=_FLAGS.get(file.format, ()),
        lacks=_LACKS[file.format],
        facts={
            "judge": judge,
            "judge_name": judge_name,
            "report": _report(source, records),
            "missing": _missing(records),
        },
    )
    part.lacks += tuple(
        f"question {turn['question_id']} turn {turn['turn']}: no judgment"
        for turn in part.facts["missing"][:20]
    )
    part.judgments = [row for record in records for row in _rows(record, source, judge)]
    part.measures = _measures(part, source, records)
    if file.format == "original-alpaca-eval-csv":
        part.answers = [
            answer_row(_id(record), 1, record.answer or "", name, instruction=record.id)
            for record in records
        ]
    return part


def _judge_name(source: ForeignFile) -> str | None:
    """The judge's name where the rows of a file tell it; the original study had one judge."""
    if source.format.startswith("original"):
        return "prometheus-7b-v2.0"
    named = _first_row(source).get("judge") or _first_row(source).get("annotator")
    return (
        str(named[0])
        if isinstance(named, list) and named
        else named
        if isinstance(named, str)
        else None
    )


def _first_row(source: ForeignFile) -> Row:
    text = source.data.decode("utf-8-sig").strip()
    row = json.loads(text)[0] if text.startswith("[") else json.loads(text.split("\n", 1)[0])
    return dict(row)


def _pairs_of(
    file: Foreign, source: ForeignFile, model: str | None, against: str | None
) -> tuple[str, str, list[Record]]:
    """The comparisons of one model with one opponent, the model's side first."""
    records = source.records
    sides = {(record.model, record.against) for record in records}
    if source.format == "fastchat-pair" and not (model is None and len(sides) == 1):
        name = one_model(file, [side for pair in sides for side in sorted(pair)], model)
        records = [
            _seen_from(record, name) for record in records if name in (record.model, record.against)
        ]
    else:
        name = one_model(file, [record.model for record in records], model)
        records = [record for record in records if record.model == name]
    opponents = list(dict.fromkeys(record.against for record in records))
    if against is not None and against not in (*opponents, REFERENCE):
        raise file.error(
            f"holds no comparison with '{against}'", f"opponents there: {', '.join(opponents[:8])}"
        )
    chosen = against if against in opponents else opponents[0]
    if len(opponents) > 1 and against is None:
        raise file.error(
            f"compares with {len(opponents)} opponents: {', '.join(opponents[:8])}",
            f"name one: --against {opponents[0]}",
        )
    is_reference = "alpaca" in file.format and chosen in _DAVINCI
    return (
        name,
        REFERENCE if is_reference else chosen,
        [record for record in records if record.against == chosen],
    )


def _seen_from(record: Record, name: str) -> Record:
    """A comparison of FastChat's with `name` as the first of the two."""
    if record.model == name:
        return record
    # Game 1 shows model_1 first: seen from model_2 it is the game in which it stood second.
    return dataclasses.replace(
        record,
        model=record.against,
        against=record.model,
        recorded=_MIRROR.get(record.recorded, record.recorded),
        value=None if record.value is None else 1 - record.value,
        outcome=_MIRROR.get(record.outcome, record.outcome),
        verdicts=record.verdicts[::-1],
        raws=record.raws[::-1],
        answer=record.opponent,
        opponent=record.answer,
    )


def _id(record: Record) -> str:
    """The question's id: FastChat's number, or a hash of the instruction."""
    return (
        record.id
        if len(record.id) <= 40 and record.id.replace("-", "").isalnum()
        else question_id(record.id)
    )


def _suite(source: ForeignFile) -> str:
    return "alpaca_eval" if "alpaca" in source.format else "mt_bench"


def _category(record: Record, source: ForeignFile) -> str:
    return mt_bench_category(record.id) if _suite(source) == "mt_bench" else "all"


def _measures(part: Part, source: ForeignFile, records: Sequence[Record]) -> list[Measure]:
    """The metrics of a file: a win rate, and for the original study its comparison score; or grades
    on their own scale.

    FastChat's grades of 1-10 are another metric than ours of 1-5, which we write in its format too.
    """
    samples = tuple(
        dataclasses.replace(
            record,
            id=_id(record),
            category=_category(record, source),
            input=record.input or record.id,
        )
        for record in records
    )

    def measure(metric: str, label: str, unit: str, mine: tuple[Sample, ...] = samples) -> Measure:
        return Measure(
            part.eval, part.eval, metric, label, mine, part.file.path, part.opponent, unit=unit
        )

    if source.kind == "grade":
        ten = source.highest == 10
        label = f"MT-Bench mean grade, {'1-10' if ten else '1-5'}"
        return [measure("grade_1_10" if ten else "grade", label, "number" if ten else "grade")]
    found = [
        measure(
            "win_rate",
            "AlpacaEval win rate" if part.eval == "alpaca_eval" else "MT-Bench win rate",
            "share",
        )
    ]
    if source.format == "original-alpaca-eval-csv":
        label = "AlpacaEval comparison score, 1-5 (5: the model's answer is much better)"
        graded = (
            dataclasses.replace(one, **graded_fields(one.score if one.resolved else None))
            for one in samples
        )
        found.append(measure("comparison_score", label, "grade", tuple(graded)))
    return found


def _rows(record: Record, source: ForeignFile, judge: str) -> Iterator[Row]:
    """Rows of judgments.jsonl: one per verdict that was asked for, none for an order that
    was not.
    """
    said = record.verdicts
    pair = source.kind == "pair"
    if not pair:
        orders = ["single"]
    elif source.format == "alpaca-eval-annotations":
        orders = ["unknown"]
    else:
        orders = ["AB", "BA"][: len(said)]
    name = _id(record) if _suite(source) == "alpaca_eval" else f"{_id(record)}:{record.turn}"
    for order, verdict, raw in zip(orders, said, record.raws or [None], strict=False):
        answers = [record.answer, record.opponent] if pair else [record.answer]
        shown = answers[::-1] if order == "BA" else answers
        known = [text for text in shown if text is not None and not record.shortened]
        hashes = [text_hash(text) for text in known] if len(known) == len(shown) else []
        ok = verdict != "unparsed"
        value: Any = verdict if pair and ok else record.score if ok else None
        yield {
            "key": judgment_key(name, order, judge, text_hash(raw or ""), hashes),
            "kind": "relative" if pair else "absolute",
            "question_id": name,
            "order": order,
            "status": "ok"
            if ok
            else "empty"
            if raw is not None and not raw.strip()
            else "unparsed",
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
            "meta": {
                "category": _category(record, source),
                "turn": record.turn,
                "question": _id(record),
            },
            "raw": raw,
            "finish_reason": None,
        }


def _missing(records: Sequence[Record]) -> list[Row]:
    """Turns that other questions have and this one lacks."""
    turns: dict[str, set[int]] = {}
    for record in records:
        turns.setdefault(_id(record), set()).add(record.turn)
    every = set().union(*turns.values()) if turns else set()
    return [
        {"question_id": question, "turn": turn}
        for question, seen in turns.items()
        for turn in sorted(every - seen)
    ]


def _report(source: ForeignFile, records: Sequence[Record]) -> Row:
    """What `recipes judge replay` says about these rows: the published numbers, bounds, and
    findings by name.
    """
    return {
        **report_of(dataclasses.replace(source, records=list(records))),
        "file": source.path.name,
    }
