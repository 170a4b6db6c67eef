"""What a check says: a reason not to believe a comparison, and which of its rows it touches.

An `error` stops the sentences that it touches, never the table. A `confound` leaves a sentence and
takes its cause away. A `warning` stands in the list beside the sentences, and in a sentence only
where `claims.py` takes it up (`_remarks`). A `note` informs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from recipes_lib.analysis.table_row import TableRow
from recipes_lib.evals.log import EvalLog

Severity = Literal["error", "confound", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "confound", "warning", "note")
# The codes of findings that stand in the sentences that they touch.
UNAUDITED = "judge-not-audited"
EVALUATED_DIFFERENTLY = "evaluated-differently"
DEGENERATE_ANSWERS = "degenerate-answers"
REPEATED_QUESTIONS = "repeated-questions"


@dataclass(frozen=True)
class Finding:
    """Something about a comparison that a reader must know: a sentence, what was seen, what to do.

    `arms`, `metrics` and `opponent` are the rows it touches; empty means all of them. Several arms
    mean the rows between two of them, with `of_any` every row of any of them. Findings that are
    equal but for their evidence are told once, with the first one's.
    """

    code: str
    severity: Severity
    title: str
    evidence: tuple[str, ...] = field(default=(), compare=False)  # every seed may say the same
    remedy: str = ""
    arms: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    opponent: str = ""
    of_any: bool = False

    def touches(self, row: TableRow) -> bool:
        """Return whether it concerns a row: of several arms a row between them, or of any."""
        if self.metrics and row.metric not in self.metrics:
            return False
        if self.opponent and row.opponent != self.opponent:
            return False
        if not self.arms:
            return True
        arms = set(self.arms)
        least = 1 if self.of_any else min(2, len(arms))
        return len(arms.intersection(row.arms)) >= least


def metric_names(logs: Iterable[EvalLog]) -> tuple[str, ...]:
    """Return the names of all metrics of these results, each once."""
    return tuple(dict.fromkeys(name for log in logs for name in log.metric_names))
