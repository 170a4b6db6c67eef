"""What is missing in a store is asked of an engine; each reply is stored as it arrives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import takewhile
from typing import TypeVar

from tqdm import tqdm

from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.files import Row
from recipes_lib.core.terminal import count
from recipes_lib.evals.engines.base import (
    REFUSED,
    TOO_LONG,
    Completion,
    Engine,
    EngineFacts,
    Request,
    Sampling,
)
from recipes_lib.evals.log import Store

MOST_FAILURES = 20  # requests in a row without a reply, after which no more are asked

Asked = TypeVar("Asked")


class EvaluationIncomplete(RecipesError):
    """Answers or judgments are missing; the same command continues."""

    exit_code = ExitCode.EVALUATION_INCOMPLETE


class ServerGone(EvaluationIncomplete):
    """Too many requests in a row had no reply."""


class ServerDown(ServerGone):
    """They had none because the server gives nobody a reply, whichever model is asked."""


class NotAsked(Engine):
    """In place of an engine whose server is down: what is stored is used, and nothing is asked.

    Args:
        engine: whose facts are those of the stored answers.
        error: that ended the asking of another model.
    """

    def __init__(self, engine: Engine, error: ServerDown) -> None:
        self._engine = engine
        self._error = error

    def facts(self) -> EngineFacts:
        """Return what the engine says of itself."""
        return self._engine.facts()

    def complete(self, requests: Iterable[Request], sampling: Sampling) -> Generator[Completion]:
        """Refuse to ask."""
        raise not_asked(self._error)


def not_asked(error: ServerGone) -> ServerGone:
    """Return the error of what is not asked, because of an error before it."""
    what = f"not asked, as the server gave no reply before: {error.what}"
    return type(error)(what, "run the same command to continue")


class _Failures:
    """Requests that had no reply, and what was said of them."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.most = 0  # without a reply in a row, so far
        self.is_down = True  # of these: the server gives nobody a reply
        self._in_a_row = 0
        self._down_in_a_row = 0

    def reply_came(self) -> None:
        self._in_a_row = 0
        self._down_in_a_row = 0

    def add(self, reply: Completion) -> None:
        self.reasons[str(reply.error)] += 1
        self._in_a_row += 1
        self._down_in_a_row += reply.is_down
        if self._in_a_row >= self.most:
            self.most = self._in_a_row
            self.is_down = self._down_in_a_row == self._in_a_row

    @property
    def kind(self) -> type[EvaluationIncomplete]:
        """The error that they are."""
        if self.most < MOST_FAILURES:
            return EvaluationIncomplete
        return ServerDown if self.is_down else ServerGone


def ask_missing(
    store: Store,
    requests: Mapping[str, Asked],
    complete: Callable[[Iterator[Asked]], Generator[Completion]],
    read: Callable[[Asked, Completion], Row],
    noun: str,
    name: str = "",
) -> None:
    """Ask for what a store lacks, and append each row as its reply arrives.

    Args:
        requests: by the key of their row.
        complete: an engine; errors are completions. It takes a request when it sends it.
        read: makes a reply the row.
        noun: what a row is (answer, judgment), and `name` what it is about.
    """
    waiting = {key: request for key, request in requests.items() if key not in store}
    if not waiting:
        return
    title = f"{noun}s of {name}" if name else f"{noun}s"
    failures = _Failures()
    # A server that refuses every request is set up wrongly, and its refusals say nothing of the
    # requests: they are stored once it has answered one.
    has_answered = any(map(_is_answer, store.values()))
    refused: list[Completion] = []
    # after too many failures nothing more is sent, but replies still in flight are stored
    sent = takewhile(lambda _: failures.most < MOST_FAILURES, waiting.values())
    with tqdm(total=len(waiting), desc=title, unit="") as bar, closing(complete(sent)) as replies:
        for reply in replies:
            if reply.error is not None:
                failures.add(reply)
                continue
            failures.reply_came()
            has_answered = has_answered or reply.refusal is None
            refused.append(reply)
            if has_answered:
                store.append(read(waiting[each.key], each) for each in refused)
                bar.update(len(refused))
                refused.clear()
    reasons = failures.reasons
    for reply in refused:
        reasons[f"the server refused every request: {reply.refusal}"] += 1
    if not reasons:
        return
    stored = sum(key in store for key in requests)
    ((reason, times),) = reasons.most_common(1)
    what = f"{len(requests) - stored} of {len(requests)} {title} are missing: {reason}"
    hint = f"{count(stored, noun)} stored; run the same command to continue"
    raise failures.kind(f"{what} ({count(times, 'time')})", hint, file=store.path)


def _is_answer(row: Row) -> bool:
    """Whether a stored row came from a reply with a text."""
    return row.get("finish_reason") not in (None, TOO_LONG, REFUSED)
