"""What is wrong with foreign judgments, as named findings. A finding states counts, never an
opinion.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from recipes_lib.judging.contradictions import Contradictions
from recipes_lib.judging.replay_readers import ForeignFile, Record
from recipes_lib.judging.store import text_hash

CONTRADICTIONS_MAX = 0.10
CONSTANT_SHARE = 0.05


@dataclass(frozen=True)
class ReplayFinding:
    """A named finding; `items` are up to 20 of the questions it is about."""

    name: str
    message: str
    count: int
    items: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return asdict(self)


def _named(name: str, message: str, records: Sequence[Record]) -> ReplayFinding:
    """A finding about records."""
    places = [
        record.id[:80] + ("" if record.turn == 1 else f" turn {record.turn}") for record in records
    ]
    return ReplayFinding(name, message, len(records), places[:20])


def find_all(file: ForeignFile, contradictions: Contradictions) -> list[ReplayFinding]:
    """Return the findings of one file."""
    records = file.records
    found: list[ReplayFinding | None] = [
        _one_order(file),
        _contradictions(contradictions),
        _unparsed(file),
        _empty_wins(records),
        _without_context(records),
        *_missing_turns(records),
        _repeated(records),
        _constant(records),
        _not_the_format(records),
    ]
    return [finding for finding in found if finding]


def _one_order(file: ForeignFile) -> ReplayFinding | None:
    """Comparisons that were judged with the answers in one order only."""
    if file.kind != "pair" or file.both_orders:
        return None
    message = (
        f"{len(file.records)} comparisons were judged in one order only: position bias is unknown"
        " and part of every rate"
    )
    return ReplayFinding("one-order-judging", message, len(file.records))


def _contradictions(found: Contradictions) -> ReplayFinding | None:
    """More verdicts against the judge's own words than the default threshold."""
    if found.rate is None or found.rate <= CONTRADICTIONS_MAX:
        return None
    share = f"{found.count} of {found.decidable} decidable verdicts ({100 * found.rate:.1f}%)"
    message = f"{share} are the opposite of what the judge's own text says; {found.direction}"
    return ReplayFinding("contradictions", message, found.count)


def _unparsed(file: ForeignFile) -> ReplayFinding | None:
    """Texts without a verdict that were counted as a tie, or left out."""
    unparsed = [record for record in file.records if not record.resolved]
    if not unparsed:
        return None
    if any(record.recorded == "tie" for record in unparsed):
        message = f"{len(unparsed)} judgments without a verdict were counted as ties"
        return _named("unparsed-as-tie", message, unparsed)
    return _named(
        "unparsed-left-out",
        f"{len(unparsed)} judgments without a verdict were left out of the numbers",
        unparsed,
    )


def _empty_wins(records: Sequence[Record]) -> ReplayFinding | None:
    """Empty answers that were counted as the winner."""
    wins = [
        record
        for record in records
        if (
            record.recorded == "win"
            and record.answer is not None
            and not record.answer.strip()
            and (record.opponent or "").strip()
        )
        or (
            record.recorded == "loss"
            and record.opponent is not None
            and not record.opponent.strip()
            and (record.answer or "").strip()
        )
    ]
    return (
        _named("empty-answer-wins", f"{len(wins)} empty answers were counted as wins", wins)
        if wins
        else None
    )


def _without_context(records: Sequence[Record]) -> ReplayFinding | None:
    """Later turns that were judged without the first turn in front of the judge."""
    first = {
        (record.model, record.against, record.id): record.input
        for record in records
        if record.turn == 1 and record.input
    }
    alone = []
    for record in records:
        start = first.get((record.model, record.against, record.id))
        if (
            record.turn > 1
            and record.input is not None
            and start
            and _question(start)[:60] not in record.input
        ):
            alone.append(record)
    if not alone:
        return None
    return _named(
        "turn-without-context",
        f"{len(alone)} second turns were judged without the first turn of their conversation",
        alone,
    )


def _question(shown: str) -> str:
    """The question in what the judge saw: the text itself, or the part between FastChat's
    headings.
    """
    after = shown.split("[Question]\n")[-1].split("[User Question]\n")[-1]
    return after.split("\n\n[The Start of")[0].strip()


def _missing_turns(records: Sequence[Record]) -> list[ReplayFinding]:
    """Turns that others have and this question lacks, so that its mean rests on fewer."""
    turns: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for record in records:
        turns[record.model, record.against, record.id].add(record.turn)
    expected = set().union(*turns.values())
    missing = [
        f"question {item[2]} turn {turn}"
        for item, seen in turns.items()
        for turn in sorted(expected - seen)
    ]
    if not missing:
        return []
    what = (
        "1 turn has no judgment and vanishes"
        if len(missing) == 1
        else f"{len(missing)} turns have no judgment and vanish"
    )
    return [
        ReplayFinding(
            "missing-turn",
            f"{what} from the mean: {', '.join(missing[:5])}",
            len(missing),
            missing[:20],
        )
    ]


def _repeated(records: Sequence[Record]) -> ReplayFinding | None:
    """Questions judged more than once under the same names."""
    counts = Counter(
        (record.model, record.against, record.id, record.turn, record.answer, record.opponent)
        for record in records
    )
    repeated = [
        record
        for record in records
        if counts[
            record.model, record.against, record.id, record.turn, record.answer, record.opponent
        ]
        > 1
    ]
    return (
        _named(
            "repeated-judgments",
            f"{len(repeated)} judgments are of a question that was judged twice",
            repeated,
        )
        if repeated
        else None
    )


def _constant(records: Sequence[Record]) -> ReplayFinding | None:
    """One answer given to many questions."""
    answers = Counter(
        record.answer.strip() for record in records if record.answer and record.answer.strip()
    )
    if not answers:
        return None
    _, count = answers.most_common(1)[0]
    if count < 3 or count <= CONSTANT_SHARE * len(records):
        return None
    return ReplayFinding(
        "constant-answer",
        f"the same answer was given to {count} of {len(records)} questions",
        count,
    )


def _not_the_format(records: Sequence[Record]) -> ReplayFinding | None:
    """Texts that hold a verdict by the study's rule and none in the judge model's own format."""
    loose = [record for record in records if record.strict is False and record.resolved]
    if not loose:
        return None
    message = (
        f"{len(loose)} verdicts were read from texts that do not end in the judge's verdict format"
    )
    return _named("not-in-the-judges-format", message, loose)


def compare_files(files: Sequence[ForeignFile]) -> list[ReplayFinding]:
    """Return findings about several files together: the same file, or the same answers, under two
    names.
    """
    findings: list[ReplayFinding] = []
    for name, key, words in (
        ("identical-files", lambda file: file.data, "are the same file, byte for byte"),
        ("same-answers", _answers, "hold the same answers"),
    ):
        groups: dict[Any, list[str]] = defaultdict(list)
        for file in files:
            if (mark := key(file)) is not None:
                groups[mark].append(str(file.path))
        for paths in groups.values():
            if len(paths) > 1 and not any(set(paths) <= set(finding.items) for finding in findings):
                message = f"{' and '.join(paths)} {words}: they cannot be ranked as different"
                findings.append(ReplayFinding(name, message, len(paths), paths))
    return findings


def _answers(file: ForeignFile) -> str | None:
    """Hash of all answers of a file; None where it holds none."""
    answers = sorted(
        f"{record.id}\0{record.turn}\0{record.answer}" for record in file.records if record.answer
    )
    return text_hash("\1".join(answers)) if answers else None
