"""What the remaining seeds of a study can still show: for a look that may stop it, and for plans.

Seeds add no questions. So the means of two looks have the variance of the questions in common, and
only what is new in each seed becomes less: given what was seen, a later mean is normal about a
value between that and the truth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

from recipes_lib.analysis.looks import FUTILE_BELOW, shares
from recipes_lib.stats import ALPHA, SPREADS, Comparison, Estimate

_STUDIES = 4000  # simulated for a plan


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a later test can show: a difference, and more where there is a margin."""

    seeds: int
    alpha: float
    margin: float | None = None
    # 1 where the first arm's mean may not be lower than the other's by the margin, -1 where it may
    # not be higher, 0 where only equivalence is asked for.
    favour: int = 0


def chance(test: Comparison, target: Target) -> float:
    """Return the probability that more seeds show anything, the largest of all open verdicts.

    The truth is taken to be one standard error more in favour of it than what was seen: a study
    that is stopped for futility makes no claim, but it should seldom lose one.
    """
    return max(_chance(case, target) for case in (test.resolved, test.worst, test.best))


def _chance(case: Estimate, target: Target) -> float:
    left = case.seeds / target.seeds
    shared = max(case.var_pooled - case.var_rest, 0.0)
    new = max(case.var_seeds, case.var_rest)
    now = shared + new
    then = shared + new * left
    if now <= 0:
        return 0.0
    later = replace(
        case,
        seeds=target.seeds,
        var_pooled=shared + case.var_rest * left,
        var_rest=case.var_rest * left,
        var_seeds=case.var_seeds * left,
    )
    width = later.half_width(target.alpha)
    error = math.sqrt(now)
    spread = math.sqrt(max(then * (1 - then / now), 1e-18))

    def above(bound: float, seen: float, truth: float) -> float:
        """Return the probability that the later mean lies above a bound."""
        mean = truth + then / now * (seen - truth)
        return float(special.ndtr((mean - bound) / spread))

    size = abs(case.center)
    farther = size + error
    chances = [above(width, size, farther) + 1 - above(-width, size, farther)]
    if target.margin is not None:
        inside = target.margin - width
        nearer = max(size - error, 0.0)
        if inside > 0:
            chances.append(above(-inside, size, nearer) - above(inside, size, nearer))
        if target.favour:
            seen = target.favour * case.center
            chances.append(above(-inside, seen, seen + error))
    return max(chances)


def expected_seeds(
    looks: Sequence[int],
    metric: str,
    questions: int,
    effect: float,
    arms: int = 2,
    comparisons: float = 1,
) -> float | None:
    """Return how many seeds of each arm a study with such looks trains on average, if one arm is
    ahead of the others by `effect`, with the spread that `stats.planned_effect` assumes. None of a
    metric whose spread nobody assumed.
    """
    spreads = SPREADS.get(metric.rpartition("/")[2])
    if spreads is None or not questions:
        return None
    # of the mean of one arm: the same in every training, and new in each of them
    shared = spreads[0] / 4 / questions
    from_questions = spreads[0] / 4 / questions
    new = from_questions + spreads[1] ** 2
    rng = np.random.default_rng(0)
    means = rng.normal(0, math.sqrt(shared), (arms, _STUDIES, 1))
    means = means + rng.normal(0, math.sqrt(new), (arms, _STUDIES, looks[-1]))
    means[0] += effect
    is_open = np.ones(_STUDIES, bool)
    trained = np.zeros(_STUDIES)
    for seeds, share in zip(looks, shares(len(looks)), strict=True):
        is_decided = np.ones(_STUDIES, bool)
        for first, second in itertools.combinations(means[:, :, :seeds], 2):
            pair = _PlannedPair(first - second, 2 * shared, 2 * from_questions, questions)
            shown = pair.size > pair.half_width(ALPHA * share / comparisons, seeds)
            last_alpha = ALPHA * shares(len(looks))[-1] / comparisons
            is_decided &= shown | (pair.chance(last_alpha, looks[-1]) < FUTILE_BELOW)
        if seeds == looks[-1]:
            is_decided[:] = True
        trained[is_open & is_decided] = seeds
        is_open &= ~is_decided
    return float(trained.mean())


@dataclass(frozen=True)
class _PlannedPair:
    """The differences of two arms in simulated studies, with the variance that is assumed."""

    differences: NDArray[np.float64]  # studies x seeds
    shared: float  # variance of questions, the same in every training
    rest: float  # variance of questions, new in each
    questions: int

    @property
    def size(self) -> NDArray[np.float64]:
        """The size of the mean difference."""
        return np.abs(self.differences.mean(axis=1))

    @property
    def over_seeds(self) -> NDArray[np.float64]:
        """The variance of the mean over seeds."""
        return self.differences.var(axis=1, ddof=1) / self.differences.shape[1]

    def half_width(self, alpha: float, seeds: int) -> NDArray[np.float64]:
        """Return half the interval with so many seeds, as far as is known from those there are."""
        of_questions = float(special.stdtrit(self.questions, 1 - alpha / 2)) ** 2
        of_seeds = float(special.stdtrit(max(1, seeds - 1), 1 - alpha / 2)) ** 2
        over_seeds = self.over_seeds * self.differences.shape[1] / seeds
        crossed = of_questions * self.shared + of_seeds * over_seeds
        least = of_questions * (self.shared + self.rest / seeds)
        return np.sqrt(np.maximum(crossed, least))

    def chance(self, alpha: float, seeds: int) -> NDArray[np.float64]:
        """Return the probability that so many seeds show a difference, as `chance` does."""
        has = self.differences.shape[1]
        new = np.maximum(self.over_seeds, self.rest / has)
        now = self.shared + new
        then = self.shared + new * has / seeds
        truth = self.size + np.sqrt(now)
        mean = truth + then / now * (self.size - truth)
        spread = np.sqrt(np.maximum(then * (1 - then / now), 1e-18))
        width = self.half_width(alpha, seeds)
        above = special.ndtr((mean - width) / spread)
        below = special.ndtr((-mean - width) / spread)
        return np.asarray(above + below)
