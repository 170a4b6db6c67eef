"""The engines that there are, and the one place that chooses among them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from recipes_lib.evals.engines import server, transformers
from recipes_lib.evals.engines.base import Engine, EngineOf, EngineType, Target

if TYPE_CHECKING:
    from recipes_lib.evals.recipe import ServerSection

# by their name in a recipe; the first is the default
_ALL = (transformers.ENGINE, server.ENGINE)
ENGINES: dict[str, EngineType] = {engine.name: engine for engine in _ALL}


class Engines(ExitStack):
    """The engines of models that share a base. A context: what an engine holds for these models is
    opened when it is first asked for, and closed at the end.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        super().__init__()
        self._targets = targets
        self._opened: dict[str, EngineOf] = {}

    def engine(self, section: ServerSection, target: Target) -> Engine:
        """Return the engine that a section of a recipe names, for one of the models."""
        if section.engine not in self._opened:
            context = ENGINES[section.engine].opened(self._targets)
            self._opened[section.engine] = self.enter_context(context)
        return self._opened[section.engine](section, target)


def answered_by(section: ServerSection, name: str, weights: str | None) -> str:
    """Return what answers are known by, with the arguments of `EngineType.answered_by`."""
    return ENGINES[section.engine].answered_by(section, name, weights)
