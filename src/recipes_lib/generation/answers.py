"""Answers of one model to questions, kept in generations.jsonl: only what is missing is asked, and
nothing is written twice.

An answer's key covers question, turn, draw, prompt, decoding, seed, weights and prompt format: a
larger number of draws later asks only for the new ones. The file is the judgments' kind of store:
one line, one write, synced; a torn tail is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError
from recipes_lib.core.fingerprints import hash_of
from recipes_lib.data.conversations import Message
from recipes_lib.engine import Completion, Decoding, Engine, Request
from recipes_lib.generation.progress import Progress
from recipes_lib.generation.subjects import Format
from recipes_lib.judging.judge import Failures
from recipes_lib.judging.store import JudgmentStore

MAX_CONSECUTIVE_FAILURES = 20


class GenerationIncomplete(RecipesError):
    """The evaluation ended with answers missing; the same command continues it."""

    exit_code = ExitCode.EVALUATION_INCOMPLETE


AnswerKey = tuple[str, int, int]  # question, turn, and which of several answers: its draw
Conversations = Mapping[AnswerKey, tuple[Message, ...]]  # each ends with the user's turn
Completions = dict[AnswerKey, Completion]
Arrived = Callable[[AnswerKey, Completion], None]  # is given an answer that is stored


class Writer:
    """Writes one model's answers.

    Args:
        path: generations.jsonl.
        engine: who answers.
        decoding: how.
        prompts: the model's prompt format.
        name: shown with the progress.
        arrived: is given each answer as soon as it is known to be stored.

    Raises:
        RecipeError: the file holds answers of the same weights in another prompt format.
    """

    def __init__(
        self,
        path: Path,
        engine: Engine,
        decoding: Decoding,
        prompts: Format,
        name: str,
        arrived: Arrived = lambda place, answer: None,
    ) -> None:
        self.store = JudgmentStore(path, what="answer")
        self.engine, self.decoding, self.prompts, self.name = engine, decoding, prompts, name
        self.arrived = arrived
        self.seconds = 0.0
        self.tokens = 0
        for row in self.store:
            if row["model"] == engine.fingerprint and row["prompt_format_hash"] != prompts.hash:
                raise RecipeError(
                    f"{path} holds answers in another prompt format"
                    f" ({row['prompt_format_hash'][:12]}, now {prompts.hash[:12]})",
                    "move the file away, or restore the prompt format",
                )

    def answer(self, asked: Conversations) -> Completions:
        """Return the stored answer to each conversation; those that are missing are asked and
        appended.

        Raises:
            GenerationIncomplete: requests failed; what was answered is stored.
        """
        requests = {place: self._request(*place, messages) for place, messages in asked.items()}
        missing = {}
        for place, request in requests.items():
            if not self._tell(place, request):
                missing[request.key] = (place, request)
        if missing:
            self._ask(missing)
        found = {place: self._stored(request) for place, request in requests.items()}
        return {place: one for place, one in found.items() if one}

    def _stored(self, request: Request) -> Completion | None:
        row = self.store.get(request.key)
        if row is None:
            return None
        return Completion(
            key=row["key"],
            text=row["answer"],
            finish_reason=row["finish_reason"],
            num_tokens=row["tokens"],
        )

    def _tell(self, place: AnswerKey, request: Request) -> bool:
        """Hand an answer on if it is stored, and return whether it is."""
        stored = self._stored(request)
        if stored:
            self.arrived(place, stored)
        return stored is not None

    def _request(
        self, question: str, turn: int, draw: int, messages: tuple[Message, ...]
    ) -> Request:
        text, ids = self.prompts.render(messages)
        further = (draw,) if draw > 1 else ()  # the first is that of a recipe without draws
        key = hash_of(
            question,
            turn,
            *further,
            text if text is not None else messages,
            self.decoding.to_dict(),
            self.engine.fingerprint,
            self.prompts.hash,
        )
        seed = int(hash_of(self.decoding.seed, question, turn, *further)[:15], 16)
        return Request(key=key, prompt=text, ids=ids, messages=messages, seed=seed)

    def _ask(self, missing: dict[str, tuple[AnswerKey, Request]]) -> None:
        progress = Progress(f"answers {self.name}", len(missing))
        failed, answered = Failures(), 0
        requests = [request for _, request in missing.values()]
        for completion in self.engine.complete(requests, self.decoding):
            (question, turn, draw), request = missing[completion.key]
            if completion.error is not None:
                failed.add(completion.error, completion.refused)
                if failed.in_a_row >= MAX_CONSECUTIVE_FAILURES:
                    break
                continue
            failed.in_a_row = 0
            answered += 1
            self.store.append(
                {
                    "key": completion.key,
                    "question_id": question,
                    "turn": turn,
                    **({"draw": draw} if draw > 1 else {}),
                    "answer": completion.text,
                    "finish_reason": completion.finish_reason,
                    "tokens": completion.num_tokens,
                    "seed": request.seed if self.decoding.temperature > 0 else None,
                    "decoding": self.decoding.to_dict(),
                    "model": self.engine.fingerprint,
                    "prompt_format_hash": self.prompts.hash,
                }
            )
            self._tell((question, turn, draw), request)
            self.tokens += completion.num_tokens
            progress.add(tokens=completion.num_tokens)
        self.seconds += progress.close()
        if failed.total:
            raise GenerationIncomplete(
                f"{len(missing) - answered} answers of {self.name} are missing: {failed}",
                f"{len(self.store)} answers are stored; {failed.remedy()}",
                file=self.store.path,
            )
