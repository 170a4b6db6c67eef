"""Answers of one model to questions, kept in generations.jsonl: only what is missing is asked, and
nothing is written twice.

An answer's key covers question, turn, prompt, decoding, seed, weights and prompt format. The file
is the judgments' kind of store: one line, one write, synced; a torn tail is cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError
from recipes_lib.core.fingerprints import hash_of
from recipes_lib.data.conversations import Message
from recipes_lib.eval_log import AnswerFaults, Identical
from recipes_lib.generation.engine import Decoding, Engine, Request
from recipes_lib.generation.progress import Progress
from recipes_lib.generation.subjects import Format
from recipes_lib.judging.judge import Failures
from recipes_lib.judging.store import JudgmentStore

MAX_CONSECUTIVE_FAILURES = 20


class GenerationIncomplete(RecipesError):
    """The evaluation ended with answers missing; the same command continues it."""

    exit_code = ExitCode.EVALUATION_INCOMPLETE


class AnswerStore(JudgmentStore):
    """The store of answers of one model."""

    what = "answer"


@dataclass(frozen=True)
class Prompt:
    """What is asked: a conversation that ends with the user's turn `turn` (counted from 1)."""

    question_id: str
    messages: tuple[Message, ...]
    turn: int = 1


class Writer:
    """Writes one model's answers.

    Args:
        path: generations.jsonl.
        engine: who answers.
        decoding: how.
        prompts: the model's prompt format.
        name: shown with the progress.

    Raises:
        RecipeError: the file holds answers of the same weights in another prompt format.
    """

    def __init__(
        self, path: Path, engine: Engine, decoding: Decoding, prompts: Format, name: str
    ) -> None:
        self.store = AnswerStore(path)
        self.engine, self.decoding, self.prompts, self.name = engine, decoding, prompts, name
        self.seconds = 0.0
        self.tokens = 0
        for row in self.store:
            if row["model"] == engine.fingerprint and row["prompt_format_hash"] != prompts.hash:
                raise RecipeError(
                    f"{path} holds answers in another prompt format"
                    f" ({row['prompt_format_hash'][:12]}, now {prompts.hash[:12]})",
                    "move the file away, or restore the prompt format",
                )

    def answer(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Return one stored row per prompt, in order; those that are missing are asked and
        appended.

        Raises:
            GenerationIncomplete: requests failed; what was answered is stored.
        """
        requests = [self._request(prompt) for prompt in prompts]
        pairs = zip(prompts, requests, strict=True)
        missing = {
            request.key: (prompt, request)
            for prompt, request in pairs
            if request.key not in self.store
        }
        if missing:
            self._ask(missing)
        return [self.store.get(request.key) or {} for request in requests]

    def _request(self, prompt: Prompt) -> Request:
        text, ids = self.prompts.render(prompt.messages)
        identity = [
            prompt.question_id,
            prompt.turn,
            text if text is not None else prompt.messages,
            self.decoding.to_dict(),
            self.engine.fingerprint,
            self.prompts.hash,
        ]
        key = hash_of(*identity)
        seed = int(hash_of(self.decoding.seed, prompt.question_id, prompt.turn)[:15], 16)
        return Request(key=key, prompt=text, ids=ids, messages=prompt.messages, seed=seed)

    def _ask(self, missing: dict[str, tuple[Prompt, Request]]) -> None:
        progress = Progress(f"answers {self.name}", len(missing))
        failed, answered = Failures(), 0
        for completion in self.engine.complete(
            [request for _, request in missing.values()], self.decoding
        ):
            prompt, request = missing[completion.key]
            if completion.error is not None:
                failed.add(completion.error, completion.refused)
                if failed.in_a_row >= MAX_CONSECUTIVE_FAILURES:
                    break
                continue
            failed.in_a_row = 0
            answered += 1
            row: dict[str, Any] = {
                "key": completion.key,
                "question_id": prompt.question_id,
                "turn": prompt.turn,
            }
            row |= {
                "answer": completion.text,
                "finish_reason": completion.finish_reason,
                "tokens": completion.num_tokens,
            }
            row |= {
                "seed": request.seed if self.decoding.temperature > 0 else None,
                "decoding": self.decoding.to_dict(),
            }
            row |= {"model": self.engine.fingerprint, "prompt_format_hash": self.prompts.hash}
            self.store.append(row)
            self.tokens += completion.num_tokens
            progress.add(tokens=completion.num_tokens)
        self.seconds += progress.close()
        if failed.total:
            raise GenerationIncomplete(
                f"{len(missing) - answered} answers of {self.name} are missing: {failed}",
                f"{len(self.store)} answers are stored; {failed.remedy()}",
                file=self.store.path,
            )


def answer_faults(
    rows: Iterable[dict[str, Any]], max_identical_fraction: float = 0.1
) -> AnswerFaults:
    """Return what is wrong with answers taken together: empty, cut, identical ones; two alike are
    not flagged, however few the questions are.
    """
    rows = list(rows)
    texts = Counter(row["answer"].strip() for row in rows)
    text, most = texts.most_common(1)[0] if texts else ("", 0)
    identical = Identical()
    if most > 1:
        share = most / len(rows)
        flagged = share > max_identical_fraction and most > 2
        identical = Identical(count=most, share=share, text=text[:200], flagged=flagged)
    return AnswerFaults(
        n=len(rows),
        empty=texts[""],
        cut=sum(row["finish_reason"] != "stop" for row in rows),
        identical=identical,
    )
