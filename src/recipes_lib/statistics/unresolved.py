"""A paired comparison that does not ignore what has no verdict: tested with unresolved items left
out, all against and all in favour.

The interval spans all three, p is the largest of them, and where they do not all point in one
direction p is 1: a difference is only shown if it holds whatever the missing verdicts would have
been.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recipes_lib.statistics.paired import PairedResult, paired_test
from recipes_lib.statistics.power import Spread, alpha_of
from recipes_lib.statistics.seeds import seeds_test


@dataclass(frozen=True)
class Tested:
    """The comparison of two arms on one metric.

    `effect` is over resolved items; `lowest` and `highest` are the effects with every unresolved
    item against the first arm, and in its favour. `low` and `high` span the three intervals.
    `spread` is what the power of this comparison rests on, in the worse of these two cases where
    items are unresolved.
    """

    effect: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    questions: int
    seeds: int
    unresolved: int
    lowest: float | None
    highest: float | None
    test: str
    interval_method: str
    spread: Spread | None = None

    def mde(self, alpha: float = 0.05) -> float | None:
        """Return the smallest difference, over the items with a value, that is found with 80%
        probability at level `alpha`.
        """
        return self.spread.mde(alpha) if self.spread else None

    def questions_needed(self, alpha: float = 0.05) -> int | None:
        """Return how many questions would find the observed effect with 80% probability; None where
        no number would do.
        """
        factor = (
            self.spread.questions_factor(self.effect, alpha)
            if self.spread and self.effect
            else None
        )
        return None if factor is None else max(2, math.ceil(factor * self.questions))

    def touching(self, bound: float) -> float | None:
        """Return the alpha at which the two-sided interval touches `bound`: half of it is the
        one-sided p of the effect lying on the estimate's side of it. None without an interval.

        The interval's own reach at 95% is stretched to other levels as its t intervals are, so that
        at 95% the answer is that of the interval.
        """
        if self.effect is None or self.low is None or self.high is None:
            return None
        reach = self.effect - self.low if bound < self.effect else self.high - self.effect
        if reach <= 0:
            return None
        spread = self.spread or (  # seeds that agree to the last item are few seeds still
            Spread(1.0) if self.seeds < 2 else Spread(0.0, seeds=1.0, seed_freedom=self.seeds - 1)
        )
        wanted = abs(self.effect - bound) / reach * spread.half(0.05)
        return alpha_of(spread.half, wanted)

    def to_dict(self) -> dict[str, object]:
        """Return the fields as a JSON-ready dictionary."""
        return asdict(self)


def compare(
    first: ArrayLike,
    second: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    scale: tuple[float, float] = (0.0, 1.0),
) -> Tested:
    """Return the comparison of two arms on the same items, NaN standing for an unresolved one.

    Args:
        first: values of the first arm: one row per training seed, one column per item; a flat list
            is one seed.
        second: values of the second arm, or one row for all seeds (a base model; 0.5 for outcomes
            against the opponent itself).
        clusters: the question of each item.
        scale: smallest and largest possible value, which stand in for unresolved items.

    Raises:
        ValueError: the shapes do not fit.
    """
    a, b = (np.atleast_2d(np.asarray(values, dtype=float)) for values in (first, second))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"paired arms need the same items: {a.shape[1]} and {b.shape[1]} values")
    labels = np.arange(a.shape[1]) if clusters is None else np.asarray(clusters)
    known = ~(np.isnan(a).any(axis=0) | np.isnan(b).any(axis=0))
    complete = _test(a[:, known], b[:, known], labels[known])
    every, spread, (low, high) = [complete], complete.spread, scale
    if not known.all():
        for mine, theirs in ((low, high), (high, low)):
            filled = np.where(np.isnan(a), mine, a), np.where(np.isnan(b), theirs, b)
            every.append(_test(*filled, labels))
        resolved = 1 - float((np.isnan(a) | np.isnan(b)).mean())
        spread = _worst_spread(complete.effect, every[1:], resolved)
    worst, best = every[1:] or (complete, complete)
    limits = [(one.low, one.high) for one in every]
    effects = [one.effect for one in every if one.effect is not None]
    p = max((1.0 if one.p is None else one.p for one in every), default=None)
    if all(one.p is None for one in every):
        p = None
    elif len(every) > 1 and min(effects) <= 0 <= max(effects):
        p = 1.0
    return Tested(
        effect=complete.effect,
        low=min((low for low, _ in limits if low is not None), default=None),
        high=max((high for _, high in limits if high is not None), default=None),
        p=p,
        n=a.shape[1],
        questions=len(np.unique(labels)),
        seeds=max(a.shape[0], b.shape[0]),
        unresolved=int((~known).sum()),
        lowest=worst.effect,
        highest=best.effect,
        test=complete.test,
        interval_method=complete.interval_method,
        spread=spread,
    )


def _worst_spread(
    effect: float | None, extremes: Sequence[PairedResult], resolved: float
) -> Spread | None:
    """What power rests on where items are open: a difference must be found with all of them against
    it, whichever arm it favours.

    With a share f of the values open, the tested effect is 1 - f times that over resolved items,
    less what the open ones count against it; that is read from the effects here.
    """
    found = []
    for one, sign in zip(extremes, (1, -1), strict=True):
        if one.spread is None or one.effect is None or effect is None:
            return None
        against = max(sign * (resolved * effect - one.effect), 0.0)
        found.append(dataclasses.replace(one.spread, against=against, resolved=resolved))
    return max(found, key=lambda spread: spread.mde() or math.inf)


def _test(a: NDArray[np.float64], b: NDArray[np.float64], labels: NDArray[Any]) -> PairedResult:
    """The test that fits: seeds crossed with questions, or one seed's items paired."""
    if max(a.shape[0], b.shape[0]) > 1:
        return seeds_test(a, b, labels)
    return paired_test(a[0], b[0], labels)
