"""What a comparison of this size could have found: minimum detectable effect, and items needed for
an effect.

Normal approximation of a paired, two-sided test of a mean difference; n counts questions
(clusters), not judgments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special


@dataclass(frozen=True)
class Spread:
    """What the power of a comparison rests on: the variance of its effect, by source, and how well
    each source is known.

    Args:
        questions: variance over questions, which shrinks as there are more of them.
        freedom: degrees of freedom behind it; infinity for the normal curve.
        seeds: variance over seeds, which more questions do not shrink.
        seed_freedom: degrees of freedom behind that.
        step: what one item moves the effect by in an exact test of wins and losses; 0 for other
            tests.
        flips: variance of the means over seeds as the sign flips of whole questions see it; 0 where
            there is one seed.
        against: what open items, all counted against the difference, take from it.
        resolved: share of the items that have a value; the rest does not move with the difference.
    """

    questions: float
    freedom: float = math.inf
    seeds: float = 0.0
    seed_freedom: float = math.inf
    step: float = 0.0
    flips: float = 0.0
    against: float = 0.0
    resolved: float = 1.0

    def half(self, alpha: Any) -> Any:
        """Return half the width of a two-sided interval at level 1 - alpha, as the t intervals
        behind it have it.
        """
        over_questions, over_seeds = (
            _quantile(freedom, alpha) ** 2 for freedom in (self.freedom, self.seed_freedom)
        )
        whole = over_questions * self.questions + over_seeds * self.seeds
        return np.sqrt(np.maximum(whole, over_questions * self.flips))

    def mde(self, alpha: float = 0.05, power: float = 0.8) -> float | None:
        """Return the smallest difference found with probability `power` at level `alpha`; None
        without any spread.
        """
        return self._at(1.0, alpha, power)

    def questions_factor(
        self, effect: float, alpha: float = 0.05, power: float = 0.8
    ) -> float | None:
        """Return how many times the questions are needed for `effect` to be found; None where no
        number of questions would do.
        """
        low, high = 0.0, 1e7
        if not effect or (self._at(high, alpha, power) or math.inf) > abs(effect):
            return None
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (
                (low, middle)
                if (self._at(middle, alpha, power) or math.inf) <= abs(effect)
                else (middle, high)
            )
        return high

    def by_chance(self, effect: float, deviation: float) -> float:
        """Return how often two arms without a difference of their own come out `effect` apart, or
        further, where each training moves its arm by chance.

        Args:
            deviation: standard deviation of that move.
        """
        error = math.sqrt(self.questions + self.seeds + 2 * deviation**2)
        return float(2 * special.ndtr(-abs(effect) / error)) if error else 0.0

    def _at(self, factor: float, alpha: float, power: float) -> float | None:
        """The smallest difference that is found with `factor` times as many questions."""
        smallest = self._tested(factor, alpha, power)
        return (
            None
            if smallest is None or self.resolved <= 0
            else float((smallest + self.against) / self.resolved)
        )

    def _tested(self, factor: float, alpha: float, power: float) -> float | None:
        """The same for the difference that is tested, every open item counted against it."""
        variance = self.questions / factor
        if variance + self.seeds <= 0:
            return None
        if self.seeds:
            return self._over_seeds(variance, self.flips / factor, alpha, power)
        smallest = float(_quantile(self.freedom, alpha) + special.ndtri(power)) * math.sqrt(
            variance
        )
        if not self.step:
            return smallest
        # An exact test needs a whole item more than the normal curve says, and enough items that
        # differ to reach its level at all.
        fewest = math.ceil(math.log2(2 / alpha))
        return max(
            smallest + self.step / factor,
            float(special.gammaincinv(fewest, power)) * self.step / factor,
        )

    def _over_seeds(self, variance: float, flips: float, alpha: float, power: float) -> float:
        """The smallest difference found where seeds vary too: their spread, and with it the
        interval, comes out by chance.

        Power is averaged over what a few seeds may show of their variance (64 equally likely values
        of the chi-square behind it). The seeds' standard deviation enters without its bias: three
        seeds show 89% of it on average.
        """
        freedom = self.seed_freedom
        shown = math.sqrt(2 / freedom) * math.exp(
            special.gammaln((freedom + 1) / 2) - special.gammaln(freedom / 2)
        )
        seeds = self.seeds / shown**2
        drawn = special.chdtri(freedom, (np.arange(64) + 0.5) / 64) / freedom
        halves = np.sqrt(
            _quantile(self.freedom, alpha) ** 2 * variance
            + _quantile(freedom, alpha) ** 2 * seeds * drawn
        )
        halves = np.maximum(halves, _quantile(self.freedom, alpha) * math.sqrt(flips))
        error = math.sqrt(variance + seeds)
        low, high = 0.0, float(halves.max()) + 8 * error
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (
                (low, middle)
                if special.ndtr((middle - halves) / error).mean() >= power
                else (middle, high)
            )
        return high


def _quantile(freedom: float, alpha: Any) -> Any:
    """The two-sided quantile of Student's t, or of the normal curve: one for each alpha."""
    below = 1 - alpha / 2
    return special.ndtri(below) if math.isinf(freedom) else special.stdtrit(freedom, below)


def alpha_of(
    half: Callable[[NDArray[np.float64]], Any], distance: ArrayLike
) -> NDArray[np.float64]:
    """Return the alpha at which the half width of an interval equals `distance`, for each one."""
    away = np.asarray(distance, dtype=float)
    smallest = 1e-12
    low, high = np.full(away.shape, math.log(smallest)), np.zeros(away.shape)
    for _ in range(60):
        middle = (low + high) / 2
        wide = half(np.exp(middle)) > away
        low, high = np.where(wide, middle, low), np.where(wide, high, middle)
    least = half(np.full(away.shape, smallest)) <= away
    return np.where(away <= 0, 1.0, np.where(least, smallest, np.exp(high)))
