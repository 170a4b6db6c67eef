"""One model's answers, as suites and judges read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from recipes_lib.core.files import hash_of
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.evals.log import AnswerFacts

Place = tuple[str, int]  # question, turn


@dataclass
class Answers:
    """One model's answers, by question and turn."""

    name: str  # the model's
    run: RunDirectory | None  # None for the outputs that come with the questions
    texts: dict[Place, str]
    facts: AnswerFacts  # who answered, and how
    cut: frozenset[Place] = frozenset()  # which reached the token limit
    # Why there will never be an answer: its text is empty, and it has no verdict. A server's or a
    # context's limit says nothing of what the model would have written.
    unanswered: Mapping[Place, str] = field(default_factory=dict)

    def text(self, place: Place) -> str | None:
        """Return the answer at a place, None where there will never be one."""
        return None if place in self.unanswered else self.texts[place]

    @property
    def digest(self) -> str:
        """Hash of all answers: equal for the same answers under two names."""
        return hash_of(sorted((*place, text) for place, text in self.texts.items()))

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be said of them beside a result."""
        if not self.unanswered:
            return ()
        counts = Counter(self.unanswered.values()).items()
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts)
        missing = f"{len(self.unanswered)} of {len(self.texts)} requests"
        return (f"{self.name} has no answer to {missing} ({reasons}): they have no verdict",)
