"""One judged eval recipe (AlpacaEval, MT-Bench) from its words to its results: answers first, then one judge for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.atomic_files import write_text
from recipes_lib.errors import RecipeError
from recipes_lib.eval_log import REFERENCE
from recipes_lib.generation.judges import OpenJudge
from recipes_lib.generation.subjects import Subject
from recipes_lib.judging.store import JudgmentStore
from recipes_lib.runs.lock import waiting_lock
from recipes_lib.suites import alpaca_eval, mt_bench
from recipes_lib.suites.alpaca_library import is_alpaca_eval
from recipes_lib.suites.answering import Answering, AnswerSet, Pairing, check_target_words
from recipes_lib.suites.judged import Judged, ask_probes, banners, failed_elsewhere, judge_facts, judgments_file, scorecard
from recipes_lib.suites.mt_bench_figure import draw_grades
from recipes_lib.suites.questions import load_questions, no_reference
from recipes_lib.suites.recipe import EvalRecipe
from recipes_lib.suites.replay_numbers import replay_numbers


class JudgedSuite:
    """The targets of one eval recipe: `visit` lets each answer, `judge` has them judged, `conclude` turns the verdicts into `results`.

    `cards` are the judge's scorecards by target.

    Raises:
        RecipeError: a word is no target, mt_bench is asked for an opponent that it has not, or the library's length control is asked
            for other questions than its own.
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
        self.alpaca = recipe.suite.name == "alpaca_eval"
        against = against or (recipe.metrics.against if self.alpaca else None)
        if against == REFERENCE and not self.alpaca:
            raise RecipeError("mt_bench has no reference opponent", "compare with a model: --against base, or --against RUN")
        check_target_words(recipe, [*words, *([against] if against else [])], remote_code)  # before questions are fetched
        self.chosen = load_questions(recipe)
        if self.alpaca and recipe.metrics.length_controlled == "library":
            check_library_questions(recipe, [question.turns[0] for question in self.chosen.questions])
        self.answering = Answering(recipe, words, against, self.chosen.questions, remote_code)
        self.allow_format_differences = allow_format_differences
        self.cards: dict[str, dict[str, Any]] = {}
        self.results: list[dict[str, Any]] = []

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
            others: suites that the same judge judged: where it failed its audit there, its results here say so.
        """
        elsewhere = {other.recipe.name: list(other.cards.values()) for other in others}
        self.results = [self._result(answers, judge, elsewhere) for answers in self._pairing.targets]

    def _judged(self, pairing: Pairing, judge: OpenJudge) -> dict[str, Judged]:
        """All verdicts, and the probes of the first pair of models with each of them."""
        judged: dict[str, Judged] = {}
        probes: list[Any] = []
        suite: Any = alpaca_eval if self.alpaca else mt_bench
        for answers in pairing.targets:
            opponent = pairing.opponents.get(answers.name)
            folder = answers.folder(self.recipe.name)
            with waiting_lock(folder):
                judged[answers.name] = suite.judge_answers(self.recipe, self.chosen.questions, answers, opponent, judge)
                if opponent is not None and not probes:
                    pairs = suite.pair_items(self.chosen.questions, answers, opponent)
                    store = JudgmentStore(judgments_file(folder, opponent.name))
                    probes = ask_probes(pairs, judge, store, self.recipe.metrics.probe_pairs)
        for mine in judged.values():
            mine.probes = probes
        return judged

    def _result(self, answers: AnswerSet, judge: OpenJudge, elsewhere: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
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
        if self.alpaca:
            assert opponent is not None
            lines = alpaca_eval.samples(questions, answers, opponent, mine.rows)
            _write_samples(alpaca_eval.sample_file(answers.folder(recipe.name), "samples.jsonl", opponent), lines)
            whole = result | alpaca_eval.summary(recipe, questions, answers, opponent, judge, mine.rows)
            return whole | replay_numbers(whole, "alpaca_eval")
        mt_bench.write_fastchat(recipe, questions, answers, opponent, mine.rows, self.judge_file.path.stem)
        numbers = mt_bench.summary(questions, mine.rows)
        title = f"{answers.name}: {recipe.name}, judge {self.judge_file.path.stem}"
        draw_grades(numbers, answers.folder(recipe.name) / "figures" / "grades", title)
        # The store keeps every judgment there ever was; these are the ones behind the numbers.
        result |= {"judgment_keys": [row["key"] for row in mine.rows]}
        return result | numbers | replay_numbers(result | numbers, "mt_bench")


def check_library_questions(recipe: EvalRecipe, instructions: Sequence[str]) -> None:
    """Refuse the library's length-controlled rate for other questions than AlpacaEval's: a place in the list stands for a question there.

    Raises:
        RecipeError: they are others, fewer, or in another order.
    """
    if not is_alpaca_eval(instructions):
        what = (
            f"metrics.length_controlled: library is for AlpacaEval's 805 instructions in their order, and these {len(instructions)} are not"
        )
        raise recipe.error("metrics.length_controlled", what, "own (length term only) is for any questions")


def check_formats(pairing: Pairing) -> None:
    """Refuse to compare models that were asked in different prompt formats.

    Raises:
        RecipeError: naming the formats.
    """
    for answers in pairing.targets:
        opponent = pairing.opponents.get(answers.name)
        hashes = {one.prompt_format_hash for one in (answers, opponent) if one is not None and one.prompt_format_hash}
        if opponent is not None and len(hashes) > 1:
            raise RecipeError(
                f"{answers.name} is asked in prompt format {answers.prompt_format}, {opponent.name} in {opponent.prompt_format}",
                "the difference would be part of the result; insist with --allow-format-differences (recorded)",
            )


def twins(answers: AnswerSet, targets: Sequence[AnswerSet]) -> list[str]:
    """Return the line about another target with the same answers."""
    same = [other.name for other in targets if other.name != answers.name and other.digest == answers.digest]
    return [f"{answers.name} and {same[0]} gave the same answers: they are one model here and cannot be ranked"] if same else []


def _write_samples(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
