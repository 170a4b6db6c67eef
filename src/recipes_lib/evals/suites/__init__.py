"""What a suite is, and what suites share: means with intervals, and numbers in tables. Each suite
is one file in this folder and one line in `evals.recipe.SUITES`.
"""

import importlib
import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from recipes_lib.evals.log import Check, EvalLog, Metric, Sample, Unit
from recipes_lib.evals.recipe import SUITES, EvalRecipe

if TYPE_CHECKING:
    from recipes_lib.evals.answers import Answers
    from recipes_lib.evals.models import Model
    from recipes_lib.evals.questions import QuestionSet

UNIT_SCALES = {"share": (0.0, 1.0), "grade": (1.0, 5.0)}


# of the suites' own metrics that are no share; those of lm-eval's tasks are known from its results
_UNITS: dict[str, Unit] = {"grade": "grade", "loss": "number", "bits_per_byte": "number"}
_LOWER_IS_BETTER = ("loss", "bits_per_byte")


def unit_of(metric: str) -> Unit:
    """Return what the values of a metric are, by its name."""
    return _UNITS.get(metric, "share")


class Suite:
    """A suite for the models of one eval recipe.

    One with questions turns answers into a log (`log`), or has a judge decide (`JudgedSuite`); one
    without measures a loaded model (`measure`).
    """

    title: ClassVar[str] = ""

    def __init__(self, recipe: EvalRecipe, chosen: "QuestionSet") -> None:
        self.recipe = recipe
        self.chosen = chosen

    def prepare(self, models: "Sequence[Model]") -> None:
        """See which models will be asked, before the first one is loaded."""

    def reads(self, model: Any) -> Any:
        """Return what decides a result beside the eval recipe and the model: the questions."""
        return self.chosen.questions

    def log(self, answers: "Answers") -> EvalLog:
        """Return the log of one model's answers."""
        raise NotImplementedError

    def measure(self, model: "Model", network: Any) -> EvalLog:
        """Return the log of one model, whose network is in memory."""
        raise NotImplementedError

    def new_log(self, metrics: Iterable[Metric], **facts: Any) -> EvalLog:
        """Return a log of metrics."""
        return EvalLog(
            suite=self.recipe.suite.name,
            eval=self.recipe.name,
            metrics=tuple(metrics),
            **facts,
        )

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        raise NotImplementedError


def suite_class(name: str) -> type[Suite]:
    """Return the class of a suite; nothing else imports it."""
    module = importlib.import_module(f"recipes_lib.evals.suites.{name}")
    suite: type[Suite] = getattr(module, SUITES[name].class_name)
    return suite


def numbers_of(
    values: Sequence[float | None], clusters: Sequence[str], unit: str = "share"
) -> dict[str, Any]:
    """Return the mean of the values that are known, its 95% interval over clusters, and n."""
    numbers = [value for value in values if value is not None]
    names = [name for name, value in zip(clusters, values, strict=True) if value is not None]
    if not numbers:
        return {"n": 0}
    from recipes_lib.stats import mean_interval  # scipy, which `recipes study --help` does without

    low, high = mean_interval(numbers, names, UNIT_SCALES.get(unit)) or (None, None)
    mean = math.fsum(numbers) / len(numbers)
    return {"value": mean, "low": low, "high": high, "n": len(numbers)}


def metric_of(
    metric: str, label: str, samples: Sequence[Sample], unit: Unit | None = None, **facts: Any
) -> Metric:
    """Return a metric that is the mean of samples; those of one question are one observation."""
    unit = unit or unit_of(metric)
    facts.setdefault("higher_is_better", metric not in _LOWER_IS_BETTER)
    clusters = [sample.same_as or sample.id for sample in samples]
    numbers = numbers_of([sample.value for sample in samples], clusters, unit)
    return Metric(metric, label, tuple(samples), unit=unit, **numbers, **facts)


def bounds_of(samples: Sequence[Sample], unit: str = "share") -> tuple[float, float]:
    """Return the mean if everything unresolved had got the lowest value, and the highest."""
    lowest, highest = UNIT_SCALES[unit]
    values = [sample.value for sample in samples]
    low = fmean(lowest if value is None else value for value in values)
    return low, fmean(highest if value is None else value for value in values)


def shown_rate(rate: Metric | Check, digits: int = 2, unit: str = "share") -> str:
    """Return a value with its interval, a share in percent."""
    if rate.value is None:
        return "n/a"
    scale = 1
    text = f"{rate.value:.{digits}f}"
    if unit == "share":
        scale = 100
        digits = 1
        text = f"{100 * rate.value:.1f}%"
    if rate.low is None or rate.high is None:
        return text
    return f"{text} [{scale * rate.low:.{digits}f}, {scale * rate.high:.{digits}f}]"
