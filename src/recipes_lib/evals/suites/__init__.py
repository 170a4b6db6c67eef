"""What a suite is. Each is one file in this folder with a line in `evals.recipe.SUITES` and one in
`evals.run.SUITE_CLASSES`; docs/evaluation.md has an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from recipes_lib.evals.answers import Answers
    from recipes_lib.evals.log import EvalLog
    from recipes_lib.evals.models import Model
    from recipes_lib.evals.questions import QuestionSet
    from recipes_lib.evals.recipe import EvalRecipe


class Suite:
    """A suite for the models of one eval recipe.

    One with questions turns answers into a log (`log`), or has a judge decide (`JudgedSuite`); one
    without measures a loaded model (`measure`). `run` adds who answered, the key and the file.
    """

    title: ClassVar[str] = ""

    def __init__(self, recipe: EvalRecipe, chosen: QuestionSet) -> None:
        self.recipe, self.chosen = recipe, chosen

    def prepare(self, models: Sequence[Model]) -> None:
        """See which models will be asked, before the first one is loaded."""

    def reads(self, model: Any) -> Any:
        """Return what decides a result beside the eval recipe and the model: the questions."""
        return self.chosen.questions

    def log(self, answers: Answers) -> EvalLog:
        """Return the log of one model's answers."""
        raise NotImplementedError

    def measure(self, model: Model, network: Any) -> EvalLog:
        """Return the log of one model, whose network is in memory."""
        raise NotImplementedError

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        raise NotImplementedError
