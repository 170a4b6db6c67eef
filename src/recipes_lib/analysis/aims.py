"""What a study asks of its table, and what it says about its arms. Needs no numpy."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes_lib.analysis.looks import Look
from recipes_lib.evals.suites import UNIT_SCALES, unit_of

WIDEST_MARGIN = 0.25  # of the scale


@dataclass(frozen=True)
class Margin:
    """The smallest difference that matters on a metric, in its unit; `points` are hundredths.

    Example:
        >>> Margin.read("2 points"), Margin.read(0.005), Margin.read("little")
        (Margin(size=0.02, points=True), Margin(size=0.005, points=False), None)
    """

    size: float
    points: bool = False

    @classmethod
    def read(cls, value: object) -> "Margin | None":
        """Return a margin as it is written; None where it is none."""
        match = re.fullmatch(r"([0-9.eE+-]+)( ?points?)?", str(value).strip())
        if match is None:
            return None
        try:
            size = float(match[1])
        except ValueError:  # as 1e or 2-3
            return None
        if not 0 < size < math.inf:
            return None
        if match[2]:
            return cls(size=size / 100, points=True)
        return cls(size=size)

    @property
    def text(self) -> str:
        """The margin as it is written."""
        return f"{100 * self.size:g} points" if self.points else f"{self.size:g}"

    def fits(self, metric: str, unit: str | None = None) -> str:
        """Return why the margin cannot be one of a metric; its name tells the unit without one."""
        if unit is None:
            unit = unit_of(metric.rpartition("/")[2])
        if self.points and unit != "share":
            return f"{metric} is not a share, so has no points: give a number in its unit"
        scale = UNIT_SCALES.get(unit)
        if scale and self.size > WIDEST_MARGIN * (scale[1] - scale[0]):
            hint = " (for a share write '2 points' or 0.02)" if unit == "share" else ""
            return f"{metric}: a margin of more than a quarter of the scale says nothing{hint}"
        return ""


def is_named(word: str, metric: str) -> bool:
    """Return whether a word means a metric: its parts stand in the metric's name in their order.

    Example:
        >>> is_named("win_rate", "quickstart--alpaca_eval/win_rate")
        True
        >>> is_named("lm_eval/acc", "lm_eval/arc_easy/acc_norm")
        False
    """
    parts = iter(metric_parts(metric))
    return all(part in parts for part in metric_parts(word))


def metric_parts(word: str) -> list[str]:
    """Return the parts of a metric's name."""
    return re.split("/|--", word)


@dataclass(frozen=True)
class TunedArm:
    """The grid an arm's key was chosen from by validation loss; None is one that diverged."""

    key: str
    values: tuple[Any, ...]
    chosen: Any = None
    losses: tuple[float | None, ...] = ()
    seed: int | None = None

    @property
    def edge(self) -> str:
        """Which end of the grid was chosen; nothing inside it, or for values without numbers."""
        numbers = [value for value in self.values if isinstance(value, int | float)]
        if self.chosen is None or len(numbers) < len(self.values):
            return ""
        return {min(numbers): "smallest", max(numbers): "largest"}.get(self.chosen, "")


@dataclass(frozen=True)
class Aims:
    """What is asked of a table. Without a primary metric all comparisons are one family."""

    primary: str | None = None
    margins: Mapping[str, Margin] = field(default_factory=dict)
    baseline: str | None = None  # the arm that no other may be worse than, where there is one
    look: Look | None = None  # which test of a study with several it is

    @property
    def named(self) -> list[str]:
        """The metrics that are named here, the primary one first."""
        return list(dict.fromkeys(filter(None, [self.primary, *self.margins])))

    def margin_of(self, metric: str) -> Margin | None:
        """Return the margin of a metric: that of the longest name it has here."""
        words = [word for word in self.margins if is_named(word, metric)]
        return self.margins[max(words, key=len)] if words else None


@dataclass(frozen=True)
class Design:
    """What a study declares, as far as conclusions depend on it. `recipes compare` has none."""

    name: str
    question: str
    factors: Mapping[str, Sequence[str]] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of arms, by dotted key
    tuned: Mapping[str, TunedArm] = field(default_factory=dict)
    missing: tuple[str, ...] = ()  # what is declared and not there: no verdict before it is
    changed: tuple[str, ...] = ()  # since the design of an earlier report with verdicts
    reference: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # never tested
    command: str = ""  # what runs the study
    evals: tuple[str, ...] = ()  # the files of its eval recipes
    went_on: str = ""  # what the look before this one left open

    def factor_of(self, key: str) -> str | None:
        """Return the factor that may change a dotted key; None where a difference is a confound."""
        made_by_launch = ("launch.distributed_type", "launch.mixed_precision")
        for factor, prefixes in self.factors.items():
            for prefix in prefixes:
                follows = prefix == "launch.accelerate" and key in made_by_launch
                if key == prefix or key.startswith(f"{prefix}.") or follows:
                    return factor
        return None

    def declares(self, *keys: str) -> bool:
        """Return whether a factor may change one of these keys, or an arm is tuned by one."""
        tuned = {tuned.key for tuned in self.tuned.values()}
        return bool(tuned & {*keys}) or any(map(self.factor_of, keys))
