"""Paired comparisons of two arms on the same items: exact McNemar, sign-flip permutation, clustered
bootstrap of the difference.

Positive effects favour the first arm. The tests are two-sided. Those that end in `_ps` test many
studies at once, a row each, and give NaN where no test can be made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from recipes_lib.statistics.intervals import (
    Interval,
    Z,
    codes_of,
    mean_interval,
    standard_error,
)
from recipes_lib.statistics.power import Spread

EXACT_SIGN_FLIPS = 14  # up to 2**14 sign patterns are enumerated
# Clusters above which the permutation distribution is normal to all digits that matter.
NORMAL_SIGN_FLIPS = 2_000
MAX_LATTICE = 20_000
_CHUNK = 2_000_000
Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Tested:
    """The comparison of two arms on one metric; `p` is None where no test can be made.

    `effect` is over resolved items; `lowest` and `highest` are the effects with every unresolved
    item against the first arm, and in its favour. `low` and `high` span the three intervals.
    `spread` is what the power of this comparison rests on, in the worse of these two cases where
    items are unresolved; None where nothing varies.
    """

    effect: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    questions: int
    seeds: int = 1
    unresolved: int = 0
    lowest: float | None = None
    highest: float | None = None
    test: str
    interval_method: str
    spread: Spread | None = None

    def mde(self, alpha: float = 0.05) -> float | None:
        """Return the smallest difference, over the items with a value, that is found with 80%
        probability at level `alpha`.
        """
        return self.spread.mde(alpha) if self.spread else None

    def questions_needed(self, alpha: float = 0.05) -> int | None:
        """Return how many questions would find the observed effect with 80% probability."""
        if not (self.spread and self.effect):
            return None
        factor = self.spread.questions_factor(self.effect, alpha)
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


def _half(spread: Spread, alpha: ArrayLike) -> Any:
    """Half the width of a two-sided interval at level 1 - alpha, by the t intervals behind a
    spread.
    """
    below = 1 - np.asarray(alpha) / 2
    over_questions, over_seeds = (
        (special.ndtri(below) if math.isinf(freedom) else special.stdtrit(freedom, below)) ** 2
        for freedom in (spread.freedom, spread.seed_freedom)
    )
    whole = over_questions * spread.questions + over_seeds * spread.seeds
    return np.sqrt(np.maximum(whole, over_questions * spread.flips))


def alpha_of(half: Callable[[Array], Any], distance: ArrayLike) -> Array:
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


def mcnemar_p(only_first: int, only_second: int) -> float | None:
    """Return the exact two-sided p of McNemar's test; None without a discordant pair.

    Args:
        only_first: items that the first arm alone got right.
        only_second: items that the second arm alone got right.

    Example:
        >>> mcnemar_p(1, 9)
        0.021484375
    """
    discordant = only_first + only_second
    if discordant == 0:
        return None
    return float(min(1.0, 2 * special.bdtr(min(only_first, only_second), discordant, 0.5)))


def sign_flip_ps(
    sums: Array, *, resamples: int = 10_000, seed: int = 0, lattice: int = MAX_LATTICE
) -> Array:
    """Return the two-sided p of the sign-flip permutation test of many studies, one study a row:
    on the sum of its differences, of which each is that of a whole cluster; NaN where all are zero.

    Outcomes and grades lie on a lattice, where the distribution over all sign patterns is computed
    exactly. Otherwise up to 14 non-zero clusters all patterns are enumerated, above that
    `resamples` random ones plus the observed one are used, so p is never 0, and above 2,000
    clusters the normal limit of the same distribution.

    Args:
        lattice: sum of the whole numbers up to which the distribution is computed exactly.
    """
    ps = np.full(len(sums), np.nan)
    there = np.abs(sums) > 1e-12
    counts = there.sum(axis=1)
    known: dict[bytes, Array] = {}
    for count in np.unique(counts[counts > 0]):
        mine = np.flatnonzero(counts == count)
        rows = sums[mine][there[mine]].reshape(len(mine), count)
        steps, exact = _lattices(rows, lattice)
        for place in np.flatnonzero(exact):
            ps[mine[place]] = _exact_sign_flip_p(steps[place], known)
        if not exact.all():
            left = rows[~exact]
            ps[mine[~exact]] = _sampled_sign_flip_ps(left, resamples, seed)
    return ps


def _sampled_sign_flip_ps(sums: Array, resamples: int, seed: int) -> Array:
    """The p of sums that lie on no lattice, none of them zero."""
    count, totals = sums.shape[1], sums.sum(axis=1)
    # Single precision is enough to rank sums.
    observed = np.abs(totals) - 1e-6 * np.abs(sums).sum(axis=1)
    if count <= EXACT_SIGN_FLIPS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=count)))
        return np.array(
            [
                (np.abs(signs @ row) >= least).mean()
                for row, least in zip(sums, observed, strict=True)
            ]
        )
    if count > NORMAL_SIGN_FLIPS:
        limit = 2 * special.ndtr(-np.abs(totals) / np.sqrt((sums**2).sum(axis=1)))
        return np.asarray(limit)
    rng = np.random.default_rng(seed)
    hits, single = np.zeros(len(sums), dtype=int), sums.T.astype(np.float32)
    step = max(1, _CHUNK // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        bits = np.frombuffer(rng.bytes(-(-rows * count // 8)), dtype=np.uint8)
        flips = np.unpackbits(bits, count=rows * count).reshape(rows, count).astype(np.float32)
        for part in np.array_split(np.arange(len(sums)), -(-rows * len(sums) // _CHUNK)):
            moved = np.abs(2 * (flips @ single[:, part]) - totals[part])
            hits[part] += (moved >= observed[part]).sum(axis=0)
    return (hits + 1) / (resamples + 1)


def _lattices(sums: Array, most: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The sums as whole multiples of a common step, and for which rows these are small enough."""
    for parts in (1, 2, 3, 4, 6, 12):
        scaled = sums * parts
        steps = np.rint(scaled).astype(np.int64)
        if np.abs(scaled - steps).max() < 1e-9:
            steps //= np.gcd.reduce(np.abs(steps), axis=1)[:, None]
            return steps, np.abs(steps).sum(axis=1) <= most
    return steps, np.zeros(len(sums), dtype=bool)


def _exact_sign_flip_p(steps: NDArray[np.int64], known: dict[bytes, Array]) -> float:
    """The exact p for whole numbers, from the distribution of their sum under random signs.

    Args:
        known: distributions by the sizes they are of; studies that differ in signs alone share one.
    """
    often = np.bincount(np.abs(steps))
    sizes = np.flatnonzero(often)
    counts = often[sizes]
    if len(sizes) == 1:
        return mcnemar_p(int((steps > 0).sum()), int((steps < 0).sum())) or 0.0
    key = often.tobytes()
    if key not in known:
        chances = np.ones(1)
        for size, count in zip(map(int, sizes), map(int, counts), strict=True):
            before, coins = chances, _fair_coins(count)
            chances = np.zeros(len(before) + size * count)
            # Positive terms only: the small chances at the ends keep their digits.
            for first in range(min(size, len(before))):
                part = np.convolve(before[first::size], coins)
                chances[first::size][: len(part)] = part
        known[key] = chances
    total = int((sizes * counts).sum())
    observed = abs(int(steps.sum()))
    # index i stands for i in positive steps, which is a sum of 2 i - total
    upper = float(known[key][(total + observed) // 2 :].sum())
    return min(1.0, 2 * upper) if observed else 1.0


def _fair_coins(count: int) -> NDArray[np.float64]:
    """Chance of 0..count heads among `count` fair coins."""
    heads = np.arange(count + 1)
    logarithms = (
        special.gammaln(count + 1)
        - special.gammaln(heads + 1)
        - special.gammaln(count - heads + 1)
        - count * math.log(2)
    )
    return np.asarray(np.exp(logarithms))


def paired_binary_interval(only_first: int, only_second: int, n: int) -> Interval:
    """Return the difference of two paired shares with the adjusted Wald interval, which holds with
    few or no discordant pairs.

    Args:
        only_first: items that the first arm alone got right.
        only_second: items that the second arm alone got right.
        n: all items.

    Example:
        >>> interval = paired_binary_interval(10, 2, 100)
        >>> interval.estimate, round(interval.low, 3), round(interval.high, 3)
        (0.08, 0.008, 0.149)

    Source: Bonett and Price (2012), Journal of Educational and Behavioral Statistics 37.
    """
    if n == 0:
        return Interval(None, None, None, 0, "adjusted wald")
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    center, half = first - second, Z * math.sqrt((first + second - (first - second) ** 2) / (n + 2))
    return Interval(
        (only_first - only_second) / n,
        max(-1.0, center - half),
        min(1.0, center + half),
        n,
        "adjusted wald",
    )


def paired_test(first: ArrayLike, second: ArrayLike, clusters: ArrayLike | None = None) -> Tested:
    """Compare two arms item by item: effect, interval and p.

    McNemar's exact test and the adjusted Wald interval where the differences are wins and losses of
    one size (two arms of 0/1 outcomes, or pairs won, lost and tied) and no cluster has two items;
    the sign-flip permutation test and the bootstrap otherwise.

    Raises:
        ValueError: if the arms have different numbers of items.
    """
    a, b = (np.asarray(values, dtype=float).reshape(-1) for values in (first, second))
    if len(a) != len(b):
        raise ValueError(f"paired arms need the same items: {len(a)} and {len(b)} values")
    differences, n = a - b, len(a)
    size, questions = _size_of(a, b), n if clusters is None else len(np.unique(clusters))
    error = standard_error(differences, clusters)
    spread = Spread(error**2, questions - 1) if error else None
    if size is None or questions < n:
        interval, test, scale = mean_interval(differences, clusters), "sign flip", 1.0
    else:
        won, lost = int((differences > 0).sum()), int((differences < 0).sum())
        interval, test, scale = paired_binary_interval(won, lost, n), "mcnemar exact", size
        spread = Spread(error**2, step=size / n) if error else None
    return Tested(
        effect=float(differences.mean()) if n else None,
        low=None if interval.low is None else interval.low * scale,
        high=None if interval.high is None else interval.high * scale,
        p=number_or_none(paired_ps(a[None], b[None], clusters)[0]),
        n=n,
        questions=questions,
        test=test,
        interval_method=interval.method,
        spread=spread,
    )


def paired_ps(first: Array, second: Array, clusters: ArrayLike | None = None) -> Array:
    """Return the p of `paired_test` for many studies of the same items, one study a row."""
    differences, n = first - second, first.shape[1]
    if not n:
        return np.full(len(first), np.nan)
    codes = np.arange(n) if clusters is None else codes_of(clusters)
    if codes.max() + 1 < n:
        return sign_flip_ps(np.stack([np.bincount(codes, weights=row) for row in differences]))
    if _size_of(first, second) is None:
        return sign_flip_ps(differences[:, np.argsort(codes)])
    won, lost = (differences > 0).sum(axis=1), (differences < 0).sum(axis=1)
    exact = 2 * special.bdtr(np.minimum(won, lost).astype(float), won + lost, 0.5)
    return np.where(won + lost, np.minimum(1.0, exact), np.nan)


def _size_of(first: Array, second: Array) -> float | None:
    """The size that every difference other than zero must have, where there is one."""
    if np.isin(first, (0.0, 1.0)).all() and np.isin(second, (0.0, 1.0)).all():
        return 1.0
    halves = np.isin(first, (0.0, 0.5, 1.0)).all() and (second == 0.5).all()
    return 0.5 if halves else None


def number_or_none(value: float) -> float | None:
    """Return a number as a float, nothing for NaN."""
    return None if math.isnan(value) else float(value)
