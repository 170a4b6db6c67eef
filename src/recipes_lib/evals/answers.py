"""One model's answers to a suite's questions, kept in generations.jsonl: only what is missing is
asked. Answers in files are answers too.

An answer's key covers question, turn, draw, prompt, sampling, seed, weights and prompt format: a
larger number of draws later asks only for the new ones.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import Row, file_hash, hash_of
from recipes_lib.core.run_directory import RunDirectory, run_lock
from recipes_lib.core.terminal import count
from recipes_lib.data.rows import Message
from recipes_lib.evals.engine import Completion, Request, Sampling, ask_missing
from recipes_lib.evals.engine_openai import Engine
from recipes_lib.evals.log import REFERENCE, AnswerFacts, Store
from recipes_lib.evals.models import Model
from recipes_lib.evals.questions import TEMPERATURES, Question, read_answer_file
from recipes_lib.evals.recipe import EvalRecipe

Place = tuple[str, int, int]  # question, turn, and which of several answers: its draw
_Asked = tuple[Row, Request]


@dataclass
class Answers:
    """One model's answers, by question, turn and draw."""

    name: str  # the model's
    run: RunDirectory | None  # None for the outputs that come with the questions
    texts: dict[Place, str]
    facts: AnswerFacts  # who answered, and how
    cut: frozenset[Place] = frozenset()  # which reached the token limit

    def text(self, question: str, turn: int = 1, draw: int = 1) -> str:
        """Return one answer; of a model that answered once, the one there is."""
        return self.texts[question, turn, min(draw, self.draws)]

    def is_cut(self, question: str, turn: int = 1, draw: int = 1) -> bool:
        """Whether an answer reached the token limit."""
        return (question, turn, min(draw, self.draws)) in self.cut

    @cached_property
    def draws(self) -> int:
        """How many answers there are to each question."""
        return max((draw for _, _, draw in self.texts), default=1)

    @property
    def digest(self) -> str:
        """Hash of all answers: equal for the same answers under two names."""
        return hash_of(sorted((*place, text) for place, text in self.texts.items()))

    def folder(self, eval_name: str) -> Path:
        """Return runs/<run>/evals/<eval>."""
        assert self.run is not None
        return self.run.path / "evals" / eval_name


def answer_all(
    recipe: EvalRecipe, model: Model, engine: Engine, questions: Sequence[Question]
) -> Answers:
    """Return a model's answers to all turns of all questions; each is stored as it arrives."""
    section = recipe.generation
    sampling = Sampling(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature or 0.0,
        top_p=section.top_p,
        repetition_penalty=section.repetition_penalty,
        seed=section.seed,
    )
    by_category = recipe.suite.name == "mt_bench" and section.temperature is None
    texts: dict[Place, str] = {}
    cut: set[Place] = set()
    model.record()
    with run_lock(model.folder(recipe.name), wait=True):
        store = Store(model.folder(recipe.name) / "generations.jsonl")
        # a later turn shows the answers to the earlier ones
        for turn in range(1, max(len(question.turns) for question in questions) + 1):
            wanted: dict[Sampling, dict[str, _Asked]] = defaultdict(dict)
            for draw, question in product(range(1, section.samples + 1), questions):
                if len(question.turns) < turn:
                    continue
                own = sampling
                if by_category:
                    own = replace(sampling, temperature=TEMPERATURES.get(question.category, 0.0))
                messages: list[Message] = []
                for earlier, said in enumerate(question.turns[: turn - 1], 1):
                    answer = texts[question.id, earlier, draw]
                    messages.append({"role": "user", "content": said})
                    messages.append({"role": "assistant", "content": answer})
                messages.append({"role": "user", "content": question.turns[turn - 1]})
                asked = _request((question.id, turn, draw), messages, own, model, engine)
                wanted[own][asked[1].key] = asked
            for own, requests in wanted.items():
                complete = partial(_complete, engine, own)
                ask_missing(store, requests, complete, _row, "answer", model.name)
                for row in map(store.get, requests):
                    assert row is not None
                    place = row["question_id"], row["turn"], row["draw"]
                    texts[place] = row["answer"]
                    if row["finish_reason"] != "stop":
                        cut.add(place)
    facts = replace(
        model.facts(),
        fingerprint=engine.fingerprint,
        decoding=sampling.to_dict() | ({"temperature": "by category"} if by_category else {}),
        server=engine.version,
    )
    return Answers(model.name, model.run, texts, facts, frozenset(cut))


def _request(
    place: Place, messages: Sequence[Message], sampling: Sampling, model: Model, engine: Engine
) -> _Asked:
    """A request with what is stored of it."""
    question, turn, draw = place
    text, ids = model.prompts.render(messages)
    further = (draw,) if draw > 1 else ()  # the first is that of a recipe without draws
    prompt = text if text is not None else messages
    asked = (question, turn, *further, prompt, sampling.to_dict())
    key = hash_of(*asked, engine.fingerprint, model.prompts.hash)
    seed = int(hash_of(sampling.seed, question, turn, *further)[:15], 16)
    row = {
        "key": key,
        "question_id": question,
        "turn": turn,
        "draw": draw,
        "seed": seed if sampling.temperature else None,
        "decoding": sampling.to_dict(),
        "model": engine.fingerprint,
        "prompt_format_hash": model.prompts.hash,
    }
    return row, Request(key=key, prompt=text, ids=ids, messages=tuple(messages), seed=seed)


def _complete(engine: Engine, sampling: Sampling, asked: list[_Asked]) -> Generator[Completion]:
    return engine.complete([request for _, request in asked], sampling)


def _row(asked: _Asked, reply: Completion) -> Row:
    return asked[0] | {"answer": reply.text, "finish_reason": reply.finish_reason}


def reference_answers(questions: Sequence[Question]) -> Answers:
    """Return the outputs that come with the questions, as an opponent."""
    missing = [question.id for question in questions if not question.reference]
    if missing:
        num = count(len(missing), "question")
        what = f"{num} without a reference output: {', '.join(missing[:8])}"
        raise RecipeError(what, "set data.references, or name an opponent: --against RUN")
    texts = {(question.id, 1, 1): str((question.reference or [""])[0]) for question in questions}
    models = tuple(sorted({question.generator for question in questions}))
    return Answers(REFERENCE, None, texts, AnswerFacts(name=REFERENCE, models=models))


def answers_in_file(path: Path, questions: Sequence[Question]) -> Answers:
    """Return the answers in a file, with a run folder of their own."""
    by_turn, generator = read_answer_file(path, questions)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", generator).strip("-.") or "answers"
    digest = file_hash(path)
    run = RunDirectory(f"answers--{name[:60]}--{digest[:8]}")
    if not run.exists():
        source = {"file": path.name, "sha256": digest, "generator": generator}
        run.write_state("finished", kind="answers", source=source)
    facts = AnswerFacts(name=run.name, models=(generator,), fingerprint=digest)
    texts = {(question, turn, 1): text for (question, turn), text in by_turn.items()}
    return Answers(run.name, run, texts, facts)
