"""Replaying foreign judgments: the numbers that were published, to the digit, beside what they rest
on, and what is wrong with them as named findings.

No model is needed. The published numbers follow the rules of their source: percentages over all
rows for the original study, twice the 1-5 mean over question means with 1.96 standard errors for
its MT-Bench, the library's win rate for alpaca_eval, plain means for FastChat. Ours stand beside
them: unparsed verdicts, contradictions, orders, and bounds. A finding states counts, never an
opinion.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import numpy as np

from recipes_lib.core.json_files import Row
from recipes_lib.eval_log import StoredContradictions
from recipes_lib.foreign.files import read_foreign
from recipes_lib.foreign.judgments import (
    KNOWN_JUDGMENTS,
    Judgments,
    Record,
    missing_turns,
    read_judgments,
)
from recipes_lib.judging.contradictions import find_contradictions
from recipes_lib.statistics.intervals import mean_interval, wilson

CONTRADICTIONS_MAX = 0.10
CONSTANT_SHARE = 0.05
_OUTCOMES = ("win", "loss", "tie")
_MIRROR = {"win": "loss", "loss": "win", "tie": "tie"}


@dataclass(frozen=True)
class ReplayFinding:
    """A named finding; `items` are up to 20 of the questions it is about."""

    name: str
    message: str
    count: int
    items: list[str] = field(default_factory=list)


def replay_files(paths: Sequence[str | Path]) -> Row:
    """Return one report for one file, as schema/judge_replay.schema.json describes it; for several,
    their reports under `files` and findings about them together.

    Raises:
        DataError: a file cannot be read as judgments.
    """
    files = [read_judgments(read_foreign(path, KNOWN_JUDGMENTS)) for path in paths]
    if len(files) == 1:
        return report_of(files[0])
    return {
        "files": [report_of(file) for file in files],
        "findings": [asdict(finding) for finding in _together(files)],
    }


def report_of(judgments: Judgments) -> Row:
    """Return the report of one file."""
    file, records, pairs = judgments.file, judgments.records, judgments.pairs
    unparsed = sum(not record.resolved for record in records)
    contradictions = find_contradictions(
        (raw or "", said if pairs else None if record.score is None else int(record.score))
        for record in records
        for raw, said in zip(record.raws, record.verdicts, strict=False)
    )
    groups: dict[str, list[Record]] = defaultdict(list)
    for one in records:
        groups[f"{one.model} against {one.against}" if one.against else one.model].append(one)
    return {
        "file": str(file.path),
        "format": file.format,
        "sha256": file.sha256,
        "recorded": _recorded(judgments, records),
        "unparsed": {"count": unparsed, "share": unparsed / len(records)},
        "contradictions": contradictions,
        "order": _order(judgments),
        "bounds": _pair_bounds(records) if pairs else _grade_bounds(judgments),
        "alpaca_eval": _library(records) if file.format == "alpaca-eval-annotations" else None,
        "groups": (
            {name: _recorded(judgments, rows) for name, rows in groups.items()}
            if len(groups) > 1
            else None
        ),
        "findings": [asdict(finding) for finding in _findings(judgments, contradictions)],
    }


def _recorded(judgments: Judgments, records: Sequence[Record]) -> Row:
    """What the source publishes for these rows."""
    form = judgments.file.format
    outcomes = Counter(record.recorded for record in records if record.recorded is not None)
    n, scores = outcomes.total(), [one.score for one in records if one.score is not None]
    result: Row = {
        **{name: 100 * outcomes[name] / n if n else None for name in _OUTCOMES},
        "n": n or len(scores),
        "mean_score": _mean(scores),
        "mean_score_interval": None,
        "scale": None,
    }
    if form == "original-mt-bench-jsonl":
        # question means, doubled, plus and minus 1.96 standard errors
        by_question: dict[str, list[float]] = defaultdict(list)
        for record in records:
            if record.score is not None:
                by_question[record.id].append(2 * record.score)
        means = np.array([sum(values) / len(values) for values in by_question.values()])
        mean = float(means.mean()) if len(means) else None
        low = high = None
        if mean is not None and len(means) > 1:
            half = 1.96 * float(means.std(ddof=1)) / math.sqrt(len(means))
            low, high = mean - half, mean + half
        result |= {
            "n": len(means),
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
        turns = sorted({record.turn for record in records})
        result |= {
            "scale": f"1..{judgments.highest}",
            "turns": {
                str(turn): _mean([one.score for one in records if one.turn == turn])
                for turn in turns
            },
        }
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _order(judgments: Judgments) -> Row:
    """In which orders the answers were shown, and how often the second order changed the
    verdict.
    """
    if not judgments.both_orders:
        judged = "one-order" if judgments.pairs else "single-answer"
        return {"judged": judged, "flips": None, "flip_rate": None, "interval": None}
    records = judgments.records
    flips = [bool(one.flipped) for one in records if one.flipped is not None and one.resolved]
    if judgments.file.format != "fastchat-pair" and not flips:
        seen = {(one.id, one.answer, one.opponent): one.recorded for one in records}
        swaps = [
            (said, seen.get((item, second, first)))
            for (item, first, second), said in seen.items()
            if str(first) < str(second)
        ]
        flips = [_MIRROR[first] != second for first, second in swaps if first and second]
    interval = wilson(sum(flips), len(flips))
    return {
        "judged": "both",
        "flips": sum(flips),
        "flip_rate": interval.estimate,
        "interval": [interval.low, interval.high],
    }


def _pair_bounds(records: Sequence[Record]) -> Row:
    """The win percentage with every judgment without a verdict lost, and with every one won."""
    wins = sum(record.recorded == "win" and record.resolved for record in records)
    unparsed = sum(not record.resolved for record in records)
    return {
        "of": "win percent",
        "all_lost": 100 * wins / len(records),
        "all_won": 100 * (wins + unparsed) / len(records),
    }


def _grade_bounds(judgments: Judgments) -> Row:
    """The published mean with every missing or unparsed turn at the lowest, and at the highest
    grade; a row that repeats counts again.
    """
    turns = {record.turn for record in judgments.records}
    seen: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in judgments.records:
        seen[record.model, record.id].append(record)
    bounds: Row = {"of": "mean score"}
    for name, grade in (("all_lost", 1), ("all_won", judgments.highest)):
        filled = [
            [grade if record.score is None else record.score for record in rows]
            + [grade] * len(turns - {record.turn for record in rows})
            for rows in seen.values()
        ]
        if judgments.file.format == "fastchat-single":
            bounds[name] = _mean([score for scores in filled for score in scores])
        else:  # the original study's mean is over question means, doubled
            bounds[name] = 2 * sum(sum(scores) / len(scores) for scores in filled) / len(filled)
    return bounds


def _library(records: Sequence[Record]) -> Row:
    """The alpaca_eval library's win rate and standard error, in percent: a draw is half a win, no
    verdict is left out.
    """
    values = np.array([record.value for record in records if record.value is not None])
    n = len(values)
    error = 100 * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return {"win_rate": 100 * float(values.mean()) if n else None, "standard_error": error, "n": n}


# ---- what is wrong ----


def _findings(
    judgments: Judgments, contradictions: StoredContradictions
) -> Iterator[ReplayFinding]:
    records = judgments.records

    def found(name: str, some: Sequence[Record], message: str) -> Iterator[ReplayFinding]:
        places = [one.id[:80] + (f" turn {one.turn}" if one.turn > 1 else "") for one in some[:20]]
        if some:
            yield ReplayFinding(name, f"{len(some)} {message}", len(some), places)

    if judgments.pairs and not judgments.both_orders:
        message = (
            f"{len(records)} comparisons were judged in one order only: position bias is unknown"
            " and part of every rate"
        )
        yield ReplayFinding("one-order-judging", message, len(records))
    count, rate = contradictions["count"], contradictions["rate"]
    if rate is not None and rate > CONTRADICTIONS_MAX:
        message = (
            f"{count} of {contradictions['decidable']} decidable verdicts ({100 * rate:.1f}%) are"
            f" the opposite of what the judge's own text says; {contradictions['direction']}"
        )
        yield ReplayFinding("contradictions", message, count)
    unparsed = [record for record in records if not record.resolved]
    as_tie = any(record.recorded == "tie" for record in unparsed)
    end = "counted as ties" if as_tie else "left out of the numbers"
    name = "unparsed-as-tie" if as_tie else "unparsed-left-out"
    yield from found(name, unparsed, f"judgments without a verdict were {end}")
    empty_wins = [
        record
        for record in records
        for won, winner, loser in (
            ("win", record.answer, record.opponent),
            ("loss", record.opponent, record.answer),
        )
        if record.recorded == won
        and winner is not None
        and not winner.strip()
        and (loser or "").strip()
    ]
    yield from found("empty-answer-wins", empty_wins, "empty answers were counted as wins")
    message = "second turns were judged without the first turn of their conversation"
    yield from found("turn-without-context", list(_without_context(records)), message)
    if missing := [f"question {name} turn {turn}" for name, turn in missing_turns(records)]:
        one = len(missing) == 1
        have = "turn has no judgment and vanishes" if one else "turns have no judgment and vanish"
        message = f"{len(missing)} {have} from the mean: {', '.join(missing[:5])}"
        yield ReplayFinding("missing-turn", message, len(missing), missing[:20])
    judged = [(*one.conversation, one.turn, one.answer, one.opponent) for one in records]
    counts = Counter(judged)
    repeated = [one for one, key in zip(records, judged, strict=True) if counts[key] > 1]
    message = "judgments are of a question that was judged twice"
    yield from found("repeated-judgments", repeated, message)
    answers = Counter(one.answer.strip() for one in records if one.answer and one.answer.strip())
    count = max(answers.values(), default=0)
    if count >= 3 and count > CONSTANT_SHARE * len(records):
        message = f"the same answer was given to {count} of {len(records)} questions"
        yield ReplayFinding("constant-answer", message, count)
    loose = [record for record in records if record.strict is False and record.resolved]
    message = "verdicts were read from texts that do not end in the judge's verdict format"
    yield from found("not-in-the-judges-format", loose, message)


def _without_context(records: Sequence[Record]) -> Iterator[Record]:
    """Later turns that were judged without the first turn in front of the judge."""
    first = {one.conversation: one.input for one in records if one.turn == 1 and one.input}
    for record in records:
        start = first.get(record.conversation)
        if record.turn > 1 and record.input is not None and start:
            # the text itself, or the part between FastChat's headings
            after = start.split("[Question]\n")[-1].split("[User Question]\n")[-1]
            if after.split("\n\n[The Start of")[0].strip()[:60] not in record.input:
                yield record


def _together(files: Sequence[Judgments]) -> list[ReplayFinding]:
    """Findings about several files: the same file, or the same answers, under two names."""
    findings: list[ReplayFinding] = []
    answers = {one.file.path: _answers(one.records) for one in files}
    for name, words in (
        ("identical-files", "are the same file, byte for byte"),
        ("same-answers", "hold the same answers"),
    ):
        groups: list[list[Judgments]] = []
        for one in files:
            for group in groups:
                if name == "identical-files":
                    same = one.file.sha256 == group[0].file.sha256
                else:
                    same = _same_answers(answers[one.file.path], answers[group[0].file.path])
                if same:
                    group.append(one)
                    break
            else:
                groups.append([one])
        for group in groups:
            paths = [str(one.file.path) for one in group]
            if len(paths) > 1 and not any(set(paths) <= set(finding.items) for finding in findings):
                message = f"{' and '.join(paths)} {words}: they cannot be ranked as different"
                findings.append(ReplayFinding(name, message, len(paths), paths))
    return findings


def _same_answers(one: Mapping[Any, set[str]], other: Mapping[Any, set[str]]) -> bool:
    """Whether two files agree wherever both have an answer, and that is most of both: a copy of
    which rows were dropped is a copy.
    """
    both = one.keys() & other.keys()
    return 2 * len(both) > max(len(one), len(other)) and all(one[key] == other[key] for key in both)


def _answers(records: Sequence[Record]) -> dict[tuple[str, int], set[str]]:
    found: dict[tuple[str, int], set[str]] = defaultdict(set)
    for one in records:
        if one.answer:
            found[one.place].add(one.answer)
    return found


# ---- the table ----


def rounded(value: float | None, places: int) -> str:
    """Return a number rounded half up, as published tables do; "n/a" for None.

    Example:
        >>> rounded(5.125, 2), rounded(None, 2)
        ('5.13', 'n/a')
    """
    if value is None:
        return "n/a"
    return str(Decimal(value).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP))


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a report of `replay_files` for reading."""
    for single in report.get("files", [report]):
        yield from _file_lines(single)
    if "files" in report:
        yield "together"
        yield from _finding_lines(report["findings"])


def _file_lines(report: Mapping[str, Any]) -> Iterator[str]:
    recorded, bounds, order = report["recorded"], report["bounds"], report["order"]
    yield f"{report['file']} ({report['format']}, n {recorded['n']})"
    if recorded["win"] is not None:
        shares = (f"{name} {rounded(recorded[name], 2)}%" for name in _OUTCOMES)
        yield f"  recorded: {', '.join(shares)}"
    if recorded["mean_score"] is not None:
        ends = recorded["mean_score_interval"]
        interval = "" if ends is None else f" [{rounded(ends[0], 3)}, {rounded(ends[1], 3)}]"
        mean = f"{rounded(recorded['mean_score'], 3)}{interval}"
        yield f"  recorded: mean score {mean} ({recorded['scale']})"
    if library := report["alpaca_eval"]:
        rate, error = rounded(library["win_rate"], 3), rounded(library["standard_error"], 3)
        yield f"  alpaca_eval: win rate {rate}, standard error {error}, n {library['n']}"
    for name, group in (report["groups"] or {}).items():
        shares = (f"{outcome} {rounded(group[outcome], 2)}%" for outcome in _OUTCOMES)
        mean = f"mean score {rounded(group['mean_score'], 3)}"
        yield f"  {name}: {mean if group['win'] is None else ', '.join(shares)}, n {group['n']}"
    flips = "" if order["flips"] is None else f", {order['flips']} verdicts changed with the order"
    limits = f"lost {rounded(bounds['all_lost'], 3)}, won {rounded(bounds['all_won'], 3)}"
    yield f"  orders: {order['judged']}{flips}; {bounds['of']} if what is missing were {limits}"
    yield from _finding_lines(report["findings"])


def _finding_lines(findings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for finding in findings:
        yield f"  ! {finding['name']}: {finding['message']}"
    if not findings:
        yield "  no findings"
