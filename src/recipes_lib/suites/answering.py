"""Every target's answers to a suite's questions. The caller loads the models, base by base; answers
in files are targets too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.fingerprints import hash_of
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.run_lock import waiting_lock
from recipes_lib.data.conversations import Message
from recipes_lib.engine import Completion, Decoding, Engine
from recipes_lib.eval_log import REFERENCE, AnswerFacts, AnswerFaults, Speed
from recipes_lib.eval_recipe import EvalRecipe
from recipes_lib.generation.answers import Arrived, Completions, Writer
from recipes_lib.generation.openai_engine import OpenAIEngine, Server
from recipes_lib.generation.subjects import ServerFormat, Subject
from recipes_lib.generation.transformers_engine import TransformersEngine
from recipes_lib.suites.questions import Question, read_answer_file


@dataclass
class AnswerSet:
    """One target's answers, by question, turn and draw.

    `run` is None for the outputs that come with the questions. `models` are the names of the
    weights behind the answers.
    """

    name: str
    run: RunDirectory | None
    rows: Completions
    fingerprint: str = ""
    prompt_format: str = ""
    prompt_format_hash: str = ""
    models: tuple[str, ...] = ()
    seconds: float = 0.0
    tokens: int = 0
    batch_tokens: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def text(self, question_id: str, turn: int = 1, draw: int = 1) -> str:
        """Return one answer; of a target that answered once, the one there is."""
        return self.rows[question_id, turn, min(draw, self.draws)].text

    @cached_property
    def draws(self) -> int:
        """How many answers there are to each question."""
        return max((draw for _, _, draw in self.rows), default=1)

    @property
    def digest(self) -> str:
        """Hash of all answers: equal for the same answers under two names."""
        return hash_of(sorted((*key, one.text) for key, one in self.rows.items()))

    def folder(self, eval_name: str) -> Path:
        """Return runs/<run>/evals/<eval>."""
        assert self.run is not None
        return self.run.path / "evals" / eval_name

    def facts(self, max_identical_fraction: float) -> AnswerFacts:
        """Return what a log says about the answers."""
        rows = self.rows.values()
        speed = Speed(
            new_tokens=self.tokens,
            seconds=round(self.seconds, 1),
            batch_tokens=self.batch_tokens,
        )
        return AnswerFacts(
            name=self.name,
            models=list(self.models),
            fingerprint=self.fingerprint,
            prompt_format=self.prompt_format,
            prompt_format_hash=self.prompt_format_hash,
            answers=AnswerFaults.of(
                [row.text for row in rows],
                sum(row.finish_reason != "stop" for row in rows),
                max_identical_fraction,
                [question for question, _, _ in self.rows],
            ),
            generated_now=speed if self.tokens else None,
            tokens=sum(row.num_tokens for row in rows),
            **self.details,
        )


@dataclass(frozen=True)
class Pairing:
    """Who is evaluated, and against whom: `opponents` maps a target's name to its opponent's
    answers.
    """

    targets: list[AnswerSet]
    opponents: dict[str, AnswerSet]


def answer_questions(
    recipe: EvalRecipe,
    subject: Subject,
    questions: Sequence[Question],
    arrived: Arrived = lambda place, answer: None,
) -> AnswerSet:
    """Return one subject's answers to all turns of all questions.

    Args:
        arrived: is given each answer as soon as it is stored.
    """
    section = recipe.generation
    decoding = Decoding(
        **{item.name: getattr(section, item.name) for item in dataclasses.fields(Decoding)}
    )
    subject.record()
    folder = subject.run.path / "evals" / recipe.name
    rows: Completions = {}
    with waiting_lock(folder):
        writer = Writer(
            folder / "generations.jsonl",
            _engine(recipe, subject),
            decoding,
            subject.prompts,
            subject.name,
            arrived,
        )
        for turn in range(1, max(len(question.turns) for question in questions) + 1):
            asked = [question for question in questions if len(question.turns) >= turn]
            rows |= writer.answer(
                {
                    (one.id, turn, draw): _conversation(one, turn, draw, rows)
                    for draw in range(1, section.samples + 1)
                    for one in asked
                }
            )
    model = subject.target.recipe.model
    return AnswerSet(
        name=subject.name,
        run=subject.run,
        rows=rows,
        fingerprint=writer.engine.fingerprint,
        prompt_format=subject.prompts.name,
        prompt_format_hash=subject.prompts.hash,
        models=(model.name_or_path,),
        seconds=writer.seconds,
        tokens=writer.tokens,
        batch_tokens=getattr(writer.engine, "batch_tokens", None),  # a server makes its own
        details={
            "decoding": decoding.to_dict(),
            "dtype": model.dtype,
            "quantized": subject.target.recipe.base_format is not None,
        },
    )


def _engine(recipe: EvalRecipe, subject: Subject) -> Engine:
    section = recipe.generation
    if section.engine == "openai":
        name = section.served_name or (
            subject.target.word if subject.target.is_base else subject.name
        )
        server = Server(
            base_url=str(section.base_url),
            model=name,
            api_key_variable=section.api_key_variable,
            concurrency=section.concurrency,
            timeout_s=section.timeout_s,
            max_retries=section.max_retries,
        )
        known = None if isinstance(subject.prompts, ServerFormat) else subject.fingerprint
        return OpenAIEngine(server, known)

    assert subject.model is not None
    tokenizer = subject.prompts.tokenizer
    return TransformersEngine(
        subject.model, tokenizer, subject.fingerprint, section.batch_tokens, subject.using
    )


def _conversation(
    question: Question, turn: int, draw: int, rows: Completions
) -> tuple[Message, ...]:
    """The turns so far with the model's own answers, ending with the user's turn."""
    messages: list[Message] = []
    for number in range(1, turn):
        messages += [
            {"role": "user", "content": question.turns[number - 1]},
            {"role": "assistant", "content": rows[question.id, number, draw].text},
        ]
    return (*messages, {"role": "user", "content": question.turns[turn - 1]})


def reference_answers(questions: Sequence[Question]) -> AnswerSet:
    """The outputs that come with the questions, as an opponent.

    Raises:
        RecipeError: questions without one; they are named.
    """
    missing = [question.id for question in questions if question.reference is None]
    if missing:
        raise RecipeError(
            f"{len(missing)} questions come without a reference output: {', '.join(missing[:8])}",
            "set data.references, or name an opponent: --against RUN",
        )
    rows = {
        (question.id, 1, 1): Completion(key="", text=question.reference[0])
        for question in questions
        if question.reference
    }
    return AnswerSet(
        REFERENCE, None, rows, models=tuple(sorted({question.generator for question in questions}))
    )


def answers_in_file(path: Path, questions: Sequence[Question]) -> AnswerSet:
    """The answers in a file, with a run directory of their own."""
    found = read_answer_file(path, questions)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", found.generator).strip("-.") or "answers"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    run = RunDirectory(f"answers--{name[:60]}--{digest[:8]}")
    if not run.exists():
        run.write_state(
            "finished",
            kind="answers",
            source={"file": path.name, "sha256": digest, "generator": found.generator},
        )
    asked = {question.id for question in questions}
    rows = {
        (*key, 1): Completion(key="", text=text) for key, text in found.items() if key[0] in asked
    }
    return AnswerSet(
        run.name,
        run,
        rows,
        fingerprint=digest,
        models=(found.generator,),
        details={"imported_from": path.name},
    )
