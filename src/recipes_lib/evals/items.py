"""What a judge is asked about: one answer, or a pair."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """One answer to grade (absolute), or a candidate's and its opponent's to compare (relative)."""

    name: str  # its id among the judgments
    instruction: str
    answer: str
    opponent: str | None = None
    reference: str | None = None  # by which an answer is graded
    question_id: str = ""  # of a suite's question
    sample: dict[str, Any] = field(default_factory=dict)  # what a suite's sample says beside it
    unanswered: str = ""  # why an answer is missing for good, so that there is nothing to judge
    probe: str = ""  # the kind of probe that it is

    @property
    def orders(self) -> tuple[str, ...]:
        """The orders it is judged in: the candidate is Response A in AB, Response B in BA."""
        return ("single",) if self.opponent is None else ("AB", "BA")

    def answers(self, order: str) -> tuple[str, ...]:
        """Return the answers as they stand in the prompt of an order."""
        if self.opponent is None:
            return (self.answer,)
        if order == "BA":
            return self.opponent, self.answer
        return self.answer, self.opponent
