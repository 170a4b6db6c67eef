"""A third engine, as a file beside the others would be: it answers each prompt with its length."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from recipes_lib.evals.engines.base import (
    Completion,
    Engine,
    EngineFacts,
    EngineOf,
    EngineType,
    Request,
    Sampling,
    Target,
)

LIVES: list[str] = []  # what was opened, for which models, and closed


class ToyEngine(Engine):
    def __init__(self, target: Target) -> None:
        self.target = target

    def complete(self, requests: Iterable[Request], sampling: Sampling) -> Generator[Completion]:
        for request in requests:
            letters = len(request.prompt or str(request.messages))
            yield Completion(key=request.key, text=f"{letters} letters. [RESULT] A")

    def facts(self) -> EngineFacts:
        return EngineFacts(engine="toy", server="0.1", dtype="int8", quantized=True)


@contextmanager
def _opened(targets: Sequence[Target]) -> Iterator[EngineOf]:
    LIVES.append(f"opened for {', '.join(target.name for target in targets)}")

    def engine(section: Any, target: Target) -> ToyEngine:
        return ToyEngine(target)

    try:
        yield engine
    finally:  # after an error too
        LIVES.append("closed")


def _answered_by(section: Any, name: str, weights: str | None) -> str:
    return f"toy {weights}"


ENGINE = EngineType(name="toy", opened=_opened, answered_by=_answered_by)
