"""One model's answers, as suites and judges read them."""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def digest(self) -> str:
        """Hash of all answers: equal for the same answers under two names."""
        return hash_of(sorted((*place, text) for place, text in self.texts.items()))
