"""Replaying foreign judgments: the numbers that were published, to the digit, beside what they rest
on.

No model is needed. The published numbers follow the rules of their source: percentages over all
rows for the original study, twice the 1-5 mean over question means with 1.96 standard errors for
its MT-Bench, the library's win rate for alpaca_eval, plain means for FastChat. Ours stand beside
them: unparsed verdicts, contradictions, orders, and bounds.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes_lib.judging.contradictions import find_contradictions
from recipes_lib.judging.replay_findings import compare_files, find_all
from recipes_lib.judging.replay_readers import ForeignFile, Record, read_foreign
from recipes_lib.statistics.intervals import mean_interval, wilson


def replay(path: str | Path) -> dict[str, Any]:
    """Return the report of one file, as schema/judge_replay.schema.json describes it.

    Raises:
        DataError: if the file cannot be read as judgments.
    """
    return report_of(read_foreign(path))


def replay_files(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Return one report for one file; for several, their reports under `files` and findings about
    them together.
    """
    files = [read_foreign(path) for path in paths]
    if len(files) == 1:
        return report_of(files[0])
    return {
        "files": [report_of(file) for file in files],
        "findings": [finding.to_dict() for finding in compare_files(files)],
    }


def report_of(file: ForeignFile) -> dict[str, Any]:
    """The report of one file."""
    records = file.records
    unparsed = sum(not record.resolved for record in records)
    pair = file.kind == "pair"
    contradictions = find_contradictions(
        (raw or "", said if pair else None if record.score is None else int(record.score))
        for record in records
        for raw, said in zip(record.raws, record.verdicts, strict=False)
    )
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[
            f"{record.model} against {record.against}" if record.against else record.model
        ].append(record)
    return {
        "file": str(file.path),
        "format": file.format,
        "sha256": hashlib.sha256(file.data).hexdigest(),
        "recorded": _recorded(file, records),
        "unparsed": {"count": unparsed, "share": unparsed / len(records)},
        "contradictions": contradictions.to_dict(),
        "order": _order(file),
        "bounds": _pair_bounds(records) if pair else _grade_bounds(file, records),
        "alpaca_eval": _alpaca_eval(records) if file.format == "alpaca-eval-annotations" else None,
        "groups": {name: _recorded(file, rows) for name, rows in groups.items()}
        if len(groups) > 1
        else None,
        "findings": [finding.to_dict() for finding in find_all(file, contradictions)],
    }


def _recorded(file: ForeignFile, records: Sequence[Record]) -> dict[str, Any]:
    """What the source publishes for these rows."""
    form = file.format
    counted = [record for record in records if record.recorded is not None]
    outcomes = Counter(record.recorded for record in counted)
    n = len(counted)
    scores = [record.score for record in records if record.score is not None]
    result: dict[str, Any] = {
        name: 100 * outcomes[name] / n if n else None for name in ("win", "loss", "tie")
    }
    result |= {
        "n": n or len(scores),
        "mean_score": sum(scores) / len(scores) if scores else None,
        "mean_score_interval": None,
        "scale": None,
    }
    if form == "original-mt-bench-jsonl":
        mean, low, high, questions = _question_mean(records)
        result |= {
            "n": questions,
            "mean_score": mean,
            "mean_score_interval": [low, high],
            "scale": "2 x (1..5)",
            "mean_score_1_to_5": mean and mean / 2,
        }
    elif form == "original-alpaca-eval-csv":
        interval = mean_interval(scores)
        result |= {
            "mean_score_interval": [interval.low, interval.high],
            "scale": "1..5, 5 = the model is much better",
        }
    elif form == "fastchat-single":
        result |= {
            "scale": f"1..{file.highest}",
            "turns": {
                str(turn): _mean([r.score for r in records if r.turn == turn])
                for turn in sorted({r.turn for r in records})
            },
        }
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is there."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _question_mean(
    records: Sequence[Record],
) -> tuple[float | None, float | None, float | None, int]:
    """The original study's mean and 95% interval: question means, doubled, plus and minus 1.96
    standard errors.
    """
    by_question: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.score is not None:
            by_question[record.id].append(2 * record.score)
    means = np.array([sum(values) / len(values) for values in by_question.values()])
    if len(means) < 2:
        return (float(means[0]) if len(means) else None), None, None, len(means)
    half = 1.96 * float(means.std(ddof=1)) / math.sqrt(len(means))
    return float(means.mean()), float(means.mean()) - half, float(means.mean()) + half, len(means)


def _order(file: ForeignFile) -> dict[str, Any]:
    """In which orders the answers were shown, and how often the second order changed the
    verdict.
    """
    if file.kind == "grade":
        return {"judged": "single-answer", "flips": None, "flip_rate": None, "interval": None}
    if not file.both_orders:
        return {"judged": "one-order", "flips": None, "flip_rate": None, "interval": None}
    known = [
        record.flipped for record in file.records if record.flipped is not None and record.resolved
    ]
    if file.format == "fastchat-pair" or known:
        flips = [bool(flipped) for flipped in known]
    else:
        seen = {
            (record.id, record.answer, record.opponent): record.recorded for record in file.records
        }
        mirror = {"win": "loss", "loss": "win", "tie": "tie"}
        swaps = [
            (seen[key], seen.get((key[0], key[2], key[1])))
            for key in seen
            if str(key[1]) < str(key[2])
        ]
        flips = [
            mirror[first] != second
            for first, second in swaps
            if first is not None and second is not None
        ]
    interval = wilson(sum(flips), len(flips))
    return {
        "judged": "both",
        "flips": sum(flips),
        "flip_rate": interval.estimate,
        "interval": [interval.low, interval.high],
    }


def _pair_bounds(records: Sequence[Record]) -> dict[str, Any]:
    """The win percentage with every judgment without a verdict lost, and with every one won."""
    wins = sum(record.recorded == "win" and record.resolved for record in records)
    unparsed = sum(not record.resolved for record in records)
    return {
        "of": "win percent",
        "all_lost": 100 * wins / len(records),
        "all_won": 100 * (wins + unparsed) / len(records),
    }


def _grade_bounds(file: ForeignFile, records: Sequence[Record]) -> dict[str, Any]:
    """The published mean with every missing or unparsed turn at the lowest, and at the highest
    grade; a row that repeats counts again.
    """
    turns = {record.turn for record in records}
    seen: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        seen[record.model, record.id].append(record)
    bounds = {}
    for name, grade in (("all_lost", 1), ("all_won", file.highest)):
        filled = [
            [grade if record.score is None else record.score for record in rows]
            + [grade] * len(turns - {record.turn for record in rows})
            for rows in seen.values()
        ]
        if file.format == "fastchat-single":
            bounds[name] = _mean([score for scores in filled for score in scores])
        else:  # the original study's mean is over question means, doubled
            bounds[name] = 2 * sum(sum(scores) / len(scores) for scores in filled) / len(filled)
    return {"of": "mean score", **bounds}


def _alpaca_eval(records: Sequence[Record]) -> dict[str, Any]:
    """The alpaca_eval library's win rate and standard error, in percent: a draw is half a win, no
    verdict is left out.
    """
    values = np.array([record.value for record in records if record.value is not None])
    n = len(values)
    error = 100 * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return {"win_rate": 100 * float(values.mean()) if n else None, "standard_error": error, "n": n}
