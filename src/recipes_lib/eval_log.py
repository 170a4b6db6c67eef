"""The evaluation log: what an evaluation of one target says, sample by sample.

Suites and the readers of other programs' files make samples; comparison, validity checks, reports and replay read them. How a log lies
on disk is known to `studies.eval_files` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ORDERS = ("AB", "BA")
SCORE = {"win": 1.0, "tie": 0.5, "loss": 0.0}


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer with what the judge, or the task's metric, made of it.

    Samples of one `id` (its turns) are not independent. `value` is 1, 0.5 or 0 for a pair, a grade, or a task's score; None where there
    is no verdict, and `outcome` is "unresolved" then. `verdicts` are what was said in order AB and BA (a grade alone in grading), or the
    status of the missing verdict; `raws` are the texts behind them. `lengths` are characters: the answer, then its opponent's. Texts are
    None where the files do not hold them.
    """

    id: str
    turn: int = 1
    category: str = "all"
    value: float | None = None
    outcome: str = "unresolved"
    verdicts: tuple[str, ...] = ()
    by_rule: bool = False
    lengths: tuple[int, ...] = ()
    input: str | None = field(default=None, repr=False)
    answer: str | None = field(default=None, repr=False)
    opponent: str | None = field(default=None, repr=False)
    raws: tuple[str | None, ...] = field(default=(), repr=False)

    @property
    def key(self) -> tuple[str, int]:
        """What pairs this sample with the same one of another target."""
        return self.id, self.turn

    @property
    def resolved(self) -> bool:
        """Whether there is an outcome."""
        return self.outcome != "unresolved"

    @property
    def flip(self) -> bool:
        """Whether the judge named the same place in both orders, so that its verdict turned with the order."""
        return not self.by_rule and self.verdicts in (("A", "A"), ("B", "B"))


@dataclass(frozen=True)
class Measure:
    """One metric of one evaluation: all its samples, or the reported value alone where there are none (groups of lm-eval tasks)."""

    eval: str
    suite: str
    metric: str
    label: str
    samples: tuple[Sample, ...] = field(repr=False)
    file: Path
    opponent: str | None = None
    task: str = ""
    higher_is_better: bool | None = True  # None where the files do not say it: nothing is ranked then
    unit: str = "share"  # "share" (0..1), "grade" (1..5, or the scale in the label) or "number"
    reported: float | None = None
    reported_n: int | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What the same metric of another arm has too; the opponent is left out because it may be the other arm."""
        return self.eval, self.task, self.metric

    @property
    def name(self) -> str:
        """The key as one word, as findings name metrics: `alpaca_eval/win_rate`, `lm_eval/arc_easy/acc_norm`."""
        return "/".join(part for part in self.key if part)


@dataclass(frozen=True)
class EvalLog:
    """One evaluation of one target. `against` is None for a suite without an opponent; `result` is what its result file says."""

    eval: str
    suite: str
    against: str | None
    file: Path
    result: Mapping[str, Any] = field(repr=False)
    measures: tuple[Measure, ...] = ()

    @property
    def imported(self) -> bool:
        """Whether the log was made of another program's files."""
        return self.result.get("measures") is not None
