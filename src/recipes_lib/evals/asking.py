"""What is missing in a store is asked of an engine; each reply is stored as it arrives."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from itertools import takewhile
from typing import TypeVar

from tqdm import tqdm

from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.files import Row
from recipes_lib.core.terminal import count
from recipes_lib.evals.engines.base import REFUSED, TOO_LONG, Completion
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


def ask_missing(
    store: Store,
    requests: Mapping[str, Asked],
    complete: Callable[[Iterator[Asked]], Generator[Completion]],
    read: Callable[[Asked, Completion], Row],
    noun: str,
    name: str = "",
    gone: ServerGone | None = None,
) -> None:
    """Ask for what a store lacks, and append each row as its reply arrives.

    Args:
        requests: by the key of their row.
        complete: of an engine.
        read: makes a reply the row.
        noun: what a row is (answer, judgment), and `name` what it is about.
        gone: that ended the asking of the same server before: what is stored is enough, or fails.
    """
    waiting = {key: request for key, request in requests.items() if key not in store}
    if not waiting:
        return
    if gone:
        what = f"not asked, as the server gave no reply before: {gone.what}"
        raise type(gone)(what, "run the same command to continue")
    title = f"{noun}s of {name}" if name else f"{noun}s"
    reasons: Counter[str] = Counter()  # why there was no reply
    # requests in a row without a reply, whether the server was down for each: of now, and the most
    current_run: list[bool] = []
    longest_run: list[bool] = []
    # A server that refuses every request is set up wrongly, and its refusals say nothing of the
    # requests: they are stored once it has answered one.
    no_answer = (None, TOO_LONG, REFUSED)
    has_answered = any(row.get("finish_reason") not in no_answer for row in store.values())
    refused: list[Completion] = []
    # after too many failures nothing more is sent, but replies still in flight are stored
    sent = takewhile(lambda _: len(longest_run) < MOST_FAILURES, waiting.values())
    # the time left is of all answers so far: those of a batch come together
    bar = tqdm(total=len(waiting), desc=title, unit="", smoothing=0)
    with bar, closing(complete(sent)) as replies:
        for reply in replies:
            if reply.error is not None:
                reasons[str(reply.error)] += 1
                current_run.append(reply.is_down)
                if len(current_run) >= len(longest_run):
                    longest_run = current_run
                continue
            current_run = []
            has_answered = has_answered or reply.refusal is None
            refused.append(reply)
            if has_answered:
                store.append(read(waiting[each.key], each) for each in refused)
                bar.update(len(refused))
                refused.clear()
    for reply in refused:
        reasons[f"the server refused every request: {reply.refusal}"] += 1
    if not reasons:
        return
    stored = sum(key in store for key in requests)
    ((reason, times),) = reasons.most_common(1)
    what = f"{len(requests) - stored} of {len(requests)} {title} are missing: {reason}"
    hint = f"{count(stored, noun)} stored; run the same command to continue"
    kind = EvaluationIncomplete
    if len(longest_run) >= MOST_FAILURES:
        kind = ServerDown if all(longest_run) else ServerGone
    raise kind(f"{what} ({count(times, 'time')})", hint, file=store.path)
