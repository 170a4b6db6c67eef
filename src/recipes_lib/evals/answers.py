"""One model's answers, as suites and judges read them: asked of a model and kept in
generations.jsonl (only what is missing is asked), read from a file, or those that come with the
questions.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import Row, file_hash, hash_of
from recipes_lib.core.run_directory import RunDirectory, run_lock
from recipes_lib.data.conversations import Message
from recipes_lib.evals.asking import ServerDown, ask_missing
from recipes_lib.evals.engines import answered_by
from recipes_lib.evals.engines.base import REFUSED, TOO_LONG, Completion, Engine, Request, Sampling
from recipes_lib.evals.log import REFERENCE, AnswerFacts, AnswerRow, Store
from recipes_lib.evals.models import NOT_IN_NAMES, Model
from recipes_lib.evals.questions import TEMPERATURES, Question, local_questions, read_answer_file
from recipes_lib.evals.recipe import EvalRecipe

Place = tuple[str, int]  # question, turn

# what to say of a stored row that is no answer, by its finish_reason
_WITHOUT_ANSWER = {TOO_LONG: "longer than the context", REFUSED: "refused by the server"}


@dataclass
class Answers:
    """One model's answers, by question and turn."""

    name: str  # the model's
    run: RunDirectory | None  # None for the outputs that come with the questions
    texts: dict[Place, str]
    facts: AnswerFacts  # who answered, and how
    cut: set[Place] = field(default_factory=set)  # which reached the token limit
    # Why there will never be an answer: its text is empty, and it has no verdict. A server's or a
    # context's limit says nothing of what the model would have written.
    unanswered: dict[Place, str] = field(default_factory=dict)

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
        counts = Counter(self.unanswered.values())
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts.items())
        missing = f"{len(self.unanswered)} of {len(self.texts)} requests"
        return (f"{self.name} has no answer to {missing} ({reasons}): they have no verdict",)


def answer_all(
    recipe: EvalRecipe,
    model: Model,
    engine: Engine,
    questions: Sequence[Question],
    gone: ServerDown | None = None,
) -> Answers:
    """Return a model's answers to all turns of all questions; each is stored as it arrives. None is
    asked for where the engine's server is `gone`.
    """
    section = recipe.generation
    fingerprint = answered_by(section, model.served_name, model.weights)
    usual = Sampling(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature or 0.0,
        seed=section.seed,
    )
    by_category = recipe.suite.name == "mt_bench" and section.temperature is None
    answers = Answers(name=model.name, run=model.run, texts={}, facts=model.facts())
    served_models: set[str] = set()  # as the replies name them
    model.record()
    with run_lock(model.folder(recipe.name), wait=True):
        store = Store(model.folder(recipe.name) / "generations.jsonl", AnswerRow)
        # a later turn shows the answers to the earlier ones
        for turn in range(1, max(len(question.turns) for question in questions) + 1):
            wanted: dict[Sampling, dict[str, Request]] = defaultdict(dict)
            for question in questions:
                if len(question.turns) < turn:
                    continue
                if (question.id, turn - 1) in answers.unanswered:
                    # the conversation that this turn continues does not exist
                    answers.texts[question.id, turn] = ""
                    answers.unanswered[question.id, turn] = "without the answer to an earlier turn"
                    continue
                sampling = usual
                if by_category:
                    temperature = TEMPERATURES.get(question.category, 0.0)
                    sampling = dataclasses.replace(usual, temperature=temperature)
                request = _request(question, turn, answers, sampling, model, fingerprint)
                wanted[sampling][request.key] = request
            for sampling, requests in wanted.items():
                complete = partial(engine.complete, sampling=sampling)
                ask_missing(
                    store,
                    requests,
                    complete,
                    _row,
                    "answer",
                    f"{model.name} to {recipe.name}",
                    gone,
                )
                for row in map(store.__getitem__, requests):
                    place = row["question_id"], row["turn"]
                    answers.texts[place] = row["answer"]
                    if row["finish_reason"] in _WITHOUT_ANSWER:
                        answers.unanswered[place] = _WITHOUT_ANSWER[row["finish_reason"]]
                    elif row["finish_reason"] != "stop":
                        answers.cut.add(place)
                    if model.prompt is None:
                        served_models.add(row.get("served_model") or model.served_name)
    decoding = usual.to_dict()
    if by_category:
        decoding["temperature"] = "by category"
    answers.facts = dataclasses.replace(
        answers.facts,
        **dataclasses.asdict(engine.facts()),
        fingerprint=fingerprint,
        decoding=decoding,
        served_model=", ".join(sorted(served_models)) or None,
    )
    return answers


def _request(
    question: Question,
    turn: int,
    answers: Answers,
    sampling: Sampling,
    model: Model,
    fingerprint: str,
) -> Request:
    """A turn after the conversation before it, with what is stored beside its answer."""
    messages: list[Message] = []
    for number, said in enumerate(question.turns[:turn], 1):
        messages.append({"role": "user", "content": said})
        if number < turn:
            messages.append({"role": "assistant", "content": answers.texts[question.id, number]})
    text, ids = model.render(messages)
    seed = int(hash_of(sampling.seed, (question.id, turn))[:15], 16)
    row = {
        "question_id": question.id,
        "turn": turn,
        "seed": seed if sampling.temperature else None,
        "decoding": sampling.to_dict(),
        "model": fingerprint,
        "prompt_format_hash": model.prompt_hash,
    }
    key = hash_of(row, text or messages)
    return Request(
        key=key,
        prompt=text,
        ids=ids,
        messages=tuple(messages),
        seed=seed,
        row={"key": key, **row},
    )


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
