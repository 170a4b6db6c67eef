"""What a comparison of this size could have found: minimum detectable effect, and items needed for an effect.

Normal approximation of a paired, two-sided test of a mean difference; n counts questions (clusters), not judgments.
"""

from __future__ import annotations

import math

from numpy.typing import ArrayLike
from scipy import stats

from recipes_lib.statistics.intervals import standard_error


def _multiplier(alpha: float, power: float) -> float:
    """Standard errors between no effect and an effect found with probability `power`."""
    return float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power))


def minimum_detectable_effect(
    differences: ArrayLike, clusters: ArrayLike | None = None, *, alpha: float = 0.05, power: float = 0.8, error: float | None = None
) -> float | None:
    """Return the smallest mean difference found with probability `power`; None without a spread to base it on.

    Args:
        error: the standard error, where it is known already (several seeds).
    """
    error = standard_error(differences, clusters) if error is None else error
    return None if not error else _multiplier(alpha, power) * error


def items_needed(effect: float | None, standard_deviation: float | None, *, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Return how many items would find `effect`; None for no effect or an unknown spread.

    Args:
        effect: mean difference to be found.
        standard_deviation: of the per-item differences.

    Example:
        >>> items_needed(0.1, 1.0)
        785
    """
    if not effect or standard_deviation is None:
        return None
    return max(2, math.ceil((_multiplier(alpha, power) * standard_deviation / effect) ** 2))


def discordant_standard_deviation(discordant_share: float, effect: float) -> float:
    """Return the standard deviation of a difference of two 0/1 outcomes from the share of items where they differ."""
    return math.sqrt(max(0.0, discordant_share - effect**2))
