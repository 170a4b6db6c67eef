"""What a suite is. Each is one file in this folder, named as the suite, and a line in
`evals.recipe.SUITES`; docs/evaluation.md has an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from recipes_lib.evals.answers import Answers
    from recipes_lib.evals.log import EvalLog
    from recipes_lib.evals.models import Loaded, Model
    from recipes_lib.evals.questions import QuestionSet
    from recipes_lib.evals.recipe import EvalRecipe


class Suite:
    """A suite for the models of one eval recipe.

    A suite with questions turns answers into a log (`log`), or has a judge decide (`JudgedSuite`);
    one without measures a loaded model (`measure`). Logs need only what the suite knows: `run`
    adds who answered, the key and the file.

    Args:
        recipe: the eval recipe.
        chosen: its questions; none where the suite asks none of its own.
    """

    title: ClassVar[str] = ""
    classes: ClassVar[dict[str, type[Suite]]] = {}

    def __init_subclass__(cls, name: str = "") -> None:
        if name:
            cls.classes[name] = cls

    def __init__(self, recipe: EvalRecipe, chosen: QuestionSet) -> None:
        self.recipe, self.chosen = recipe, chosen

    def prepare(self, models: Sequence[Model]) -> None:
        """See which models will be asked, before the first one is loaded."""

    def log(self, answers: Answers) -> EvalLog:
        """Return the log of one model's answers."""
        raise NotImplementedError

    def measure(self, loaded: Loaded) -> EvalLog:
        """Return the log of one model, which is active in memory."""
        raise NotImplementedError

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        raise NotImplementedError


def suite_class(name: str) -> type[Suite]:
    """Return the class of a suite; only its own file is imported."""
    if name not in Suite.classes:
        import_module(f"{__name__}.{name}")
    return Suite.classes[name]
