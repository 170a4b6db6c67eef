"""What suites that a judge decides share, from the words to the logs: answers first, then one judge
for all of them, its audit with probes, and the banners above every result.
"""

from __future__ import annotations

import os
import queue
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.schema import COUNT, NUMBER
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.json_files import DamagedFile, read_object
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_lock import waiting_lock
from recipes_lib.core.terminal import warn
from recipes_lib.engine import Completion
from recipes_lib.eval_files import log_file
from recipes_lib.eval_log import (
    REFERENCE,
    AnswerFaults,
    EvalLog,
    JudgeFacts,
    Measure,
    Sample,
    Scorecard,
    StoredContradictions,
    no_reference,
)
from recipes_lib.eval_recipe import EvalRecipe
from recipes_lib.generation.answers import AnswerKey, Arrived
from recipes_lib.generation.judges import OpenJudge, opened, starts_late
from recipes_lib.generation.progress import Progress
from recipes_lib.generation.subjects import Subject
from recipes_lib.generation.targets import (
    Target,
    asking_of,
    base_target,
    distinct,
    targets_by_word,
)
from recipes_lib.judging.audit import audit, can_carry_probes, failures, probe_requests, self_judged
from recipes_lib.judging.judge import Item, JudgePlan, JudgeRequest, JudgeRun, ask, build_requests
from recipes_lib.judging.outcomes import StoredPairs
from recipes_lib.judging.store import JudgmentStore, Row
from recipes_lib.statistics.intervals import Interval, StoredInterval
from recipes_lib.suites.answering import (
    AnswerSet,
    Pairing,
    answer_questions,
    answers_in_file,
    reference_answers,
)
from recipes_lib.suites.questions import Question, QuestionSet, is_answer_file, load_questions
from recipes_lib.suites.suite import Asker, Suite
from recipes_lib.weights.merge import RECORD as MERGE_RECORD

_BASE = "base"
_PERCENT: JsonSchema = {**NUMBER, "minimum": 0, "maximum": 100}
JUDGED_NUMBERS: dict[str, JsonSchema] = {  # key of a result -> its schema
    "n": COUNT,
    "judge": {},
    "audit": {},
    "answers": {
        "required": ["answers"],
        "properties": {
            "answers": {
                "type": "object",
                "required": ["n", "empty", "cut", "identical"],
                "properties": {
                    "cut": COUNT,
                    "identical": {"required": ["count", "share", "text", "flagged"]},
                },
            }
        },
    },
    "recorded": {
        "description": "The outcome under judge_replay's keys: percent of resolved pairs, mean"
        " grade; n is resolved pairs, or graded turns.",
        "type": "object",
        "required": ["win", "loss", "tie", "n", "mean_score", "mean_score_interval", "scale"],
        "properties": {
            **dict.fromkeys(("win", "loss", "tie"), _PERCENT),
            "n": COUNT,
            "mean_score": NUMBER,
            "scale": {"type": ["string", "null"]},
        },
    },
    "unparsed": {
        "description": "Judgments that were asked and gave no verdict, whatever the reason.",
        "type": "object",
        "required": ["count", "share"],
        "properties": {"count": COUNT, "share": {"type": "number", "minimum": 0, "maximum": 1}},
    },
    "contradictions": {
        "type": "object",
        "required": ["n", "decidable", "count", "for_first", "rate", "interval", "direction"],
    },
    "order": {
        "description": "flips: pairs whose two orders named different answers.",
        "type": "object",
        "required": ["judged", "flips", "flip_rate", "interval"],
        "properties": {
            "judged": {"enum": ["both", "single-answer"]},
            "flips": {"type": ["integer", "null"], "minimum": 0},
        },
    },
    "bounds": {
        "description": "The number if everything without a verdict were lost (lowest grade), and"
        " won (highest).",
        "type": "object",
        "required": ["of", "all_lost", "all_won"],
        "properties": {
            "of": {"enum": ["win percent", "mean score"]},
            "all_lost": NUMBER,
            "all_won": NUMBER,
        },
    },
}
_SAME_ANSWERS = "{} and {} gave the same answers: they are one model here and cannot be ranked"

FEWEST_LABELS = 20

FEWEST_LABELS = 20

FEWEST_LABELS = 20


class ScaledInterval(StoredInterval):
    """A mean grade as a result holds it; `questions` where each of several answers was graded."""

    scale: str
    questions: NotRequired[int]


class GradeBounds(TypedDict):
    """A mean grade if every turn without a grade had got 1, or 5."""

    all_1: float | None
    all_5: float | None


class MeanGrade(ScaledInterval):
    """MT-Bench's mean grade as a result holds it; `doubled_2_10` is not an MT-Bench score."""

    turns: int
    without_grade: int
    bounds: GradeBounds
    doubled_2_10: float | None


class JudgedNumbers(TypedDict):
    """What the numbers of every judged suite have: `pairs` where there is an opponent, MT-Bench's
    `score`, and AlpacaEval's `mean_score` where it was asked for.
    """

    pairs: StoredPairs | None
    score: NotRequired[MeanGrade]
    mean_score: NotRequired[ScaledInterval | None]


class _Recorded(TypedDict):
    """The outcome: percent of the resolved pairs (n) for a comparison, and the mean grade (n graded
    turns) for MT-Bench.
    """

    win: float | None
    loss: float | None
    tie: float | None
    n: int
    mean_score: float | None
    mean_score_interval: list[float | None] | None
    scale: str | None


class _Order(TypedDict):
    """In which orders the judge was asked, and how often the second order changed the winner."""

    judged: str
    flips: int | None
    flip_rate: float | None
    interval: list[float | None] | None


class _Unparsed(TypedDict):
    """Judgments that were asked and gave no verdict."""

    count: int
    share: float


class _Bounds(TypedDict):
    """The number if everything without a verdict were lost, and won."""

    of: str
    all_lost: float | None
    all_won: float | None


class ReplayNumbers(TypedDict):
    """A result's numbers under the keys of `recipes judge replay --json`."""

    recorded: _Recorded
    unparsed: _Unparsed
    contradictions: StoredContradictions
    order: _Order
    bounds: _Bounds


@dataclass(frozen=True)
class ToJudge:
    """Items that are judged alike and stored in one file; `name` is shown with the progress."""

    items: Sequence[Item]
    plan: JudgePlan
    file: Path
    name: str


class JudgedSuite(Suite, ABC):
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
        self.against = against = recipe.opponent(against)
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
        Asker.__init__(self, distinct([*self._named.values(), *self._opponent_of.values()]))
        self.served = recipe.generation.engine == "openai"
        self.allow_format_differences = allow_format_differences
        self.wanted: set[str] | None = None
        self.cards: dict[str, Scorecard] = {}
        self.cards_elsewhere: dict[str, list[Scorecard]] = {}
        self.counts_elsewhere = True
        self._done: dict[str, AnswerSet] = {}

    def questions(self) -> QuestionSet:
        """Return the questions of the recipe."""
        return load_questions(self.recipe)

    def win_rate(
        self, told: StoredPairs, pairs: Sequence[Sample], file: Path, opponent: AnswerSet
    ) -> Measure:
        """Return the win rate as a metric of the log."""
        return Measure(
            self.recipe.name,
            self.recipe.suite.name,
            "win_rate",
            f"{self.TITLE} win rate",
            tuple(pairs),
            file,
            opponent.name,
            reported=told["score"]["estimate"],
            reported_n=told["n"],
        )

    def mean_grade(self, told: StoredInterval, grades: Sequence[Sample], file: Path) -> Measure:
        """Return the mean grade as a metric of the log."""
        return Measure(
            self.recipe.name,
            self.recipe.suite.name,
            "grade",
            f"{self.TITLE} mean grade, 1-5",
            tuple(grades),
            file,
            unit="grade",
            reported=told["estimate"],
            reported_n=told["n"],
        )

    @abstractmethod
    def pair_items(
        self, questions: Sequence[Question], answers: AnswerSet, opponent: AnswerSet
    ) -> list[Item]:
        """Return what is to be compared."""

    @abstractmethod
    def to_judge(
        self,
        questions: Sequence[Question],
        answers: AnswerSet,
        opponent: AnswerSet | None,
        judge: OpenJudge,
    ) -> Iterator[ToJudge]:
        """Yield what the judge is asked about one target's answers to these questions; without an
        opponent what needs none.
        """

    @abstractmethod
    def numbers(
        self,
        answers: AnswerSet,
        opponent: AnswerSet | None,
        judge: OpenJudge,
        rows: Sequence[Row],
        file: Path,
    ) -> tuple[JudgedNumbers, list[Measure]]:
        """Return the suite's numbers for one target with the samples behind them, and write its
        files for reading.

        Args:
            rows: the judgments of this target.
            file: where the result will be.
        """

    def visit(self, subject: Subject) -> list[EvalLog]:
        """Let one of `targets` answer what is missing.

        Raises:
            GenerationIncomplete: answers are missing.
        """
        with self._judged_meanwhile(subject) as arrived:
            answers = answer_questions(self.recipe, subject, self.chosen.questions, arrived)
        self._done[str(subject.target.identity)] = answers
        return []

    def _judged_meanwhile(self, subject: Subject) -> AbstractContextManager[Arrived]:
        """Have a judge behind an address judge what is answered while the rest is written; one that
        takes the memory of the model that answers waits for it to end.
        """
        targets = [self._named[word] for word in self.words if word in self._named]
        asked = any(str(one.identity) == str(subject.target.identity) for one in targets)
        wanted = asked and (self.wanted is None or subject.name in self.wanted)
        judge = self.judge_file.judge
        if judge.engine != "openai" or starts_late(judge) or not wanted:
            return nullcontext(lambda place, answer: None)
        opponent = self._reference or self._from_files.get(str(self.against))
        return Meanwhile(self, subject, opponent).judging()

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
        self._rows, probes = self._judged(self._pairing, judge)
        self.cards = {
            name: audit([*rows, *probes], judge.file.thresholds, None, judge.file.judge.weak)
            for name, rows in self._rows.items()
        }

    def conclude(self, judge: OpenJudge, others: Sequence[JudgedSuite] = ()) -> list[EvalLog]:
        """Return the logs that are wanted, the files for reading written.

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
            self._log(answers, judge, elsewhere)
            for answers in self._pairing.targets
            if self.wanted is None or answers.name in self.wanted
        ]

    def _judged(self, pairing: Pairing, judge: OpenJudge) -> tuple[dict[str, list[Row]], list[Row]]:
        """All verdicts by target, and the probes of the first pair of models."""
        judged: dict[str, list[Row]] = {}
        probes: list[Row] = []
        for answers in pairing.targets:
            opponent = pairing.opponents.get(answers.name)
            folder = answers.folder(self.recipe.name)
            with waiting_lock(folder):
                questions, rows = self.chosen.questions, judged.setdefault(answers.name, [])
                stores: dict[Path, JudgmentStore] = {}
                for one in self.to_judge(questions, answers, opponent, judge):
                    if one.file not in stores:
                        stores[one.file] = JudgmentStore(one.file)
                    rows += judge_all(one.items, judge, one.plan, stores[one.file], one.name)
                if opponent is not None and not probes:
                    pairs = self.pair_items(questions, answers, opponent)
                    store = JudgmentStore(judgments_file(folder, opponent.name))
                    probes = ask_probes(pairs, judge, store, self.recipe.metrics.probe_pairs)
        return judged, probes

    def _log(
        self,
        answers: AnswerSet,
        judge: OpenJudge,
        elsewhere: Mapping[str, Sequence[Scorecard]],
    ) -> EvalLog:
        """Return one target's log, its files for reading written."""
        recipe, card = self.recipe, self.cards[answers.name]
        opponent = self._pairing.opponents.get(answers.name)
        facts, theirs = (
            one.facts(recipe.metrics.max_identical_fraction) if one else None
            for one in (answers, opponent)
        )
        assert facts is not None and facts.answers is not None and answers.run is not None
        against = opponent.name if opponent else None
        file = log_file(answers.run.path, recipe.name, against)
        rows = self._rows[answers.name]
        numbers, measures = self.numbers(answers, opponent, judge, rows, file)
        twins = [
            other.name
            for other in self._pairing.targets
            if other.name != answers.name and other.digest == answers.digest
        ]
        models = [*answers.models, *(opponent.models if opponent else ())]
        banners = [
            card["banner"],
            self_judged(judge.file.judge.model, models),
            *answer_banners(answers, opponent, facts.answers),
            self.chosen.subset,
            *failed_elsewhere(answers, judge, card, self.cards, elsewhere, recipe.name),
            *(_SAME_ANSWERS.format(answers.name, twin) for twin in twins[:1]),
            *no_reference(self.chosen.missing_references),
            few_labels(recipe.data.labels, measures[0].samples),
        ]
        return EvalLog(
            suite=recipe.suite.name,
            eval=recipe.name,
            target=answers.name,
            against=against,
            n=len(self.chosen.questions),
            subset=self.chosen.subset,
            banners=[line for line in banners if line],
            answers=facts,
            opponent=theirs,
            judge=judge_facts(judge),
            audit=card,
            missing_references=list(self.chosen.missing_references),
            numbers={**numbers, **replay_numbers(numbers, card)},
            measures=tuple(measures),
            file=file,
        )


class Meanwhile:
    """Judges one target's answers while they arrive, question by question. What it stores nobody
    asks again; whatever keeps it from judging is met by the judging after the answers, and told
    there.
    """

    def __init__(self, suite: JudgedSuite, subject: Subject, opponent: AnswerSet | None) -> None:
        self.suite, self.opponent = suite, opponent
        self.answers = AnswerSet(subject.name, subject.run, {})
        self.open = {
            one.id: (one, len(one.turns) * suite.recipe.generation.samples)
            for one in suite.chosen.questions
        }
        self._arrived: queue.SimpleQueue[tuple[AnswerKey, Completion] | None] = queue.SimpleQueue()
        self._reached, self._ended = threading.Event(), threading.Event()

    @contextmanager
    def judging(self) -> Iterator[Arrived]:
        """Give what takes an answer; afterwards nothing more is asked, and what was asked is
        stored.
        """
        thread = threading.Thread(target=self._judge, daemon=True)
        thread.start()
        try:
            yield lambda place, answer: self._arrived.put((place, answer))
        except BaseException:
            self._end()
            raise
        self._end()
        if self._reached.is_set():
            thread.join()

    def _end(self) -> None:
        self._ended.set()
        self._arrived.put(None)

    def _judge(self) -> None:
        stores: dict[Path, JudgmentStore] = {}
        with suppress(Exception), opened(self.suite.judge_file) as judge:
            judge.reach()
            self._reached.set()
            while not self._ended.is_set():
                questions = self._answered()
                ids = {one.id for one in questions}
                rows = {key: row for key, row in self.answers.rows.items() if key[0] in ids}
                answers = replace(self.answers, rows=rows)
                for one in self.suite.to_judge(questions, answers, self.opponent, judge):
                    if one.file not in stores:
                        stores[one.file] = JudgmentStore(one.file)
                    requests = build_requests(one.items, one.plan, judge.fingerprint)
                    going = takewhile(lambda _: not self._ended.is_set(), requests)
                    ask(going, judge, stores[one.file], one.plan)

    def _answered(self) -> list[Question]:
        """Wait for an answer, take all that are there, and return the questions they complete."""
        item = self._arrived.get()
        while item is not None:
            (question, turn, draw), answer = item
            self.answers.rows[question, turn, draw] = answer
            item = None if self._arrived.empty() else self._arrived.get()
        answered = Counter(question for question, _, _ in self.answers.rows)
        whole = [one for one, number in self.open.values() if answered[one.id] == number]
        for one in whole:
            del self.open[one.id]
        return whole


def few_labels(file: str | None, samples: Sequence[Sample]) -> str | None:
    """Return a line about a file of human labels that has too few of these answers."""
    n = len({one.input for one in samples if one.human is not None and one.resolved})
    if file is None or n >= FEWEST_LABELS:
        return None
    return (
        f"{file} has human labels of answers to {n} of these questions, and {FEWEST_LABELS} are"
        " needed: the win rate is the judge's alone"
    )


def judge_all(
    items: Sequence[Item], judge: OpenJudge, plan: JudgePlan, store: JudgmentStore, name: str
) -> list[Row]:
    """Ask what is missing and return all rows of these items.

    Raises:
        EvaluationIncomplete: judgments are missing; the same command continues.
    """
    requests = list(build_requests(items, plan, judge.fingerprint))
    return _ask_all(requests, judge, plan, store, f"judgments {name}")


def ask_probes(
    items: Sequence[Item], judge: OpenJudge, store: JudgmentStore, number: int
) -> list[Row]:
    """Put the degenerate probes of a few pairs before the judge, and return their rows."""
    plan = replace(judge.plan("relative"), rules=False)
    different = list(filter(can_carry_probes, items))
    requests = list(probe_requests(different[:number], plan, judge.fingerprint))
    return _ask_all(requests, judge, plan, store, "probes") if requests else []


def _ask_all(
    requests: Sequence[JudgeRequest],
    judge: OpenJudge,
    plan: JudgePlan,
    store: JudgmentStore,
    what: str,
) -> list[Row]:
    """Ask what is missing, with progress, and return the rows of the requests."""
    progress = Progress(what, sum(request.key not in store for request in requests))

    def count(run: JudgeRun) -> None:
        progress.add(run.asked + run.by_rule + run.failed.total - progress.done)

    try:
        ask(iter(requests), judge, store, plan, count).check_complete()
    finally:
        progress.close()
    return [row for request in requests if (row := store.get(request.key))]


def judgments_file(folder: Path, against: str) -> Path:
    """Return the file of judgments against one opponent: each has its own, because they judge the
    same answers.
    """
    return folder / (
        "judgments.jsonl" if against == "reference" else f"judgments.against-{against}.jsonl"
    )


def sample_file(folder: Path, name: str, opponent: AnswerSet | None) -> Path:
    """Return samples/<name>, with the opponent in the name unless it is the reference."""
    path = folder / "samples" / name
    if opponent is None or opponent.name == REFERENCE or name == "model_outputs.json":
        return path
    return path.with_name(f"{path.stem}.against-{opponent.name}{path.suffix}")


def judge_facts(judge: OpenJudge) -> JudgeFacts:
    """Return what a log says about the judge."""
    section = judge.file.judge
    merged = Path(section.model) / MERGE_RECORD  # a judge that is one of our runs, merged
    return JudgeFacts(
        name=judge.file.path.stem,
        fingerprint=judge.fingerprint,
        model=section.model,
        revision=section.revision,
        engine=section.engine,
        mode=section.mode,
        prompt_style=section.prompt_style,
        temperature=section.temperature,
        max_new_tokens=section.max_new_tokens,
        max_context_tokens=section.max_context_tokens,
        weak=section.weak,
        weights=judge.weights,
        run=read_object(merged).get("run"),
    )


def failed_elsewhere(
    answers: AnswerSet,
    judge: OpenJudge,
    card: Scorecard,
    targets: Mapping[str, Scorecard],
    evals: Mapping[str, Sequence[Scorecard]],
    eval_name: str,
) -> list[str]:
    """Return the line about a judge that fails no check here and failed its audit on another target
    or in another eval.

    Args:
        card: the scorecard of this result.
        targets: the scorecards of this eval by target.
        evals: scorecards of this judge in evals that were made together with this one; earlier
            results of the run are read.
        eval_name: this evaluation's folder.
    """
    if failures(card):
        return []
    found = {f"on {name}": failures(other) for name, other in targets.items()}
    found |= {
        f"in {name}": next(filter(None, map(failures, cards)), []) for name, cards in evals.items()
    }
    for path in sorted(answers.folder(eval_name).parent.glob("*/result*.json")):
        if path.parent.name != eval_name and f"in {path.parent.name}" not in found:
            stored = _earlier(path)
            if (stored.get("judge") or {}).get("fingerprint") == judge.fingerprint:
                found[f"in {path.parent.name}"] = failures(stored["audit"])
    for path in sorted(runs_root().glob("judge--*/*/judge_audit.json")):
        stored = _earlier(path)
        if stored.get("judge") == judge.fingerprint:
            found[f"on labelled pairs ({path.parent.name})"] = failures(cast(Scorecard, stored))
    failed = next(((where, checks) for where, checks in found.items() if checks), None)
    return (
        [
            f"This judge failed its audit {failed[0]}: {'; '.join(failed[1])}. Its verdicts are not"
            " evidence."
        ]
        if failed
        else []
    )


def _earlier(path: Path) -> dict[str, Any]:
    """An earlier result; a damaged one says nothing about the judge, and must not stop an
    evaluation that has been paid for.
    """
    try:
        return read_object(path)
    except DamagedFile as error:
        warn(f"{str(error).splitlines()[0]}; left out")
        return {}


def answer_banners(
    answers: AnswerSet, opponent: AnswerSet | None, faults: AnswerFaults
) -> list[str]:
    """Return the lines about the answers themselves: the same answers twice, one answer for many
    questions, cut, empty and looping ones.
    """
    lines = []
    if opponent is not None and opponent.digest == answers.digest:
        lines.append(_SAME_ANSWERS.format(answers.name, opponent.name))
    if faults.identical.flagged:
        lines.append(f"{faults.identical.count} of {faults.n} prompts got one and the same answer")
    for count, text in (
        (faults.empty, "are empty"),
        (faults.cut or 0, "reached max_new_tokens and are cut"),
        (faults.loops or 0, "end in a loop, one phrase three times"),
    ):
        if count > 0.1 * faults.n:
            lines.append(f"{count} of {faults.n} answers {text}")
    return lines


def within_scale(interval: Interval) -> ScaledInterval:
    """Return an interval of a mean grade with its limits cut to the scale 1-5: with few items they
    would lie outside.
    """
    return {**interval.within(1.0, 5.0).to_dict(), "scale": "1-5"}


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


def _base_of(word: str, named: Mapping[str, Target]) -> Target:
    """The base that a target is compared with; the base itself beside its runs is compared with
    itself, which is one half.
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


def replay_numbers(numbers: JudgedNumbers, card: Scorecard) -> ReplayNumbers:
    """Return recorded, unparsed, contradictions, order and bounds under the keys that `recipes
    judge replay --json` uses, so that one program reads both.
    """
    pairs, score = numbers["pairs"], numbers.get("score")
    grade = score or numbers.get("mean_score")
    resolved = pairs["n"] - pairs["unresolved"] if pairs else 0
    win, loss, tie = (
        100 * count / resolved if resolved else None
        for count in ((pairs["win"], pairs["loss"], pairs["tie"]) if pairs else (0, 0, 0))
    )
    recorded: _Recorded = {
        "win": win,
        "loss": loss,
        "tie": tie,
        "n": resolved if score is None else score["n"],
        "mean_score": grade["estimate"] if grade else None,
        "mean_score_interval": [grade["low"], grade["high"]] if grade else None,
        "scale": "1..5" if grade else None,
    }
    if score is None:
        assert pairs is not None
        shares = (pairs["win_bounds"]["all_lost"], pairs["win_bounds"]["all_won"])
        lost, won = (None if share is None else 100 * share for share in shares)
        bounds: _Bounds = {"of": "win percent", "all_lost": lost, "all_won": won}
    else:
        lost, won = score["bounds"]["all_1"], score["bounds"]["all_5"]
        bounds = {"of": "mean score", "all_lost": lost, "all_won": won}
    missing = card["asked"] - card["statuses"].get("ok", 0)
    return {
        "recorded": recorded,
        "unparsed": {"count": missing, "share": missing / card["asked"] if card["asked"] else 0.0},
        "contradictions": card["contradictions"],
        "order": _order(pairs),
        "bounds": bounds,
    }


def _order(pairs: StoredPairs | None) -> _Order:
    if not pairs:
        return {"judged": "single-answer", "flips": None, "flip_rate": None, "interval": None}
    same = pairs["swap_consistency"]
    if same["estimate"] is None:
        return {"judged": "both", "flips": 0, "flip_rate": None, "interval": [None, None]}
    rate = 1 - same["estimate"]
    limits = [None if share is None else 1 - share for share in (same["high"], same["low"])]
    flips = round(same["n"] * rate)
    return {"judged": "both", "flips": flips, "flip_rate": rate, "interval": limits}
