"""Whether one training is faster than another: the ratio of their tokens per second, from the times
of their steps.

A step's time is like that of the steps around it, so blocks of neighbouring steps are resampled and
not steps. There are few and long blocks, and Student's t with as many degrees of freedom: what that
costs in width is little, and the length need not be guessed from the autocorrelation.

Several trainings of an arm are the unit above its steps. Resampling two to five of them gives no
95% interval (benchmarks/statistics_simulation.py), so a t interval over trainings is used, and
nothing is said that is bolder than what the steps alone allow: p is the larger of both, and the
interval spans both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from recipes_lib.statistics.intervals import TAILS
from recipes_lib.statistics.paired import Tested
from recipes_lib.statistics.power import Spread

BLOCKS = 5
FEWEST_STEPS = 40  # steps, counted as if they were independent
RESAMPLES = 1000
_NOTHING = 1e-20  # what rounding leaves of a variance of zero


@dataclass(frozen=True)
class StepTimes:
    """Tokens and seconds of the steps of one training, in their order."""

    tokens: NDArray[np.float64]
    seconds: NDArray[np.float64]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return float(self.tokens.sum() / self.seconds.sum())

    def independent(self) -> float:
        """Return how many independent steps would know the rate as well, by the autocorrelation of
        neighbours.
        """
        parts = self.tokens / self.tokens.mean() - self.seconds / self.seconds.mean()
        square = float((parts**2).sum())
        alike = float((parts[1:] * parts[:-1]).sum()) / square if square > 0 else 0.0
        return len(parts) * (1 - max(alike, 0.0)) / (1 + max(alike, 0.0))

    def log_rate_variance(self, seed: int = 0) -> float:
        """Return the variance of the logarithm of the rate, from moving blocks.

        The last factor makes up for the centre of the blocks being estimated from them.

        Source: Künsch (1989), Annals of Statistics 17; Lahiri (2003), Resampling Methods for
            Dependent Data, chapter 2.
        """
        steps, rng = len(self.seconds), np.random.default_rng(seed)
        length = max(1, steps // BLOCKS)
        count = math.ceil(steps / length)
        starts = rng.integers(0, steps - length + 1, (RESAMPLES, count))
        sums = [np.concatenate([[0.0], np.cumsum(one)]) for one in (self.tokens, self.seconds)]
        tokens, seconds = ((one[starts + length] - one[starts]).sum(axis=1) for one in sums)
        drawn = float(np.log(tokens / seconds).var(ddof=1))
        return drawn * (count * length / steps) / (1 - length / steps)


def compare_rates(first: Sequence[StepTimes], second: Sequence[StepTimes]) -> Tested:
    """Return the test of two arms' tokens per second; the effect is the logarithm of their ratio,
    of several trainings of the ratio of geometric means.

    Args:
        first: the trainings of the first arm, each with `FEWEST_STEPS` steps at least.
        second: those of the second arm, as many.
    """
    arms, seeds = (first, second), len(first)
    rates = [np.log([one.rate for one in runs]) for runs in arms]
    effect = float(rates[0].mean() - rates[1].mean())
    # Every training has draws of its own.
    within = [
        one.log_rate_variance(seed=2 * place + side) / seeds**2
        for side, runs in enumerate(arms)
        for place, one in enumerate(runs)
    ]
    sources = [(within, [BLOCKS - 1] * len(within))]
    if seeds > 1:
        sources.append(([float(values.var(ddof=1)) / seeds for values in rates], [seeds - 1] * 2))
    half, p = 0.0, 0.0
    for variances, freedoms in sources:
        variance, freedom = sum(variances), _freedom(variances, freedoms)
        if variance > _NOTHING:
            error = math.sqrt(variance)
            half = max(half, float(special.stdtrit(freedom, TAILS[1])) * error)
            p = max(p, float(2 * special.stdtr(freedom, -abs(effect) / error)))
    steps = min(sum(len(one.seconds) for one in runs) for runs in arms)
    inside = sum(within)
    spread = Spread(inside, _freedom(*sources[0]))
    if seeds > 1:
        between, freedom = sum(sources[1][0]), _freedom(*sources[1])
        spread = Spread(0.0, seeds=between, seed_freedom=freedom, flips=inside)
    method = "moving blocks, t" if seeds == 1 else "trainings and moving blocks, t"
    known = half > 0
    return Tested(
        effect=effect,
        low=effect - half if known else None,
        high=effect + half if known else None,
        p=p if known else None,
        n=steps,
        questions=steps,
        seeds=seeds,
        test=method,
        interval_method=method,
        spread=spread if known else None,
    )


def _freedom(variances: Sequence[float], freedoms: Sequence[int]) -> float:
    """Degrees of freedom of a sum of estimated variances.

    Source: Welch (1947), Biometrika 34.
    """
    parts = sum(one**2 / freedom for one, freedom in zip(variances, freedoms, strict=True))
    return sum(variances) ** 2 / parts if parts > 0 else math.inf
