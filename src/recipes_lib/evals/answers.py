"""One model's answers to a suite's questions, kept in generations.jsonl: only what is missing is
asked. Answers in files are answers too.

An answer's key covers question, turn, draw, prompt, sampling, seed, weights and prompt format: a
larger number of draws later asks only for the new ones.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import Row, hash_of
from recipes_lib.core.lock import waiting_lock
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.data.conversations import Message
from recipes_lib.evals.engine import (
    MAX_FAILURES_IN_A_ROW,
    Completion,
    Engine,
    EvaluationIncomplete,
    Failures,
    Request,
    Sampling,
)
from recipes_lib.evals.log import REFERENCE, AnswerFacts, AnswerFaults, Store
from recipes_lib.evals.models import Model
from recipes_lib.evals.questions import TEMPERATURES, Question, read_answer_file
from recipes_lib.evals.recipe import EvalRecipe

Place = tuple[str, int, int]  # question, turn, and which of several answers: its draw


@dataclass
class Answers:
    """One model's answers, by question, turn and draw. `run` is None for the outputs that come with
    the questions.
    """

    name: str
    run: RunDirectory | None
    rows: dict[Place, Completion]
    facts: AnswerFacts = field(default_factory=AnswerFacts)

    def text(self, question: str, turn: int = 1, draw: int = 1) -> str:
        """Return one answer; of a model that answered once, the one there is."""
        return self.rows[question, turn, min(draw, self.draws)].text

    def is_cut(self, question: str, turn: int = 1, draw: int = 1) -> bool:
        """Whether an answer reached the token limit."""
        return self.rows[question, turn, min(draw, self.draws)].finish_reason != "stop"

    @cached_property
    def draws(self) -> int:
        """How many answers there are to each question."""
        return max((draw for _, _, draw in self.rows), default=1)

    @property
    def digest(self) -> str:
        """Hash of all answers: equal for the same answers under two names."""
        return hash_of(sorted((*place, done.text) for place, done in self.rows.items()))

    def folder(self, eval_name: str) -> Path:
        """Return runs/<run>/evals/<eval>."""
        assert self.run is not None
        return self.run.path / "evals" / eval_name

    def with_faults(self) -> Answers:
        """Return the answers with what is wrong with them counted."""
        faults = AnswerFaults.of(
            [done.text for done in self.rows.values()],
            sum(done.finish_reason != "stop" for done in self.rows.values()),
            [question for question, _, _ in self.rows],
        )
        return replace(self, facts=replace(self.facts, faults=faults))


def answer_all(
    recipe: EvalRecipe, model: Model, engine: Engine, questions: Sequence[Question]
) -> Answers:
    """Return a model's answers to all turns of all questions.

    Raises:
        EvaluationIncomplete: requests failed; what was answered is stored.
        RecipeError: the file holds answers of the same weights in another prompt format.
    """
    section = recipe.generation
    usual = Sampling(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature or 0.0,
        top_p=section.top_p,
        repetition_penalty=section.repetition_penalty,
        seed=section.seed,
    )
    model.record()
    folder = model.run.path / "evals" / recipe.name
    rows: dict[Place, Completion] = {}
    with waiting_lock(folder):
        store = Store(folder / "generations.jsonl")
        _check_format(store, model, engine)
        writer = _Writer(store, engine, model)
        for turn in range(1, max(len(question.turns) for question in questions) + 1):
            asked = [
                (question, draw)
                for draw in range(1, section.samples + 1)
                for question in questions
                if len(question.turns) >= turn
            ]
            for temperature in dict.fromkeys(_temperature(recipe, one) for one, _ in asked):
                sampling = replace(usual, temperature=temperature)
                rows |= writer.answer(
                    {
                        (one.id, turn, draw): _conversation(one, turn, draw, rows)
                        for one, draw in asked
                        if _temperature(recipe, one) == temperature
                    },
                    sampling,
                )
    order = [
        (question.id, turn, draw)
        for draw in range(1, section.samples + 1)
        for question in questions
        for turn in range(1, len(question.turns) + 1)
    ]
    by_category = recipe.suite.name == "mt_bench" and section.temperature is None
    decoding = usual.to_dict()
    if by_category:
        decoding["temperature"] = "by category"
    facts = AnswerFacts(
        name=model.name,
        models=(model.recipe.model.name_or_path,),
        fingerprint=engine.fingerprint,
        prompt_format=model.prompts.name,
        prompt_format_hash=model.prompts.hash,
        decoding=decoding,
        dtype=model.recipe.model.dtype,
        quantized=model.quantized,
        server=getattr(engine, "version", None),
        tokens=sum(done.num_tokens for done in rows.values()),
        new_tokens=writer.tokens,
        seconds=round(writer.seconds, 1),
    )
    return Answers(model.name, model.run, {place: rows[place] for place in order}, facts)


def _temperature(recipe: EvalRecipe, question: Question) -> float:
    """The temperature of a question: the recipe's, else in MT-Bench FastChat's for its category."""
    if recipe.generation.temperature is not None or recipe.suite.name != "mt_bench":
        return recipe.generation.temperature or 0.0
    return TEMPERATURES.get(question.category, 0.0)


def _conversation(
    question: Question, turn: int, draw: int, rows: dict[Place, Completion]
) -> tuple[Message, ...]:
    """The turns so far with the model's own answers, ending with the user's turn."""
    messages: list[Message] = []
    for number in range(1, turn):
        messages += [
            {"role": "user", "content": question.turns[number - 1]},
            {"role": "assistant", "content": rows[question.id, number, draw].text},
        ]
    return (*messages, {"role": "user", "content": question.turns[turn - 1]})


def _check_format(rows: Iterable[Row], model: Model, engine: Engine) -> None:
    """Refuse stored answers of the same weights in another prompt format."""
    for row in rows:
        if row["model"] == engine.fingerprint and row["prompt_format_hash"] != model.prompts.hash:
            raise RecipeError(
                f"{model.name} holds answers in another prompt format"
                f" ({row['prompt_format_hash'][:12]}, now {model.prompts.hash[:12]})",
                "move generations.jsonl away, or restore the prompt format",
            )


class _Writer:
    """Asks an engine for the answers that a store lacks."""

    def __init__(self, store: Store, engine: Engine, model: Model) -> None:
        self.store, self.engine, self.model = store, engine, model
        self.seconds, self.tokens = 0.0, 0

    def answer(
        self, asked: dict[Place, tuple[Message, ...]], sampling: Sampling
    ) -> dict[Place, Completion]:
        """Return the stored answer to each conversation; those that are missing are asked and
        appended.
        """
        requests = {
            place: self._request(place, messages, sampling) for place, messages in asked.items()
        }
        missing = {
            request.key: (place, request)
            for place, request in requests.items()
            if request.key not in self.store
        }
        if missing:
            self._ask(missing, sampling)
        found: dict[Place, Completion] = {}
        for place, request in requests.items():
            row = self.store.get(request.key)
            assert row is not None
            found[place] = Completion(
                key=row["key"],
                text=row["answer"],
                finish_reason=row["finish_reason"],
                num_tokens=row["tokens"],
            )
        return found

    def _request(self, place: Place, messages: tuple[Message, ...], sampling: Sampling) -> Request:
        question, turn, draw = place
        text, ids = self.model.prompts.render(messages)
        further = (draw,) if draw > 1 else ()  # the first is that of a recipe without draws
        key = hash_of(
            question,
            turn,
            *further,
            text if text is not None else messages,
            sampling.to_dict(),
            self.engine.fingerprint,
            self.model.prompts.hash,
        )
        seed = int(hash_of(sampling.seed, question, turn, *further)[:15], 16)
        return Request(key=key, prompt=text, ids=ids, messages=messages, seed=seed)

    def _ask(self, missing: dict[str, tuple[Place, Request]], sampling: Sampling) -> None:
        started, failed, answered = time.monotonic(), Failures(), 0
        requests = [request for _, request in missing.values()]
        with tqdm(total=len(missing), desc=f"answers {self.model.name}", unit="answer") as bar:
            for done in self.engine.complete(requests, sampling):
                failed.add(done)
                if failed.in_a_row >= MAX_FAILURES_IN_A_ROW:
                    break
                if done.error is None:
                    self._keep(done, *missing[done.key], sampling)
                    answered += 1
                    bar.update()
        self.seconds += time.monotonic() - started
        if failed.total:
            raise EvaluationIncomplete(
                f"{len(missing) - answered} answers of {self.model.name} are missing: {failed}",
                f"{len(self.store)} answers are stored; {failed.remedy()}",
                file=self.store.path,
            )

    def _keep(self, done: Completion, place: Place, request: Request, sampling: Sampling) -> None:
        question, turn, draw = place
        self.tokens += done.num_tokens
        self.store.append(
            [
                {
                    "key": done.key,
                    "question_id": question,
                    "turn": turn,
                    "draw": draw,
                    "answer": done.text,
                    "finish_reason": done.finish_reason,
                    "tokens": done.num_tokens,
                    "seed": request.seed if sampling.temperature else None,
                    "decoding": sampling.to_dict(),
                    "model": self.engine.fingerprint,
                    "prompt_format_hash": self.model.prompts.hash,
                }
            ]
        )


def reference_answers(questions: Sequence[Question]) -> Answers:
    """Return the outputs that come with the questions, as an opponent.

    Raises:
        RecipeError: questions without one; they are named.
    """
    missing = [question.id for question in questions if question.reference is None]
    if missing:
        what = f"{len(missing)} questions have no reference output: {', '.join(missing[:8])}"
        raise RecipeError(what, "set data.references, or name an opponent: --against RUN")
    rows = {
        (question.id, 1, 1): Completion(key="", text=question.reference[0])
        for question in questions
        if question.reference
    }
    models = tuple(sorted({question.generator for question in questions}))
    return Answers(REFERENCE, None, rows, AnswerFacts(name=REFERENCE, models=models))


def answers_in_file(path: Path, questions: Sequence[Question]) -> Answers:
    """Return the answers in a file, with a run folder of their own."""
    found = read_answer_file(path, questions)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", found.generator).strip("-.") or "answers"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    run = RunDirectory(f"answers--{name[:60]}--{digest[:8]}")
    if not run.exists():
        source = {"file": path.name, "sha256": digest, "generator": found.generator}
        run.write_state("finished", kind="answers", source=source)
    rows = {(*place, 1): Completion(key="", text=text) for place, text in found.texts.items()}
    facts = AnswerFacts(name=run.name, models=(found.generator,), fingerprint=digest)
    return Answers(run.name, run, rows, facts)
