"""What a study asks of its table: the primary metric, what is tested at all, and margins.

Metrics are named by a part of their name that is enough: `win_rate`, `alpaca_eval/win_rate`,
`heldout_loss`, `lm_eval/gsm8k`. Needs no numpy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from recipes_lib.eval_recipe import SUITE_FACTS, EvalRecipe

# Metrics that are no share between 0 and 1.
NO_SHARES = ("grade", "loss", "bits_per_byte")
_SEPARATOR = re.compile("/|--")


@dataclass(frozen=True)
class Margin:
    """The smallest difference that matters on a metric, in its unit; of shares in points of a
    hundred where `points`.

    Example:
        >>> Margin.read("2 points"), Margin.read(0.005), Margin.read("little")
        (Margin(size=0.02, points=True), Margin(size=0.005, points=False), None)
    """

    size: float
    points: bool = False

    @classmethod
    def read(cls, value: object) -> Margin | None:
        """Return a margin as it is written; None where it is none."""
        found = re.fullmatch(r"([0-9.eE+-]+)( ?points?)?", str(value).strip())
        with suppress(ValueError):
            if found and 0 < (size := float(found[1])) < math.inf:
                return cls(size / 100, True) if found[2] else cls(size)
        return None

    def fits(self, metric: str, is_share: bool | None = None) -> str:
        """Return why the margin cannot be one of a metric, or nothing.

        Args:
            is_share: None to go by the metric's name; what lm_eval measures is a share then.
        """
        if is_share is None:
            is_share = metric.rpartition("/")[2] not in NO_SHARES
        if is_share and self.size >= 1:
            return f"{metric} is a share: write points ('2 points') or a number below 1 (0.02)"
        if self.points and not is_share:
            return f"{metric} is no share and has no points: write a number in its unit"
        return ""


@dataclass(frozen=True)
class Aims:
    """What a study asks. Without a primary metric all comparisons are one family.

    Args:
        subtasks: test the tasks of a group of lm-eval too, and not only their mean.
    """

    primary: str | None = None
    subtasks: bool = False
    margins: Mapping[str, Margin] = field(default_factory=dict)

    def asks_for(self, name: str) -> bool:
        """Return whether a task or metric is asked for by its own name."""
        words = (*([self.primary] if self.primary else ()), *self.margins)
        return any(name in _SEPARATOR.split(word) for word in words)

    def margin_of(self, metric: str) -> Margin | None:
        """Return the margin of a metric: that of the longest name it has here."""
        words = [word for word in self.margins if is_named(word, metric)]
        return self.margins[max(words, key=len)] if words else None


def is_named(word: str, metric: str) -> bool:
    """Return whether a word means a metric: its parts stand in the metric's name in their order.

    Example:
        >>> is_named("win_rate", "quickstart--alpaca_eval/win_rate")
        True
        >>> is_named("heldout_loss/loss", "heldout_loss/tokens-1a2b3c4d/loss")
        True
        >>> is_named("lm_eval/acc", "lm_eval/arc_easy/acc_norm")
        False
    """
    parts = iter(_SEPARATOR.split(metric))
    return all(part in parts for part in _SEPARATOR.split(word))


def known_metrics(recipe: EvalRecipe) -> list[str]:
    """Return the metrics of an eval by the names that a study may use, the first one of its table
    first.
    """
    known = SUITE_FACTS[recipe.suite.name].metrics or recipe.suite.tasks or ()
    return [f"{recipe.name}/{metric}" for metric in known]


def full_name(recipe: EvalRecipe, word: str) -> str | None:
    """Return what a word means in an eval; None where it measures no such thing.

    Of lm_eval the tasks are known and their metrics are not, so a word must name the eval or a task
    (one of a group's begins as its group does).
    """
    names = known_metrics(recipe)
    known = next((name for name in names if is_named(word, name)), None)
    if known or recipe.suite.name != "lm_eval":
        return known
    parts = _SEPARATOR.split(word)
    tasks = [task.rstrip("*_") for task in recipe.suite.tasks or ()]
    if any(part == task or part.startswith(f"{task}_") for part in parts for task in tasks):
        return word if is_named(recipe.name, word) else f"{recipe.name}/{word}"
    return None
