"""Writes runs/<run>/evals/<eval>/ from the parts that foreign files gave: answers, judgments, items
and result.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.core.atomic_files import write_json, write_text
from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import Row
from recipes_lib.core.project import shown_path
from recipes_lib.eval_log import Measure, Sample
from recipes_lib.foreign.parts import Part
from recipes_lib.judging.audit import audit
from recipes_lib.judging.store import text_hash

_FORMAT_VERSION = 1
_SIZES = {
    "original-alpaca-eval-csv": 805,
    "original-mt-bench-jsonl": 80,
    "fastchat-single": 80,
    "fastchat-pair": 80,
}


def write_evaluation(folder: Path, name: str, target: str, parts: Sequence[Part]) -> Row:
    """Write one evaluation and return its result.

    Raises:
        DataError: two files hold the same metric, or answers that differ.
    """
    _check_metrics(parts)
    if name == "lm_eval":
        return _write_harness(folder, name, target, parts)
    answers = _answers(parts)
    measures = [measure for part in parts for measure in part.measures]
    samples = [
        _with_answer(one, answers).to_dict(measure.metric)
        for measure in measures
        for one in measure.samples
    ]
    judgments = [row for part in parts for row in part.judgments]
    if answers:
        write_text(folder / "generations.jsonl", _lines(answers.values()))
    if judgments:
        write_text(folder / "judgments.jsonl", _lines(judgments))
    write_text(folder / "items.jsonl", _lines(samples))
    result = {
        **_head(name, target, parts),
        "against": next((part.opponent for part in parts if part.opponent), None),
        "n": len({one["question_id"] for one in samples}),
        "subset": next(filter(None, map(_subset, parts)), None),
        "answers": _answer_facts(target, parts, answers),
        "judge": _judge(parts),
        "audit": _audit(judgments),
        "replays": [part.facts["report"] for part in parts if "report" in part.facts],
        "missing": [turn for part in parts for turn in part.facts.get("missing", ())],
        "measures": [_described(measure) for measure in measures],
    }
    result["banners"] = [*filter(None, [(result["audit"] or {}).get("banner"), result["subset"]])]
    write_json(folder / "result.json", result)
    return result


def _head(name: str, target: str, parts: Sequence[Part]) -> Row:
    files = [
        {"file": part.file.path.name, "sha256": part.file.sha256, "format": part.file.format}
        for part in parts
    ]
    return {
        "format_version": _FORMAT_VERSION,
        "suite": name,
        "eval": name,
        "target": target,
        "imported": files,
        "flags": list(dict.fromkeys(flag for part in parts for flag in part.flags)),
        "lacks": list(dict.fromkeys(lack for part in parts for lack in part.lacks)),
    }


def _write_harness(folder: Path, name: str, target: str, parts: Sequence[Part]) -> Row:
    """lm-eval's table in our format, its own file untouched beside it."""
    facts = parts[0].facts
    write_text(folder / "lm_eval_results.json", parts[0].file.path.read_text(encoding="utf-8-sig"))
    for task, lines in facts["samples"].items():
        write_text(
            folder / "samples" / f"samples_{task}.jsonl", "".join(line + "\n" for line in lines)
        )
    result = {
        **_head(name, target, parts),
        "against": None,
        "subset": facts["subset"],
        "banners": [facts["subset"]] if facts["subset"] else [],
        "answers": {"name": target, "models": list(parts[0].models), "fingerprint": None},
        "tasks": facts["tasks"],
        "protocol": facts["protocol"],
        "lm_eval_results": "lm_eval_results.json",
    }
    write_json(folder / "result.json", result)
    return result


def _check_metrics(parts: Sequence[Part]) -> None:
    """Two files that hold one metric of one evaluation cannot both be this run's.

    Raises:
        DataError: naming both files.
    """
    seen: dict[str, Part] = {}
    for part in parts:
        metrics = [measure.metric for measure in part.measures] or (
            ["lm-eval results"] if "tasks" in part.facts else []
        )
        for metric in metrics:
            if (first := seen.setdefault(metric, part)) is not part:
                what = f"holds {metric} of {part.eval}, and so does {shown_path(first.file.path)}"
                raise part.file.error(
                    what, "one run has one of each: import the other file under another name"
                )


def _answers(parts: Sequence[Part]) -> dict[tuple[str, int], Row]:
    """All answers by question and turn; what stands in two files must be the same.

    Raises:
        DataError: files answer the same questions differently, or different questions.
    """
    known: dict[tuple[str, int], Row] = {}
    source: Part | None = None
    for part in (part for part in parts if part.answers):
        mine = {(row["question_id"], row["turn"]): row for row in part.answers}
        if source is not None:
            _compare(part, mine, source, known)
        known |= {key: row for key, row in mine.items() if key not in known}
        source = source or part
    judged = {one.key for part in parts for one in part.samples}
    if known and judged and not judged & known.keys():
        assert source is not None
        raise source.file.error(
            "not one of its answers is to a question that was judged",
            "are they of the same question set?",
        )
    return known


def _compare(
    part: Part, mine: dict[tuple[str, int], Row], other: Part, known: dict[tuple[str, int], Row]
) -> None:
    """Answers of two files to the same questions."""
    if part.models and other.models and part.models != other.models:
        what = (
            f"answers of {part.models[0]}, and {shown_path(other.file.path)} holds answers of"
            f" {other.models[0]}"
        )
        raise part.file.error(what, "a run is one model: import each under a name of its own")
    shared = mine.keys() & known.keys()
    differ = [key for key in shared if mine[key]["answer"] != known[key]["answer"]]
    where = shown_path(other.file.path)
    if differ or not shared:
        only = len(mine.keys() - known.keys()), len(known.keys() - mine.keys())
        what = f"{len(differ)} of {len(shared)} answers differ from those in {where}"
        hint = (
            f"{only[0]} questions are only in the first, {only[1]} only in the second"
            if any(only)
            else "are they of the same model?"
        )
        raise part.file.error(what, hint)
    if extra := mine.keys() ^ known.keys():
        part.lacks = (
            *part.lacks,
            (
                f"{len(extra)} questions are in only one of {part.file.path.name} and"
                f" {other.file.path.name}"
            ),
        )


def _described(measure: Measure) -> Row:
    """What result.json says about a metric whose samples stand in items.jsonl."""
    against = {"opponent": measure.opponent} if measure.opponent is not None else {}
    return {"metric": measure.metric, "label": measure.label, **against, "unit": measure.unit}


def _with_answer(one: Sample, answers: dict[tuple[str, int], Row]) -> Sample:
    """The sample with the whole answer where another file holds it."""
    row = answers.get(one.key)
    if row is None or one.answer == row["answer"]:
        return one
    return dataclasses.replace(
        one, answer=row["answer"], lengths=(len(row["answer"]), *one.lengths[1:]), shortened=False
    )


def _answer_facts(target: str, parts: Sequence[Part], answers: dict[tuple[str, int], Row]) -> Row:
    """What result.json says about the answers; their fingerprint is one of their texts, because no
    weights are there.
    """
    texts = sorted([*key, row["answer"]] for key, row in answers.items())
    models = list(dict.fromkeys(model for part in parts for model in part.models))
    whole = (
        one
        for part in parts
        for one in part.samples
        if one.answer is not None and not one.shortened
    )
    given = {one.key: str(one.answer) for one in whole}
    given |= {key: str(row["answer"]) for key, row in answers.items()}
    faults: Row | None = None
    if given:
        counts = Counter(text.strip() for text in given.values())
        text, most = counts.most_common(1)[0]
        identical = {
            "count": most if most > 1 else 0,
            "share": most / len(given) if most > 1 else 0.0,
            "text": text[:200],
        }
        flagged = most > 2 and most > 0.1 * len(given)
        faults = {
            "n": len(given),
            "empty": counts.get("", 0),
            "cut": None,
            "identical": {**identical, "flagged": flagged},
        }
    return {
        "name": target,
        "models": models,
        "fingerprint": f"imported:{text_hash(json.dumps(texts))}" if texts else None,
        "prompt_format": None,
        "prompt_format_hash": None,
        "decoding": None,
        "answers": faults,
    }


def _judge(parts: Sequence[Part]) -> Row | None:
    """The judge as far as it is known: by the file it judged in."""
    judged = [part for part in parts if "judge" in part.facts]
    if not judged:
        return None
    name = next(
        (str(part.facts["judge_name"]) for part in judged if part.facts.get("judge_name")), None
    )
    known = sorted({str(part.facts["judge"]) for part in judged})
    return {
        "name": name,
        "model": name,
        "fingerprint": known[0] if len(known) == 1 else None,
        "mode": "generate",
        "weak": None,
    }


def _audit(judgments: Sequence[Row]) -> dict[str, Any] | None:
    """The scorecard of the foreign judge; None where several files' judgments stand in one
    evaluation or there are none.
    """
    return audit(judgments) if len({row["judge"] for row in judgments}) == 1 else None


def _subset(part: Part) -> str | None:
    """The stamp of a known question set that is not whole."""
    size, found = _SIZES.get(part.file.format), len({one.id for one in part.samples})
    own = part.file.format == "original-alpaca-eval-csv" or all(
        one.category != "all" for one in part.samples
    )
    return f"subset, n={found} of {size}" if size and own and found < size else None


def _lines(rows: Iterable[Row]) -> str:
    """JSON lines; text that is not valid Unicode is escaped.

    Raises:
        DataError: a number that is not finite.
    """
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
