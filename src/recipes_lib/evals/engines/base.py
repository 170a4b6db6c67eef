"""What an engine is: requests in, completions out as they are finished, and what it says of itself.

An engine is a file in this folder with an `ENGINE`, and a line in `engines/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from recipes_lib.core.files import Row
from recipes_lib.data.conversations import Message

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe
    from recipes_lib.evals.recipe import ServerSection

# Why a request that was refused for good has no text, as `Completion.finish_reason`.
TOO_LONG = "prompt_too_long"
REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: at temperature 0 greedily."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0

    def to_dict(self) -> dict[str, object]:
        """Return the settings that count: the seed of greedy decoding changes no key."""
        settings = asdict(self)
        if not self.temperature:
            del settings["seed"]
        return settings


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt."""

    key: str  # what the completion is filed under
    prompt: str | None = None  # the rendered text; None where only the server knows the format
    ids: tuple[int, ...] = ()  # its token ids
    messages: tuple[Message, ...] = ()  # the conversation, for a server that renders it itself
    schema: Mapping[str, Any] | None = None  # of the JSON to answer, where a server can
    seed: int = 0  # of this request alone
    row: Row = field(default_factory=dict)  # what is stored beside its answer


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came back for a request: a text, or probabilities, or an error."""

    key: str
    text: str = ""
    finish_reason: str = "stop"  # or "length" (cut at max_new_tokens), TOO_LONG or REFUSED
    error: str | None = None  # why there is no answer, though there may be one later
    is_down: bool = False  # of an error: the server gives nobody a reply
    refusal: str | None = None  # the words of a server that will never answer this request
    model: str | None = None  # the name that a server gave the model in its reply
    probabilities: Mapping[str, float] | None = None  # of the next token, in place of a text


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What an engine says of itself, for the log of an evaluation; None: it does not say."""

    engine: str  # its name in a recipe
    server: str | None = None  # the version of the server that answers
    dtype: str | None = None  # of the weights
    quantized: bool | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """A model, as an engine sees it."""

    name: str  # that it goes by on a server
    recipe: Recipe  # its base, in which precision, in how many bits
    saved: Path | None = None  # the folder of the trained weights; None for a base
    load_tokenizer: Callable[[], Any]
    # gives a context with the network in this process, which is loaded at its first use
    using: Callable[[], AbstractContextManager[Any]]

    def end_tokens(self) -> list[int]:
        """Return what ends its answers as it was trained; a server knows its base's alone."""
        end = getattr(self.load_tokenizer(), "eos_token_id", None)
        return [] if end is None else [end]


class Engine(Protocol):
    """What answers the requests for one model."""

    def complete(self, requests: Iterable[Request], sampling: Sampling) -> Generator[Completion]:
        """Yield a completion for each request, in any order, as they are finished. It takes a
        request when it sends it; an error is a completion.
        """
        ...

    def weigh(
        self, requests: Iterable[Request], verdicts: Mapping[str, int]
    ) -> Generator[Completion]:
        """Yield the probabilities of the tokens `verdicts` as each request's next one. Only engines
        that `gives_probabilities` are asked.
        """
        what = f"{type(self).__name__} gives no probabilities"
        raise NotImplementedError(what)

    def facts(self) -> EngineFacts:
        """Return what the log of an evaluation says of the engine."""
        ...


# What makes the engine of a model among those that an engine was opened for.
EngineOf: TypeAlias = "Callable[[ServerSection, Target], Engine]"


@dataclass(frozen=True, kw_only=True)
class EngineType:
    """What is known of an engine before it is opened. Needs no torch."""

    name: str  # in a recipe and in a log
    # A context for models of one base, in which their engines can be made. What it lets go at the
    # end belongs into `finally`: an error of the evaluation goes through it.
    opened: Callable[[Sequence[Target]], AbstractContextManager[EngineOf]]
    # What answers are known by, given the section of the recipe, the model's name on a server, and
    # the hash of its weights (None where only a server knows them).
    answered_by: Callable[[ServerSection, str, str | None], str]
    in_process: bool = False  # so is the network, as suites without questions need it
    is_server: bool = False  # it asks an address, which the recipe has to name
    gives_probabilities: bool = False  # it can `weigh`
    writes_json: bool = False  # it can be held to a schema of JSON
