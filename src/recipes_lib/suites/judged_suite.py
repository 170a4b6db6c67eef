"""What suites that a judge decides share, from the words to the results: answers first, then one
judge for all of them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.run_lock import waiting_lock
from recipes_lib.eval_log import REFERENCE
from recipes_lib.generation.judges import OpenJudge
from recipes_lib.generation.subjects import Subject
from recipes_lib.generation.targets import Target, base_target, distinct, targets_by_word
from recipes_lib.judging.judge import Item
from recipes_lib.judging.store import JudgmentStore, Row
from recipes_lib.suites.answering import (
    AnswerSet,
    Pairing,
    answer_questions,
    answers_in_file,
    asking_of,
    is_answer_file,
    reference_answers,
)
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
from recipes_lib.suites.suite import Asker

_BASE = "base"


class JudgedSuite(Asker, ABC):
    """The targets of one eval recipe: `visit` lets each answer, `judge` has them judged, `conclude`
    returns the results.

    `wanted` are the targets whose results are made; None for all. `cards` are the judge's
    scorecards by target; `cards_elsewhere` those of the same judge in other evals.
    `counts_elsewhere` says whether other evals tell that the judge failed its audit here.

    Args:
        words: targets as typed: runs, models, `base`, or files with answers.
        against: `reference`, `base`, another target, or None for the suite's own choice.
        remote_code: whether the command line allowed code that ships with a model.

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
        self.against = against = self.opponent(against)
        self.words = list(dict.fromkeys(words))
        asked = [*self.words, *([against] if against else [])]
        asking = asking_of(recipe, remote_code)
        files = [word for word in asked if is_answer_file(word)]
        named = [word for word in asked if word not in files and word != REFERENCE]
        # before questions are fetched
        targets_by_word([word for word in named if word != _BASE], asking)
        self.chosen = self.questions()
        questions = self.chosen.questions
        self._from_files = {word: answers_in_file(Path(word), questions) for word in files}
        others = [word for word in self.words if word not in files]
        opponent = [against] if against in named and against != _BASE else []
        found = targets_by_word([*others, *opponent], asking)
        self._named = {word: found[word] for word in others}
        self._opponent_of: dict[str, Target] = {}
        if against == _BASE:
            self._opponent_of = {word: _base_of(word, self._named) for word in others}
        elif opponent:
            self._opponent_of = dict.fromkeys(others, found[opponent[0]])
        self._reference = reference_answers(questions) if against == REFERENCE else None
        super().__init__(distinct([*self._named.values(), *self._opponent_of.values()]))
        self.served = recipe.generation.engine == "openai"
        self.allow_format_differences = allow_format_differences
        self.wanted: set[str] | None = None
        self.cards: dict[str, dict[str, Any]] = {}
        self.cards_elsewhere: dict[str, list[dict[str, Any]]] = {}
        self.counts_elsewhere = True
        self._done: dict[str, AnswerSet] = {}

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

    def visit(self, subject: Subject) -> list[dict[str, Any]]:
        """Let one of `targets` answer what is missing.

        Raises:
            GenerationIncomplete: answers are missing.
        """
        answers = answer_questions(self.recipe, subject, self.chosen.questions)
        self._done[str(subject.target.identity)] = answers
        return []

    def drop(self, target: Target) -> None:
        """Leave a target out, and those that were to be compared with it."""
        super().drop(target)
        pairs = {word: (self._named.get(word), self._opponent_of.get(word)) for word in self.words}
        self.words = [
            word
            for word, pair in pairs.items()
            if not any(one and str(one.identity) == str(target.identity) for one in pair)
        ]

    def answers_of(self, target: Target) -> AnswerSet:
        """Return the answers of a target that was visited."""
        return self._done[str(target.identity)]

    def pairing(self) -> Pairing:
        """Return the answers of all targets and of their opponents.

        Raises:
            RecipeError: a file of answers is to be compared with its base.
        """
        targets: dict[str, AnswerSet] = {}
        opponents: dict[str, AnswerSet] = {}
        for word in self.words:
            answers = self._from_files.get(word) or self.answers_of(self._named[word])
            targets[answers.name] = answers
            if self._reference:
                opponents[answers.name] = self._reference
            elif self.against in self._from_files:
                opponents[answers.name] = self._from_files[self.against]
            elif word in self._opponent_of:
                opponents[answers.name] = self.answers_of(self._opponent_of[word])
            elif self.against:
                raise RecipeError(
                    f"'{word}' is a file of answers and has no base",
                    "name the opponent: --against RUN",
                )
        return Pairing(list(targets.values()), opponents)

    def judge(self, judge: OpenJudge) -> None:
        """Ask for every verdict that is missing, and audit the judge on them.

        Raises:
            RecipeError: models that were asked in different prompt formats would be compared.
            EvaluationIncomplete: judgments are missing.
        """
        self._pairing = self.pairing()
        if not self.allow_format_differences:
            check_formats(self._pairing)
        self._verdicts = self._judged(self._pairing, judge)
        self.cards = {name: scorecard(judge, mine) for name, mine in self._verdicts.items()}

    def conclude(
        self, judge: OpenJudge, others: Sequence[JudgedSuite] = ()
    ) -> list[dict[str, Any]]:
        """Return the results that are wanted, the files for reading written.

        Args:
            others: suites that the same judge judged: where it failed its audit there, its results
                here say so.
        """
        elsewhere = self.cards_elsewhere | {
            other.recipe.name: list(other.cards.values())
            for other in others
            if other.counts_elsewhere
        }
        return [
            self._result(answers, judge, elsewhere)
            for answers in self._pairing.targets
            if self.wanted is None or answers.name in self.wanted
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


def _base_of(word: str, named: Mapping[str, Target]) -> Target:
    """The base that a target is compared with; the base itself beside its runs is compared with
    itself, which is one half.

    Raises:
        RecipeError: the target is no adapter.
    """
    target = named[word]
    if target.trained is not None and target.recipe.lora is not None:
        return base_target(target.recipe)
    bases = [
        base_target(one.recipe)
        for one in named.values()
        if one.trained is not None and one.recipe.lora is not None
    ]
    if any(base.identity == target.identity for base in bases):
        return target
    raise RecipeError(
        f"'{word}' has no base of its own to be compared with",
        "name another run or model: --against OTHER",
    )
