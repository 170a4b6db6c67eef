"""What a comparison of this size could have found: minimum detectable effect, and items needed for
an effect.

Normal approximation of a paired, two-sided test of a mean difference; n counts questions
(clusters), not judgments. Needs no numpy: a plan starts fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

from recipes_lib.statistics.distributions import (
    chi_square_quantile,
    normal_below,
    two_sided_quantile,
)

POWER = 0.8  # with what chance a difference is to be found
_DRAWS = 64  # equally likely values of a chi-square


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
        draws: answers to each question.
        drawn: what of the variance is new in each answer; 0 where that is not known.
    """

    questions: float
    freedom: float = math.inf
    seeds: float = 0.0
    seed_freedom: float = math.inf
    step: float = 0.0
    flips: float = 0.0
    against: float = 0.0
    resolved: float = 1.0
    draws: int = 1
    drawn: float = 0.0

    @property
    def drawn_share(self) -> float:
        """What share of a question's variance is new in each answer, where each has one."""
        whole = self.with_draws(1)
        return whole.drawn / (whole.flips if self.seeds else whole.questions)

    def with_draws(self, draws: int) -> Spread:
        """Return the spread with another number of answers to each question."""
        drawn = self.drawn * self.draws / draws
        change = drawn - self.drawn
        if self.seeds:  # the answers of each training are its own
            seeds, flips = self.seeds + change, self.flips + change
            return replace(self, seeds=seeds, flips=flips, draws=draws, drawn=drawn)
        return replace(self, questions=self.questions + change, draws=draws, drawn=drawn)

    def mde(self, alpha: float = 0.05) -> float | None:
        """Return the smallest difference found at level `alpha`; None without any spread."""
        return self._at(1.0, alpha)

    def questions_factor(self, effect: float, alpha: float = 0.05) -> float | None:
        """Return how many times the questions are needed for `effect` to be found; None where no
        number would do.
        """
        low, high = 0.0, 1e7
        if not effect or (self._at(high, alpha) or math.inf) > abs(effect):
            return None
        for _ in range(50):
            middle = (low + high) / 2
            enough = (self._at(middle, alpha) or math.inf) <= abs(effect)
            low, high = (low, middle) if enough else (middle, high)
        return high

    def by_chance(self, effect: float, deviation: float) -> float:
        """Return how often two arms without a difference of their own come out `effect` apart, or
        further, where each training moves its arm by chance.

        Args:
            deviation: standard deviation of that move.
        """
        error = math.sqrt(self.questions + self.seeds + 2 * deviation**2)
        return 2 * normal_below(-abs(effect) / error) if error else 0.0

    def _at(self, factor: float, alpha: float) -> float | None:
        """The smallest difference that is found with `factor` times as many questions."""
        smallest = self._tested(factor, alpha)
        if smallest is None or self.resolved <= 0:
            return None
        return float((smallest + self.against) / self.resolved)

    def _tested(self, factor: float, alpha: float) -> float | None:
        """The same for the difference that is tested, every open item counted against it."""
        variance = self.questions / factor
        if variance + self.seeds <= 0:
            return None
        if self.seeds:
            return self._over_seeds(variance, self.flips / factor, alpha)
        found = two_sided_quantile(self.freedom, alpha) + NormalDist().inv_cdf(POWER)
        smallest = found * math.sqrt(variance)
        if not self.step:
            return smallest
        # An exact test needs a whole item more than the normal curve says, and enough items that
        # differ to reach its level at all.
        fewest = math.ceil(math.log2(2 / alpha))
        needed = chi_square_quantile(2 * fewest, 1 - POWER) / 2 * self.step / factor
        return max(smallest + self.step / factor, needed)

    def _over_seeds(self, variance: float, flips: float, alpha: float) -> float:
        """The smallest difference found where seeds vary too: their spread, and with it the
        interval, comes out by chance.

        Power is averaged over what a few seeds may show of their variance (64 equally likely values
        of the chi-square behind it). The seeds' standard deviation enters without its bias: three
        seeds show 89% of it on average.
        """
        freedom = self.seed_freedom
        shown = math.sqrt(2 / freedom) * math.exp(
            math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
        )
        seeds = self.seeds / shown**2
        over_questions = two_sided_quantile(self.freedom, alpha) ** 2
        over_seeds = two_sided_quantile(freedom, alpha) ** 2
        halves = []
        for draw in range(_DRAWS):
            drawn = chi_square_quantile(int(freedom), (draw + 0.5) / _DRAWS) / int(freedom)
            whole = over_questions * variance + over_seeds * seeds * drawn
            halves.append(math.sqrt(max(whole, over_questions * flips)))
        error = math.sqrt(variance + seeds)
        low, high = 0.0, max(halves) + 8 * error
        for _ in range(40):
            middle = (low + high) / 2
            found = sum(normal_below((middle - half) / error) for half in halves) / _DRAWS
            low, high = (low, middle) if found >= POWER else (middle, high)
        return high
