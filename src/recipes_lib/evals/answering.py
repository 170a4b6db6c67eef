"""Answers to questions: asked of a model and kept in generations.jsonl (only what is missing is
asked), read from a file, or those that come with the questions.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import Row, file_hash, hash_of
from recipes_lib.core.run_directory import RunDirectory, run_lock
from recipes_lib.data.conversations import Message
from recipes_lib.evals.answers import Answers, Place
from recipes_lib.evals.asking import ask_missing
from recipes_lib.evals.engines import answered_by
from recipes_lib.evals.engines.base import (
    REFUSED,
    TOO_LONG,
    Completion,
    Engine,
    Request,
    Sampling,
)
from recipes_lib.evals.log import REFERENCE, AnswerFacts, AnswerRow, Store
from recipes_lib.evals.models import NOT_IN_NAMES, Model
from recipes_lib.evals.questions import TEMPERATURES, Question, local_questions, read_answer_file
from recipes_lib.evals.recipe import EvalRecipe

# what to say of a stored row that is no answer, by its finish_reason
WITHOUT_ANSWER = {TOO_LONG: "longer than the context", REFUSED: "refused by the server"}


def answer_all(
    recipe: EvalRecipe, model: Model, engine: Engine, questions: Sequence[Question]
) -> Answers:
    """Return a model's answers to all turns of all questions; each is stored as it arrives."""
    section = recipe.generation
    fingerprint = answered_by(section, model.served_name, model.weights)
    usual = Sampling(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature or 0.0,
        seed=section.seed,
    )
    by_category = recipe.suite.name == "mt_bench" and section.temperature is None
    texts: dict[Place, str] = {}
    cut: set[Place] = set()
    unanswered: dict[Place, str] = {}
    served_models: set[str] = set()  # as the replies name them
    model.record()
    with run_lock(model.folder(recipe.name), wait=True):
        store = Store(model.folder(recipe.name) / "generations.jsonl", AnswerRow)
        # a later turn shows the answers to the earlier ones
        for turn in range(1, max(len(question.turns) for question in questions) + 1):
            wanted: dict[Sampling, dict[str, Request]] = defaultdict(dict)
            asked = [question for question in questions if len(question.turns) >= turn]
            for question in asked:
                if (question.id, turn - 1) in unanswered:
                    # the conversation that this turn continues does not exist
                    texts[question.id, turn] = ""
                    unanswered[question.id, turn] = "without the answer to an earlier turn"
                    continue
                sampling = usual
                if by_category:
                    temperature = TEMPERATURES.get(question.category, 0.0)
                    sampling = dataclasses.replace(usual, temperature=temperature)
                messages: list[Message] = []
                for number, said in enumerate(question.turns[:turn], 1):
                    messages.append({"role": "user", "content": said})
                    if number < turn:
                        answer = texts[question.id, number]
                        messages.append({"role": "assistant", "content": answer})
                place = question.id, turn
                request = _request(place, messages, sampling, model, fingerprint)
                wanted[sampling][request.key] = request
            for sampling, requests in wanted.items():
                complete = partial(engine.complete, sampling=sampling)
                ask_missing(store, requests, complete, _row, "answer", model.name)
                for row in map(store.__getitem__, requests):
                    place = row["question_id"], row["turn"]
                    texts[place] = row["answer"]
                    if row["finish_reason"] in WITHOUT_ANSWER:
                        unanswered[place] = WITHOUT_ANSWER[row["finish_reason"]]
                    elif row["finish_reason"] != "stop":
                        cut.add(place)
                    if model.prompt is None:
                        served_models.add(row.get("served_model") or model.served_name)
    facts = dataclasses.replace(
        model.facts(),
        **dataclasses.asdict(engine.facts()),
        fingerprint=fingerprint,
        decoding=usual.to_dict() | ({"temperature": "by category"} if by_category else {}),
        served_model=", ".join(sorted(served_models)) or None,
    )
    return Answers(
        name=model.name,
        run=model.run,
        texts=texts,
        facts=facts,
        cut=frozenset(cut),
        unanswered=unanswered,
    )


def _request(
    place: Place, messages: Sequence[Message], sampling: Sampling, model: Model, fingerprint: str
) -> Request:
    """A request with what is stored of it; the fingerprint is what the answers are known by."""
    text, ids = model.render(messages)
    decoding, seed = sampling.to_dict(), int(hash_of(sampling.seed, place)[:15], 16)
    known = {
        "question_id": place[0],
        "turn": place[1],
        "seed": seed if sampling.temperature else None,
        "decoding": decoding,
        "model": fingerprint,
        "prompt_format_hash": model.prompt_hash,
    }
    key = hash_of(known, text or messages)
    row = {"key": key, **known}
    return Request(key=key, prompt=text, ids=ids, messages=tuple(messages), seed=seed, row=row)


def _row(request: Request, reply: Completion) -> Row:
    row = {**request.row, "answer": reply.text, "finish_reason": reply.finish_reason}
    if reply.model is not None:
        row["served_model"] = reply.model
    if reply.refusal is not None:
        row["refusal"] = reply.refusal
    return row


def reference_answers(questions: Sequence[Question]) -> Answers:
    """Return the outputs that come with the questions, as an opponent."""
    missing = [question.id for question in questions if not question.reference]
    if missing:
        what = f"{len(missing)} questions have no reference output: {', '.join(missing[:8])}"
        raise RecipeError(what, "name an opponent: --against RUN, or --against FILE")
    texts = {(question.id, 1): str((question.reference or [""])[0]) for question in questions}
    models = tuple(sorted({question.generator for question in questions}))
    return Answers(REFERENCE, None, texts, AnswerFacts(name=REFERENCE, models=models))


def check_questions(recipe: EvalRecipe) -> None:
    """Refuse questions that cannot be read, or lack the reference outputs that are needed."""
    chosen = local_questions(recipe)
    if chosen and recipe.opponent(None) == REFERENCE:
        reference_answers(chosen.questions)


def answers_in_file(path: Path, questions: Sequence[Question]) -> Answers:
    """Return the answers in a file, with a run folder of their own."""
    texts, generator = read_answer_file(path, questions)
    name = NOT_IN_NAMES.sub("-", generator).strip("-.") or "answers"
    digest = file_hash(path)
    run = RunDirectory(f"answers--{name[:60]}--{digest[:8]}")
    if not run.exists():
        source = {"file": path.name, "sha256": digest, "generator": generator}
        run.write_state("finished", kind="answers", source=source)
    facts = AnswerFacts(name=run.name, models=(generator,), fingerprint=digest)
    return Answers(run.name, run, texts, facts)
