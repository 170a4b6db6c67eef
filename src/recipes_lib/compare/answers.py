"""What is wrong with the answers of every arm: cut, looping, empty, one text for many questions;
and how long they are. Counted, side by side and paired; `validity` says where it is too much.

The differences are described and not tested: a test of each would leave less for the primary
question, and shares that matter stop the sentences they touch in any case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.row import PairedItems
from recipes_lib.compare.wording import (
    NONE,
    difference_text,
    interval_text,
    metric_text,
    plain_number,
)
from recipes_lib.eval_files import stored_answers
from recipes_lib.eval_log import EvalLog, ends_in_loop

ANSWER_FAULTS = {"cut": "cut", "loops": "in a loop", "empty": "empty", "same": "one and the same"}
ANSWERS_HEAD = ("answers", *ANSWER_FAULTS.values(), "characters, mean")


@dataclass(frozen=True, kw_only=True)
class AnswerCounts:
    """The answers of one arm in one evaluation, over all its seeds. `cut` and `loops` are None
    where a file does not tell; `same` counts the most frequent answer of each seed where there are
    two of it, `characters` is the mean length.
    """

    arm: str
    eval: str
    n: int
    cut: int | None
    loops: int | None
    empty: int
    same: int
    characters: float | None
    file: str

    def share(self, fault: str) -> float | None:
        """Return the share of answers that have one of `ANSWER_FAULTS`."""
        count = getattr(self, fault)
        return None if count is None or not self.n else count / self.n

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of a table, without arm and evaluation: n, `ANSWER_FAULTS`, mean length."""
        shares = [
            NONE if share is None else f"{getattr(self, fault)} ({metric_text(share, 'share')})"
            for fault in ANSWER_FAULTS
            for share in [self.share(fault)]
        ]
        return f"{self.n:,}", *shares, plain_number(self.characters, 0)


@dataclass(frozen=True, kw_only=True)
class AnswerDifference:
    """What two arms' shares of one of `ANSWER_FAULTS` differ by, first minus second, paired by
    question.
    """

    first: str
    second: str
    eval: str
    fault: str
    difference: float
    low: float | None
    high: float | None
    questions: int

    @property
    def text(self) -> str:
        """The difference with its interval."""
        return f"{difference_text(self.difference, 'share')} {self.limits}".removesuffix(f" {NONE}")

    @property
    def limits(self) -> str:
        """Its interval as text."""
        return interval_text(self.low, self.high, "share")

    @property
    def what(self) -> str:
        """What is wrong with the answers, in words."""
        return ANSWER_FAULTS[self.fault]


def count_answers(measurements: Measurements) -> list[AnswerCounts]:
    """Return the counts of every arm and evaluation, evaluation by evaluation."""
    found = [counts for name in measurements.arms for counts in _of_arm(measurements, name)]
    order = list(dict.fromkeys(one.eval for one in found))
    return sorted(found, key=lambda one: order.index(one.eval))


def _of_arm(measurements: Measurements, arm: str) -> Iterator[AnswerCounts]:
    runs = measurements.arms[arm].runs
    for name in dict.fromkeys(log.eval for run in runs for log in run.evals):
        # of several comparisons of one run the first: the answers are the same
        logs = [next((log for log in run.evals if log.eval == name), None) for run in runs]
        known = [(log, log.answers.answers) for log in logs if log and log.answers.answers]
        if not known:
            continue
        lengths = {
            (log.place, *item.key): item.lengths[0]
            for log, _ in known
            for measure in log.measures
            for item in measure.samples
            if item.lengths
        }

        def total(counts: list[int | None]) -> int | None:
            return None if None in counts else sum(filter(None, counts))

        yield AnswerCounts(
            arm=arm,
            eval=name,
            n=sum(faults.n for _, faults in known),
            cut=total([faults.cut for _, faults in known]),
            loops=total([faults.loops for _, faults in known]),
            empty=sum(faults.empty for _, faults in known),
            same=sum(faults.identical.count for _, faults in known),
            characters=sum(lengths.values()) / len(lengths) if lengths else None,
            file=known[0][0].place,
        )


_Faults = Mapping[tuple[str, int, int], Mapping[str, bool | None]]  # by item


def compare_answers(
    measurements: Measurements, pairs: Sequence[tuple[str, str]]
) -> list[AnswerDifference]:
    """Return the differences of two arms' shares of faulty answers, where either has one."""
    known: dict[tuple[str, str], list[_Faults]] = {}
    for name, arm in measurements.arms.items():
        for run in arm.runs:
            for log in {log.eval: log for log in reversed(run.evals)}.values():
                if log.answers.answers and (faults := _faults(log)):
                    known.setdefault((name, log.eval), []).append(faults)
    evals = dict.fromkeys(name for _, name in known)
    return [
        found
        for pair in pairs
        for name in evals
        if (pair[0], name) in known and (pair[1], name) in known
        for fault in ANSWER_FAULTS
        if (found := _difference(pair, name, fault, *(known[arm, name] for arm in pair)))
    ]


def _faults(log: EvalLog) -> _Faults:
    """What is wrong with each answer behind a log."""
    answers = stored_answers(log)
    texts = Counter(text.strip() for text, _ in answers.values())
    ((most, times),) = texts.most_common(1) or [("", 0)]
    return {
        key: {
            "cut": cut,
            "loops": ends_in_loop(text),
            "empty": not text.strip(),
            "same": times > 1 and text.strip() == most,
        }
        for key, (text, cut) in answers.items()
    }


def _difference(
    pair: tuple[str, str], name: str, fault: str, mine: Sequence[_Faults], other: Sequence[_Faults]
) -> AnswerDifference | None:
    """One difference, over the items that all runs of both arms answered; None where a file does
    not tell the fault, or nobody has it.
    """
    if len(mine) != len(other) and 1 not in (len(mine), len(other)):
        mine, other = (each[: min(len(mine), len(other))] for each in (mine, other))
    turned = len(mine) < len(other)  # one row stands second, beside every seed
    if turned:
        mine, other = other, mine
    items = [key for key in mine[0] if all(key in run for run in (*mine, *other))]
    shares = [[[run[key][fault] for key in items] for run in each] for each in (mine, other)]
    if any(one is None for each in shares for run in each for one in run):
        return None
    first, second = (np.array(each, dtype=float) for each in shares)
    if not items or not (first.any() or second.any()):
        return None
    tested = PairedItems(first, second, [key[:2] for key in items], (0.0, 1.0), 1.0).tested()
    difference, low, high = tested.effect or 0.0, tested.low, tested.high
    if turned:
        difference = -difference
        low, high = (None if end is None else -end for end in (high, low))
    return AnswerDifference(
        first=pair[0],
        second=pair[1],
        eval=name,
        fault=fault,
        difference=difference,
        low=low,
        high=high,
        questions=tested.questions,
    )
