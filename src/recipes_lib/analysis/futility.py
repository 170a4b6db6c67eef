"""What the remaining seeds of a study can still show: for a look that may stop it, and for plans.

Seeds add no questions. So the means of two looks have the variance of the questions in common, and
only what is new in each seed becomes less: given what was seen, a later mean is normal about a
value between that and the truth.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import special

from recipes_lib.analysis.looks import FUTILE_BELOW, LAST_SHARE, shares
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

    def above(bound: float, seen: float, truth: float) -> float:
        return float(_above(bound, seen, truth, now, then))

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


def _above(bound: Any, seen: Any, truth: Any, now: Any, then: Any) -> Any:
    """Return the probability that a later mean, of variance `then`, lies above a bound; numbers or
    arrays. What was seen has the variance `now`.
    """
    mean = truth + then / now * (seen - truth)
    spread = np.sqrt(np.maximum(then * (1 - then / now), 1e-18))
    return special.ndtr((mean - bound) / spread)


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
    rng = np.random.default_rng(0)
    # Of the questions one half is the same in every training, and the other new in each.
    of_questions = spreads[0] / 2 / questions  # of the difference of two arms
    means = rng.normal(0, math.sqrt(of_questions / 2), (arms, _STUDIES, 1))
    new = math.sqrt(of_questions / 2 + spreads[1] ** 2)
    means = means + rng.normal(0, new, (arms, _STUDIES, looks[-1]))
    means[0] += effect
    trained = np.full(_STUDIES, float(looks[-1]))
    is_open = np.ones(_STUDIES, bool)
    for seeds, share in zip(looks[:-1], shares(len(looks)), strict=False):
        is_decided = np.ones(_STUDIES, bool)
        for first, second in itertools.combinations(means[:, :, :seeds], 2):
            size = np.abs((first - second).mean(axis=1))
            over_seeds = (first - second).var(axis=1, ddof=1) / seeds
            widths = []
            for count, level in ((seeds, share), (looks[-1], LAST_SHARE)):
                alpha = ALPHA * level / comparisons
                by_question = float(special.stdtrit(questions, 1 - alpha / 2)) ** 2
                by_seed = float(special.stdtrit(count - 1, 1 - alpha / 2)) ** 2
                crossed = by_question * of_questions + by_seed * over_seeds * seeds / count
                least = by_question * of_questions * (1 + 1 / count)
                widths.append(np.sqrt(np.maximum(crossed, least)))
            over_seeds = np.maximum(over_seeds, of_questions / seeds)
            now = of_questions + over_seeds
            then = of_questions + over_seeds * seeds / looks[-1]
            truth = size + np.sqrt(now)
            chance_left = _above(widths[1], size, truth, now, then)
            chance_left += 1 - _above(-widths[1], size, truth, now, then)
            is_decided &= (size > widths[0]) | (chance_left < FUTILE_BELOW)
        trained[is_open & is_decided] = seeds
        is_open &= ~is_decided
    return float(trained.mean())
