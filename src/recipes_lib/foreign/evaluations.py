"""Writes runs/<run>/evals/<eval>/ from the parts that foreign files gave: answers, judgments, items
and result.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from recipes_lib.core.atomic_files import write_json, write_text
from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import Row
from recipes_lib.core.project import shown_path
from recipes_lib.eval_log import AnswerFaults, Sample
from recipes_lib.foreign.judgments import JUDGMENT_FORMATS
from recipes_lib.foreign.parts import Part
from recipes_lib.judging.audit import audit
from recipes_lib.judging.store import text_hash

_FORMAT_VERSION = 1
Answers = dict[tuple[str, int], Row]


def write_evaluation(folder: Path, name: str, target: str, parts: Sequence[Part]) -> None:
    """Write one evaluation.

    Raises:
        DataError: two files hold the same metric, or answers that differ.
    """
    seen: dict[str, Part] = {}
    for part in parts:
        metrics = [measure.metric for measure in part.measures]
        for metric in metrics or (["lm-eval results"] if part.tasks else []):
            if (first := seen.setdefault(metric, part)) is not part:
                what = f"holds {metric} of {part.eval}, and so does {shown_path(first.file.path)}"
                hint = "one run has one of each: import the other file under another name"
                raise part.file.error(what, hint)
    result = {
        "format_version": _FORMAT_VERSION,
        "suite": name,
        "eval": name,
        "target": target,
        "imported": [
            {"file": part.file.path.name, "sha256": part.file.sha256, "format": part.file.format}
            for part in parts
        ],
        "flags": list(dict.fromkeys(flag for part in parts for flag in part.flags)),
        "lacks": [],
    }
    write = _write_harness if name == "lm_eval" else _write_judged
    result |= write(folder, target, parts)
    result["lacks"] = list(dict.fromkeys(lack for part in parts for lack in part.lacks))
    write_json(folder / "result.json", result)


def _write_harness(folder: Path, target: str, parts: Sequence[Part]) -> Row:
    """lm-eval's table in our format, its own file untouched beside it."""
    part = parts[0]
    write_text(folder / "lm_eval_results.json", part.file.path.read_text(encoding="utf-8-sig"))
    for task, lines in part.samples.items():
        text = "".join(line + "\n" for line in lines)
        write_text(folder / "samples" / f"samples_{task}.jsonl", text)
    return {
        "against": None,
        "subset": part.subset,
        "banners": [part.subset] if part.subset else [],
        "answers": {"name": target, "models": list(part.models), "fingerprint": None},
        "tasks": [task.to_dict() for task in part.tasks],
        "protocol": part.protocol,
        "lm_eval_results": "lm_eval_results.json",
    }


def _write_judged(folder: Path, target: str, parts: Sequence[Part]) -> Row:
    answers = _answers(parts)
    measures = [measure for part in parts for measure in part.measures]
    items = [
        _with_answer(one, answers).to_dict(measure.metric)
        for measure in measures
        for one in measure.samples
    ]
    judgments = [row for part in parts for row in part.judgments]
    if answers:
        write_text(folder / "generations.jsonl", _lines(answers.values()))
    if judgments:
        write_text(folder / "judgments.jsonl", _lines(judgments))
    write_text(folder / "items.jsonl", _lines(items))
    # the judge is known by the file it judged in: several files' judgments are not one judge's
    judges = sorted({part.judge for part in parts if part.judge})
    judge_name = next((part.judge_name for part in parts if part.judge_name), None)
    judge = {
        "name": judge_name,
        "model": judge_name,
        "fingerprint": judges[0] if len(judges) == 1 else None,
        "mode": "generate",
        "weak": None,
    }
    one_judge = len({row["judge"] for row in judgments}) == 1
    subset = next(filter(None, map(_subset, parts)), None)
    card = audit(judgments) if one_judge else None
    return {
        "against": next((part.opponent for part in parts if part.opponent), None),
        "n": len({item["question_id"] for item in items}),
        "subset": subset,
        "answers": _answer_facts(target, parts, answers),
        "judge": judge if judges else None,
        "audit": card,
        "replays": [part.report for part in parts if part.report],
        "missing": [turn for part in parts for turn in part.missing],
        "measures": [
            {"metric": measure.metric, "label": measure.label}
            | ({} if measure.opponent is None else {"opponent": measure.opponent})
            | {"unit": measure.unit}
            for measure in measures
        ],
        "banners": [line for line in ((card or {}).get("banner"), subset) if line],
    }


def _answers(parts: Sequence[Part]) -> Answers:
    """All answers by question and turn; what stands in two files must be the same."""
    known: Answers = {}
    source: Part | None = None
    for part in (part for part in parts if part.answers):
        mine = {(row["question_id"], row["turn"]): row for row in part.answers}
        if source is not None:
            _compare(part, mine, source, known)
        known = mine | known
        source = source or part
    judged = {one.place for part in parts for one in part.items}
    if source and judged and not judged & known.keys():
        raise source.file.error(
            "not one of its answers is to a question that was judged",
            "are they of the same question set?",
        )
    return known


def _compare(part: Part, mine: Answers, other: Part, known: Answers) -> None:
    where = shown_path(other.file.path)
    if part.models and other.models and part.models != other.models:
        what = f"answers of {part.models[0]}, and {where} holds answers of {other.models[0]}"
        raise part.file.error(what, "a run is one model: import each under a name of its own")
    shared = mine.keys() & known.keys()
    differ = [key for key in shared if mine[key]["answer"] != known[key]["answer"]]
    extra = mine.keys() ^ known.keys()
    if differ or not shared:
        only = len(mine.keys() - known.keys()), len(known.keys() - mine.keys())
        hint = f"{only[0]} questions are only in the first, {only[1]} only in the second"
        what = f"{len(differ)} of {len(shared)} answers differ from those in {where}"
        raise part.file.error(what, hint if extra else "are they of the same model?")
    if extra:
        names = f"{part.file.path.name} and {other.file.path.name}"
        part.lacks += (f"{len(extra)} questions are in only one of {names}",)


def _with_answer(one: Sample, answers: Mapping[tuple[str, int], Row]) -> Sample:
    """The sample with the whole answer where another file holds it."""
    row = answers.get(one.place)
    if row is None or one.answer == row["answer"]:
        return one
    lengths = (len(row["answer"]), *one.lengths[1:])
    return dataclasses.replace(one, answer=row["answer"], lengths=lengths, shortened=False)


def _answer_facts(target: str, parts: Sequence[Part], answers: Answers) -> Row:
    """What result.json says about the answers; without weights, their fingerprint is of texts."""
    texts = sorted([*key, row["answer"]] for key, row in answers.items())
    items = [one for part in parts for one in part.items]
    whole = [one for one in items if one.answer is not None and not one.shortened]
    given = {one.place: str(one.answer) for one in whole}
    given |= {key: row["answer"] for key, row in answers.items()}
    faults = dataclasses.asdict(AnswerFaults.of(list(given.values()), cut=None)) if given else None
    return {
        "name": target,
        "models": list(dict.fromkeys(model for part in parts for model in part.models)),
        "fingerprint": f"imported:{text_hash(json.dumps(texts))}" if texts else None,
        "prompt_format": None,
        "prompt_format_hash": None,
        "decoding": None,
        "answers": faults,
    }


def _subset(part: Part) -> str | None:
    """The stamp of a known question set that is not whole."""
    form, found = JUDGMENT_FORMATS.get(str(part.file.format)), len({one.id for one in part.items})
    size = form.size if form else 0
    own = all(one.category != "all" for one in part.items) or part.eval == "alpaca_eval"
    return f"subset, n={found} of {size}" if own and found < size else None


def _lines(rows: Iterable[Row]) -> str:
    """JSON lines; text that is not valid Unicode is escaped."""
    lines = []
    for row in rows:
        try:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False)
            line.encode()
        except UnicodeEncodeError:
            line = json.dumps(row, allow_nan=False)
        except ValueError:
            raise DataError(f"question {row.get('question_id')}: a number is not finite") from None
        lines.append(line + "\n")
    return "".join(lines)
