"""What a study asks of its table: the primary metric, and what is tested at all.

Metrics are named by a part of their name that is enough: `win_rate`, `alpaca_eval/win_rate`,
`heldout_loss`, `lm_eval/gsm8k`. Needs no numpy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from recipes_lib.eval_recipe import EvalRecipe

# By suite; a metric that is only measured when an option asks for it stands last.
_METRICS = {
    "alpaca_eval": ("win_rate", "grade"),
    "mt_bench": ("grade", "win_rate"),
    "checks": ("pass_rate",),
    "heldout_loss": ("loss", "bits_per_byte"),
}
_SEPARATOR = re.compile("/|--")


@dataclass(frozen=True)
class Aims:
    """What a study asks. Without a primary metric all comparisons are one family.

    Args:
        subtasks: test the tasks of a group of lm-eval too, and not only their mean.
    """

    primary: str | None = None
    subtasks: bool = False

    def asks_for(self, name: str) -> bool:
        """Return whether a task or metric is asked for by its own name."""
        return self.primary is not None and name in _SEPARATOR.split(self.primary)


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
    first; of lm_eval its tasks.
    """
    known = _METRICS.get(recipe.suite.name) or recipe.suite.tasks or ()
    return [f"{recipe.name}/{metric}" for metric in known]


def full_name(recipe: EvalRecipe, word: str) -> str | None:
    """Return what a word means in an eval: the name of an eval its first metric; None where it
    measures no such thing.

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
