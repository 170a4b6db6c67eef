"""What is wrong with the answers of every arm: cut, looping, empty, one text for many questions;
and how long they are. Counted, side by side; `validity` says where it is too much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.wording import NONE, metric_text, plain_number

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
        lengths: dict[tuple[str | int, ...], int] = {}
        for log, _ in known:
            for item in (item for measure in log.measures for item in measure.samples):
                if item.lengths:
                    lengths[log.place, *item.key] = item.lengths[0]

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
