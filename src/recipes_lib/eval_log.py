"""The evaluation log: what an evaluation of one target says, sample by sample.

Suites and the readers of other programs' files make samples; comparison, validity checks, reports
and replay read them. How a log lies on disk is known to `studies.eval_files` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ORDERS = ("AB", "BA")
SCORE = {"win": 1.0, "tie": 0.5, "loss": 0.0}

# the opponent of a result that was judged against the questions' own reference answers
REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer with what the judge, or the task's metric, made of it.

    Samples of one `id` (its turns) are not independent. `value` is 1, 0.5 or 0 for a pair, a grade,
    or a task's score; None where there is no verdict, and `outcome` is "unresolved" then.
    `verdicts` are what was said in order AB and BA (a grade alone in grading), or the status of the
    missing verdict; `raws` are the texts behind them. `lengths` are characters: the answer, then
    its opponent's. Texts are None where the files do not hold them; `shortened` says that they hold
    only the beginning of the answer.
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
    shortened: bool = False

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
        """Whether the judge named the same place in both orders, so that its verdict turned with
        the order.
        """
        return not self.by_rule and self.verdicts in (("A", "A"), ("B", "B"))

    def to_dict(self, metric: str) -> dict[str, Any]:
        """Return the sample as a line of items.jsonl, the file of an imported evaluation;
        `from_dict` reads it.
        """
        texts = {"instruction": self.input, "answer": self.answer, "opponent_answer": self.opponent}
        return {
            "metric": metric,
            "value": self.value,
            "outcome": self.outcome,
            "question_id": self.id,
            "turn": self.turn,
            "category": self.category,
            "verdicts": list(self.verdicts),
            "raws": list(self.raws),
            "lengths": list(self.lengths),
            **{name: text for name, text in texts.items() if text is not None},
            **{name: True for name in ("by_rule", "shortened") if getattr(self, name)},
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Sample:
        """Return a line of items.jsonl as a sample.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(
            id=str(row["question_id"]),
            turn=int(row.get("turn") or 1),
            category=row.get("category") or "all",
            value=None if row.get("value") is None else float(row["value"]),
            outcome=row["outcome"],
            verdicts=tuple(row.get("verdicts") or ()),
            by_rule=bool(row.get("by_rule")),
            lengths=tuple(row.get("lengths") or ()),
            input=row.get("instruction"),
            answer=row.get("answer"),
            opponent=row.get("opponent_answer"),
            raws=tuple(row.get("raws") or ()),
            shortened=bool(row.get("shortened")),
        )


@dataclass(frozen=True)
class Measure:
    """One metric of one evaluation: all its samples, or the reported value alone where there are
    none (groups of lm-eval tasks).
    """

    eval: str
    suite: str
    metric: str
    label: str
    samples: tuple[Sample, ...] = field(repr=False)
    file: Path
    opponent: str | None = None
    task: str = ""
    higher_is_better: bool | None = (
        True  # None where the files do not say it: nothing is ranked then
    )
    unit: str = "share"  # "share" (0..1), "grade" (1..5, or the scale in the label) or "number"
    reported: float | None = None
    reported_n: int | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What the same metric of another arm has too; the opponent is left out because it may be
        the other arm.
        """
        return self.eval, self.task, self.metric

    @property
    def name(self) -> str:
        """The key as one word, as findings name metrics: `alpaca_eval/win_rate`,
        `lm_eval/arc_easy/acc_norm`.
        """
        return "/".join(part for part in self.key if part)


@dataclass(frozen=True)
class EvalLog:
    """One evaluation of one target. `against` is None for a suite without an opponent; `result` is
    what its result file says.
    """

    eval: str
    suite: str
    against: str | None
    file: Path
    result: Mapping[str, Any] = field(repr=False)
    measures: tuple[Measure, ...] = ()

    @property
    def place(self) -> str:
        """The result file inside the runs folder: <run>/evals/<eval>/result.json."""
        return "/".join(self.file.parts[-4:])

    @property
    def imported(self) -> bool:
        """Whether the log was made of another program's files."""
        return self.result.get("measures") is not None
