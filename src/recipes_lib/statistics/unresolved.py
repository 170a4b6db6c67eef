"""A paired comparison that does not ignore what has no verdict: tested with unresolved items left
out, all against and all in favour.

The interval spans all three, p is the largest of them, and where they do not all point in one
direction p is 1: a difference is only shown if it holds whatever the missing verdicts would have
been.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from recipes_lib.statistics.paired import (
    Array,
    PairedResult,
    number_or_none,
    paired_ps,
    paired_test,
)
from recipes_lib.statistics.power import Spread
from recipes_lib.statistics.seeds import alpha_of, crossed_ps, question_means, seeds_test


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
        wanted = abs(self.effect - bound) / reach * _half(spread, 0.05)
        return float(alpha_of(lambda alpha: _half(spread, alpha), wanted))

    def to_dict(self) -> dict[str, object]:
        """Return the fields as a JSON-ready dictionary."""
        return asdict(self)


def _half(spread: Spread, alpha: ArrayLike) -> Any:
    """Half the width of a two-sided interval at level 1 - alpha, as the t intervals behind a spread
    have it.
    """
    below = 1 - np.asarray(alpha) / 2
    over_questions, over_seeds = (
        (special.ndtri(below) if math.isinf(freedom) else special.stdtrit(freedom, below)) ** 2
        for freedom in (spread.freedom, spread.seed_freedom)
    )
    whole = over_questions * spread.questions + over_seeds * spread.seeds
    return np.sqrt(np.maximum(whole, over_questions * spread.flips))


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
    known = _known(a, b)
    every = [_test(*case) for case in _cases(a, b, labels, known, scale)]
    complete, spread = every[0], every[0].spread
    if len(every) > 1:
        resolved = 1 - float((np.isnan(a) | np.isnan(b)).mean())
        spread = _worst_spread(complete.effect, every[1:], resolved)
    worst, best = every[1:] or (complete, complete)
    limits = [(one.low, one.high) for one in every]
    ps, effects = (
        np.array([[math.nan if value is None else value] for value in values])
        for values in ([one.p for one in every], [one.effect for one in every])
    )
    return Tested(
        effect=complete.effect,
        low=min((low for low, _ in limits if low is not None), default=None),
        high=max((high for _, high in limits if high is not None), default=None),
        p=number_or_none(_largest(effects, ps)[0]),
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


def compare_ps(
    first: Array, second: Array, clusters: Array | None = None, *, scale: tuple[float, float]
) -> tuple[Array, Array]:
    """Return effect and p of `compare` for many studies of the same items, without intervals.

    Args:
        first: by study, seed and item.
        second: the same.
    """
    labels = np.arange(first.shape[-1]) if clusters is None else clusters
    known = _known(first, second)
    if (known != known[0]).any():  # each study has unresolved items of its own
        each = [
            compare_ps(a[None], b[None], labels, scale=scale)
            for a, b in zip(first, second, strict=True)
        ]
        return np.concatenate([one[0] for one in each]), np.concatenate([one[1] for one in each])
    cases = list(_cases(first, second, labels, known[0], scale))
    effects = np.stack([_effects(a, b) for a, b, _ in cases])
    return effects[0], _largest(effects, np.stack([_ps(*case) for case in cases]))


def _known(a: Array, b: Array) -> NDArray[np.bool_]:
    """Which items have a value in every seed of both arms."""
    return np.asarray(~(np.isnan(a).any(axis=-2) | np.isnan(b).any(axis=-2)))


def _cases(
    a: Array, b: Array, labels: NDArray[Any], known: NDArray[np.bool_], scale: tuple[float, float]
) -> Iterator[tuple[Array, Array, NDArray[Any]]]:
    """What is tested: without the unresolved items, with all of them against the first arm, and
    with all in its favour.
    """
    yield a[..., known], b[..., known], labels[known]
    if not known.all():
        for mine, theirs in (scale, scale[::-1]):
            yield np.where(np.isnan(a), mine, a), np.where(np.isnan(b), theirs, b), labels


def _largest(effects: Array, ps: Array) -> Array:
    """The p that holds in every case, a row each; NaN where no case has one."""
    largest = np.where(np.isnan(ps), 1.0, ps).max(axis=0)
    with np.errstate(invalid="ignore"):
        turns = (np.fmin.reduce(effects) <= 0) & (np.fmax.reduce(effects) >= 0) & (len(ps) > 1)
    return np.where(np.isnan(ps).all(axis=0), np.nan, np.where(turns, 1.0, largest))


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


def _test(a: Array, b: Array, labels: NDArray[Any]) -> PairedResult:
    """The test that fits: seeds crossed with questions, or one seed's items paired."""
    if max(a.shape[0], b.shape[0]) > 1:
        return seeds_test(a, b, labels)
    return paired_test(a[0], b[0], labels)


def _ps(a: Array, b: Array, labels: NDArray[Any]) -> Array:
    """The p of the test that fits, for many studies."""
    if max(a.shape[1], b.shape[1]) > 1:
        return crossed_ps(question_means(a - b, labels))
    return paired_ps(a[:, 0], b[:, 0], labels)


def _effects(a: Array, b: Array) -> Array:
    """The mean difference of each study; NaN without items."""
    if not a.shape[-1]:
        return np.full(len(a), np.nan)
    return np.asarray((a - b).mean(axis=(1, 2)))
