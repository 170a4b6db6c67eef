"""What every engine answers to: requests in, completions out as they are finished."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.data.conversations import Message

MAX_FAILURES_IN_A_ROW = 20


class EvaluationIncomplete(RecipesError):
    """Answers or judgments are missing; the same command continues."""

    exit_code = ExitCode.EVALUATION_INCOMPLETE


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; above 0 each request draws with its own seed.
    None leaves the temperature to the server.
    """

    max_new_tokens: int = 512
    temperature: float | None = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def to_dict(self) -> dict[str, object]:
        """Return the settings as recorded; those that greedy decoding ignores are left out, so that
        they change no key.
        """
        ignored = () if self.temperature != 0 else ("top_p", "seed")
        return {name: value for name, value in asdict(self).items() if name not in ignored}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt.

    Args:
        key: what the completion is filed under.
        prompt: the rendered text; None where only the server knows the format.
        ids: its token ids.
        messages: the conversation, for a server that renders it itself.
        schema: of the JSON that is to be answered, where a server can.
        seed: of this request alone.
    """

    key: str
    prompt: str | None = None
    ids: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()
    schema: Mapping[str, Any] | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came back for a request: a text, or probabilities, or an error.

    Args:
        finish_reason: "stop", "length" (cut at max_new_tokens) or "prompt_too_long".
        num_tokens: tokens written.
        error: why nothing was answered.
        refused: the server will not take this request as it is; asking again is pointless.
        probabilities: of the next token, where they were asked for; there is no text then.
    """

    key: str
    text: str = ""
    finish_reason: str = "stop"
    num_tokens: int = 0
    error: str | None = None
    refused: bool = False
    probabilities: Mapping[str, float] | None = None


class Engine(Protocol):
    """Something that answers."""

    @property
    def fingerprint(self) -> str:
        """Hash that changes whenever the same prompt could get another greedy answer."""

    def complete(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion per request, in any order, as they are finished. Errors of transport
        are completions, not exceptions.
        """


@dataclass
class Failures:
    """Requests without a reply: by reason, refused by the server as they are, and in a row."""

    reasons: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    in_a_row: int = 0

    def add(self, done: Completion) -> None:
        """Count one completion."""
        if done.error is None:
            self.in_a_row = 0
            return
        self.reasons[done.error] += 1
        self.refused += done.refused
        self.in_a_row += 1

    @property
    def total(self) -> int:
        """All of them."""
        return self.reasons.total()

    def __str__(self) -> str:
        shown = self.reasons.most_common(3)
        more = self.total - sum(count for _, count in shown)
        parts = [f"{reason} ({count} times)" if count > 1 else reason for reason, count in shown]
        return "; ".join([*parts, *([f"{more} other failures"] if more else [])])

    def remedy(self) -> str:
        """Return what to do about them."""
        if self.refused < self.total:
            return "run the same command to continue"
        return (
            "the server refuses them as they are: change the recipe or the server, then run the"
            " same command to ask again"
        )
