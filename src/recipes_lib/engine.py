"""The protocol that every engine answers to: requests in, completions out as they are finished. A
judge is asked in its own words and answers in the same completions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from recipes_lib.data.conversations import Message


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen. Temperature 0 is greedy; above 0 each request draws with its
    own seed.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def to_dict(self) -> dict[str, object]:
        """Return the settings as recorded; those that greedy decoding ignores are left out, so that
        they change no key.
        """
        settings = asdict(self)
        return (
            settings
            if self.temperature > 0
            else {
                name: settings[name]
                for name in ("max_new_tokens", "temperature", "repetition_penalty")
            }
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt.

    Args:
        key: what the completion is filed under.
        prompt: the rendered text; None where only the server knows the format.
        ids: its token ids, for an engine in this process.
        messages: the conversation, for a server that renders it itself.
        seed: of this request alone.
    """

    key: str
    prompt: str | None = None
    ids: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came back for a request: text, or probabilities, or an error.

    Args:
        finish_reason: "stop", "length" (cut at max_new_tokens) or "prompt_too_long".
        num_tokens: tokens written.
        error: what went wrong in transport; nothing was answered then.
        refused: the server answered and will not take this request as it is; asking at once again
            is pointless.
        probabilities: for one-token requests, the probability of each token; no text was written
            then. A judge's are of the allowed verdicts, and their sum is the mass.
    """

    key: str
    text: str = ""
    finish_reason: str = "stop"
    num_tokens: int = 0
    error: str | None = None
    refused: bool = False
    probabilities: Mapping[str, float] | None = None


class Engine(Protocol):
    """Something that answers. `fingerprint` names the weights it answers with."""

    @property
    def fingerprint(self) -> str:
        """Hash that changes whenever the same prompt could get another greedy answer."""

    def complete(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Completion]:
        """Yield one completion per request, in any order, as they are finished. Requests are taken
        by the thread that takes completions, as many as there is room for.
        """
