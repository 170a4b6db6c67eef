"""What suites that a judge decides share, from the words to the results: answers first, then one
judge for all of them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.run_lock import waiting_lock
from recipes_lib.generation.judges import OpenJudge
from recipes_lib.generation.subjects import Subject
from recipes_lib.judging.judge import Item
from recipes_lib.judging.store import JudgmentStore, Row
from recipes_lib.suites.answering import Answering, AnswerSet, Pairing, check_target_words
from recipes_lib.suites.judged import (
    Judged,
    ask_probes,
    banners,
    failed_elsewhere,
    judge_facts,
    judgments_file,
    scorecard,
)
from recipes_lib.suites.questions import QuestionSet, load_questions, no_reference
from recipes_lib.suites.recipe import EvalRecipe


class JudgedSuite(ABC):
    """The targets of one eval recipe: `visit` lets each answer, `judge` has them judged, `conclude`
    turns the verdicts into `results`.

    `cards` are the judge's scorecards by target.

    Raises:
        RecipeError: a word is no target, the suite has no such opponent, or several processes were
            launched.
        DataError: questions or answers in a file cannot be used.
    """

    def __init__(
        self,
        recipe: EvalRecipe,
        words: Sequence[str],
        against: str | None,
        allow_format_differences: bool = False,
        remote_code: bool = False,
    ) -> None:
        assert recipe.judge is not None
        self.recipe, self.judge_file = recipe, recipe.judge
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RecipeError(
                f"{recipe.suite.name} runs in one process",
                "several GPUs: serve the models (launch/vllm_server.sh) and use engine openai",
            )
        against = self.opponent(against)
        check_target_words(
            recipe, [*words, *([against] if against else [])], remote_code
        )  # before questions are fetched
        self.chosen = self.questions()
        self.answering = Answering(recipe, words, against, self.chosen.questions, remote_code)
        self.allow_format_differences = allow_format_differences
        self.cards: dict[str, dict[str, Any]] = {}
        self.results: list[dict[str, Any]] = []

    @abstractmethod
    def opponent(self, against: str | None) -> str | None:
        """Return who is compared with, given what the command line names.

        Raises:
            RecipeError: the suite has no such opponent.
        """

    def questions(self) -> QuestionSet:
        """Return the questions of the recipe."""
        return load_questions(self.recipe)

    @abstractmethod
    def pair_items(self, answers: AnswerSet, opponent: AnswerSet) -> list[Item]:
        """Return what is to be compared."""

    @abstractmethod
    def judge_answers(
        self, answers: AnswerSet, opponent: AnswerSet | None, judge: OpenJudge
    ) -> Judged:
        """Ask for all verdicts about one target."""

    @abstractmethod
    def numbers(
        self,
        result: Mapping[str, Any],
        answers: AnswerSet,
        opponent: AnswerSet | None,
        judge: OpenJudge,
        rows: Sequence[Row],
    ) -> dict[str, Any]:
        """Return the suite's numbers for one target, and write its files for reading; `result` is
        what every judged result holds.
        """

    @staticmethod
    @abstractmethod
    def table(results: Sequence[dict[str, Any]]) -> list[str]:
        """Return the lines of a table of results."""

    @property
    def targets(self) -> Any:
        """Who has to answer, opponents included."""
        return self.answering.targets

    @property
    def served(self) -> bool:
        """Whether a server has the models."""
        return self.answering.served

    def visit(self, subject: Subject) -> None:
        """Let one of `targets` answer.

        Raises:
            GenerationIncomplete: answers are missing.
        """
        self.answering.visit(subject)

    def judge(self, judge: OpenJudge) -> None:
        """Ask for every verdict that is missing, and audit the judge on them.

        Raises:
            RecipeError: models that were asked in different prompt formats would be compared.
            EvaluationIncomplete: judgments are missing.
        """
        self._pairing = self.answering.pairing()
        if not self.allow_format_differences:
            check_formats(self._pairing)
        self._verdicts = self._judged(self._pairing, judge)
        self.cards = {name: scorecard(judge, mine) for name, mine in self._verdicts.items()}

    def conclude(self, judge: OpenJudge, others: Sequence[JudgedSuite] = ()) -> None:
        """Fill `results` and write the files for reading.

        Args:
            others: suites that the same judge judged: where it failed its audit there, its results
                here say so.
        """
        elsewhere = {other.recipe.name: list(other.cards.values()) for other in others}
        self.results = [
            self._result(answers, judge, elsewhere) for answers in self._pairing.targets
        ]

    def _judged(self, pairing: Pairing, judge: OpenJudge) -> dict[str, Judged]:
        """All verdicts, and the probes of the first pair of models with each of them."""
        judged: dict[str, Judged] = {}
        probes: list[Any] = []
        for answers in pairing.targets:
            opponent = pairing.opponents.get(answers.name)
            folder = answers.folder(self.recipe.name)
            with waiting_lock(folder):
                judged[answers.name] = self.judge_answers(answers, opponent, judge)
                if opponent is not None and not probes:
                    pairs = self.pair_items(answers, opponent)
                    store = JudgmentStore(judgments_file(folder, opponent.name))
                    probes = ask_probes(pairs, judge, store, self.recipe.metrics.probe_pairs)
        for mine in judged.values():
            mine.probes = probes
        return judged

    def _result(
        self,
        answers: AnswerSet,
        judge: OpenJudge,
        elsewhere: Mapping[str, Sequence[dict[str, Any]]],
    ) -> dict[str, Any]:
        """Return one target's result, its files for reading written."""
        recipe, questions, mine = self.recipe, self.chosen.questions, self._verdicts[answers.name]
        opponent, card = self._pairing.opponents.get(answers.name), self.cards[answers.name]
        limit = recipe.metrics.max_identical_fraction
        facts = answers.to_dict(limit)
        result = {
            "target": answers.name,
            "against": opponent.name if opponent else None,
            "n": len(questions),
            "subset": self.chosen.subset,
            "banners": [
                *banners(answers, opponent, judge, card, self.chosen.subset, facts["answers"]),
                *failed_elsewhere(answers, judge, card, self.cards, elsewhere, recipe.name),
                *twins(answers, self._pairing.targets),
                *no_reference(self.chosen.missing_references),
            ],
            "answers": facts,
            "opponent": opponent.to_dict(limit) if opponent else None,
            "judge": judge_facts(judge),
            "audit": card,
            "missing_references": list(self.chosen.missing_references),
        }
        return result | self.numbers(result, answers, opponent, judge, mine.rows)


def check_formats(pairing: Pairing) -> None:
    """Refuse to compare models that were asked in different prompt formats.

    Raises:
        RecipeError: naming the formats.
    """
    for answers in pairing.targets:
        opponent = pairing.opponents.get(answers.name)
        hashes = {
            one.prompt_format_hash
            for one in (answers, opponent)
            if one is not None and one.prompt_format_hash
        }
        if opponent is not None and len(hashes) > 1:
            raise RecipeError(
                f"{answers.name} is asked in prompt format {answers.prompt_format}, {opponent.name}"
                f" in {opponent.prompt_format}",
                "the difference would be part of the result; insist with --allow-format-differences"
                " (recorded)",
            )


def twins(answers: AnswerSet, targets: Sequence[AnswerSet]) -> list[str]:
    """Return the line about another target with the same answers."""
    same = [
        other.name
        for other in targets
        if other.name != answers.name and other.digest == answers.digest
    ]
    return (
        [
            f"{answers.name} and {same[0]} gave the same answers: they are one model here and"
            " cannot be ranked"
        ]
        if same
        else []
    )
