"""Confidence intervals for rates, means and agreement, clustered where one question gave several
values.

The estimate is always the plain one; only the interval knows about clusters. Random resampling is
seeded, so the same numbers give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TypedDict, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

LEVEL = 0.95
TAILS = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)
Z = float(special.ndtri(TAILS[1]))
MAX_BOOTSTRAP_CLUSTERS = 10_000
STUDENTISED_BELOW = 100
_CHUNK = 250_000  # resampled indices held in memory at once
_FEW_KINDS = 64


class StoredInterval(TypedDict):
    """An `Interval` as a file holds it."""

    estimate: float | None
    low: float | None
    high: float | None
    n: int
    method: str
    level: float


class StoredBounds(TypedDict):
    """`RateBounds` as a file holds them."""

    all_lost: float | None
    all_won: float | None
    low: float | None
    high: float | None
    n: int
    unresolved: int
    level: float


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; `None` where n is too small to say."""

    estimate: float | None
    low: float | None
    high: float | None
    n: int = field(metadata={"minimum": 0})
    method: str
    level: float = LEVEL

    def within(self, lowest: float, highest: float) -> Interval:
        """Return the interval without what lies outside the scale, where the truth cannot be: its
        coverage is the same. An interval of no width has no limits: values that all agree say
        nothing about the next one.

        Example:
            >>> Interval(0.975, 0.924, 1.026, 40, "studentised").within(0, 1).high
            1
        """
        limits = [
            None
            if limit is None or self.method == "zero variance"
            else min(max(limit, lowest), highest)
            for limit in (self.low, self.high)
        ]
        return replace(self, low=limits[0], high=limits[1])

    def to_dict(self) -> StoredInterval:
        """Return the fields as a JSON-ready dictionary."""
        return cast(StoredInterval, asdict(self))


@dataclass(frozen=True)
class RateBounds:
    """A rate with unresolved items: what it is if all of them were lost, and if all were won.

    `low` and `high` are the outer limits: the Wilson limit below when all unresolved items are
    lost, and the one above when all are won.
    """

    all_lost: float | None
    all_won: float | None
    low: float | None
    high: float | None
    n: int
    unresolved: int
    level: float = LEVEL

    @classmethod
    def between(cls, lost: Interval, won: Interval, unresolved: int) -> RateBounds:
        """Return the bounds between a rate with all unresolved items lost, and with all won."""
        return cls(lost.estimate, won.estimate, lost.low, won.high, lost.n, unresolved)

    def to_dict(self) -> StoredBounds:
        """Return the fields as a JSON-ready dictionary."""
        return cast(StoredBounds, asdict(self))


def wilson(successes: int, n: int) -> Interval:
    """Return a share with its Wilson score interval.

    Raises:
        ValueError: if not 0 <= successes <= n.

    Example:
        >>> interval = wilson(8, 10)
        >>> round(interval.low, 3), round(interval.high, 3)
        (0.49, 0.943)

    Source: Wilson (1927), Journal of the American Statistical Association 22.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} is not a share")
    if n == 0:
        return Interval(None, None, None, 0, "wilson")
    return Interval(successes / n, *_wilson_limits(successes / n, n), n, "wilson")


def _wilson_limits(share: float, n: float) -> tuple[float, float]:
    """The Wilson limits of a share of n independent items."""
    center = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    low = 0.0 if share == 0 else max(0.0, center - half)
    high = 1.0 if share == 1 else min(1.0, center + half)
    return low, high


def share_interval(hits: Sequence[bool], clusters: Sequence[Hashable] | None = None) -> Interval:
    """Return the share of hits with its Wilson interval; where clusters have several items, that of
    as many independent items as have the clustered standard error, and of no more than there are.

    Source: Dean and Pagano (2015), Journal of Survey Statistics and Methodology 3.

    Example:
        >>> twice = share_interval([True, True, False, False], ["a", "a", "b", "b"])
        >>> twice.low < share_interval([True, True, False, False]).low
        True
    """
    n, total = len(hits), sum(hits)
    count = n if clusters is None else len(set(clusters))
    if count == n:
        return wilson(total, n)
    share, error = total / n, standard_error(np.asarray(hits, dtype=float), _codes(clusters))
    independent = min(n, share * (1 - share) / error**2) if error else count
    return Interval(share, *_wilson_limits(share, independent), n, "wilson, clustered")


def _codes(clusters: Sequence[Hashable] | None) -> list[int]:
    """A number for each cluster."""
    places: dict[Hashable, int] = {}
    return [places.setdefault(one, len(places)) for one in clusters or ()]


def rate_bounds(successes: int, n: int, unresolved: int) -> RateBounds:
    """Return a rate's bounds when `unresolved` of the `n` items have no outcome.

    Raises:
        ValueError: if the counts do not fit.

    Example:
        >>> bounds = rate_bounds(60, 100, 10)
        >>> bounds.all_lost, bounds.all_won
        (0.6, 0.7)
    """
    if unresolved < 0 or successes + unresolved > n:
        raise ValueError(f"{successes} successes and {unresolved} unresolved do not fit into {n}")
    return RateBounds.between(wilson(successes, n), wilson(successes + unresolved, n), unresolved)


def codes_of(clusters: ArrayLike) -> NDArray[np.int64]:
    """Return a number for each item's cluster: 0, 1, ... in the order of their names."""
    return np.unique(np.asarray(clusters), return_inverse=True)[1].reshape(-1)


def cluster_sums(
    values: NDArray[np.float64], clusters: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each cluster's sum and number of items; without clusters, every item is its own."""
    if clusters is None:
        return values, np.ones_like(values)
    codes = codes_of(clusters)
    if len(codes) != len(values):
        raise ValueError(f"{len(codes)} cluster labels for {len(values)} values")
    return np.bincount(codes, weights=values), np.bincount(codes).astype(float)


def _fold(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Put more than 10,000 clusters into 10,000 groups at random: the mean stays as it is."""
    if len(sums) <= MAX_BOOTSTRAP_CLUSTERS:
        return sums, sizes
    codes = rng.permutation(len(sums)) % MAX_BOOTSTRAP_CLUSTERS
    return np.bincount(codes, weights=sums), np.bincount(codes, weights=sizes)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    """Return a one-dimensional float array; a NaN here is a programming error of the caller."""
    array = np.asarray(values, dtype=float).reshape(-1)
    if not np.isfinite(array).all():
        raise ValueError(
            "values hold NaN or infinity; resolve or count such items before asking for an interval"
        )
    return array


def _resample(
    sums: NDArray[np.float64],
    sizes: NDArray[np.float64],
    resamples: int,
    rng: np.random.Generator,
    with_errors: bool = True,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean of each of `resamples` draws of clusters and, where it is wanted, its linearised
    standard error.

    Where few distinct values occur (outcomes, grades), how often each is drawn is one multinomial
    draw: the same distribution for a fraction of the time.
    """
    count = len(sums)
    kinds, often = np.unique(np.column_stack([sums, sizes]), axis=0, return_counts=True)
    means, errors = np.empty(resamples), np.zeros(resamples)
    few = len(kinds) <= _FEW_KINDS and len(kinds) * 4 <= count
    alone = bool((sizes == 1).all())  # then every draw has as many items
    step = max(1, _CHUNK // (len(kinds) if few else count))
    for start in range(0, resamples, step):
        stop = min(resamples, start + step)
        if few:
            times = rng.multinomial(count, often / count, size=stop - start)
            total = times @ kinds[:, 1]
            mean = (times @ kinds[:, 0]) / total
        else:
            index = rng.integers(0, count, (stop - start, count))
            drawn, sized = sums[index], None if alone else sizes[index]
            total = np.full(stop - start, float(count)) if sized is None else sized.sum(axis=1)
            mean = drawn.sum(axis=1) / total
        means[start:stop] = mean
        if with_errors:
            if few:
                squares = (times * (kinds[:, 0] - mean[:, None] * kinds[:, 1]) ** 2).sum(axis=1)
            else:
                part = mean[:, None] if sized is None else mean[:, None] * sized
                squares = ((drawn - part) ** 2).sum(axis=1)
            errors[start:stop] = np.sqrt(squares * count / max(1, count - 1)) / total
    return means, errors


def standard_error(values: ArrayLike, clusters: ArrayLike | None = None) -> float | None:
    """Return the mean's standard error over clusters (ratio-mean linearisation); None below two."""
    sums, sizes = cluster_sums(_finite(values), clusters)
    if len(sums) < 2:
        return None
    residual = sums - sums.sum() / sizes.sum() * sizes
    return float(np.sqrt((residual**2).sum() * len(sums) / (len(sums) - 1)) / sizes.sum())


def bca(
    values: ArrayLike, clusters: ArrayLike | None = None, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the mean with a bias-corrected and accelerated bootstrap interval over clusters; the
    jackknife of a (ratio) mean is computed in closed form.

    Source: Efron (1987), Journal of the American Statistical Association 82.
    """
    array, rng = _finite(values), np.random.default_rng(seed)
    n, estimate = len(array), float(array.mean()) if len(array) else None
    sums, sizes = _fold(*cluster_sums(array, clusters), rng)
    if estimate is None or len(sums) < 2:
        return Interval(estimate, None, None, n, "bca")
    means = np.sort(_resample(sums, sizes, resamples, rng, with_errors=False)[0])
    tolerance = 1e-12 * max(1.0, abs(estimate))
    if means[-1] - means[0] <= tolerance:
        return Interval(estimate, estimate, estimate, n, "zero variance")
    below = (
        np.count_nonzero(means < estimate - tolerance)
        + 0.5 * np.count_nonzero(np.abs(means - estimate) <= tolerance)
    ) / resamples
    bias = float(special.ndtri(np.clip(below, 1 / (2 * resamples), 1 - 1 / (2 * resamples))))
    left_out = (sums.sum() - sums) / (sizes.sum() - sizes)
    deviation = left_out.mean() - left_out
    spread = float((deviation**2).sum())
    acceleration = 0.0 if spread == 0 else float((deviation**3).sum() / (6 * spread**1.5))
    z = bias + special.ndtri(TAILS)
    low, high = np.quantile(means, special.ndtr(bias + z / (1 - acceleration * z)))
    return Interval(estimate, float(low), float(high), n, "bca")


def studentised(
    values: ArrayLike, clusters: ArrayLike | None = None, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the mean with a bootstrap-t interval over clusters; it keeps its coverage where n is
    small and values are skewed.

    Its limits are never inside those of Student's t: on grades, whose few values the bootstrap
    repeats, that one covers better (benchmarks/statistics_simulation.py). Where more than 1% of the
    resamples have no spread (few distinct values), Student's t interval is used and named.
    """
    array, rng = _finite(values), np.random.default_rng(seed)
    n, estimate = len(array), float(array.mean()) if len(array) else None
    sums, sizes = _fold(*cluster_sums(array, clusters), rng)
    error = standard_error(sums, None) if clusters is None else standard_error(array, clusters)
    if estimate is None or error is None:
        return Interval(estimate, None, None, n, "studentised")
    if error <= 1e-12 * max(1.0, abs(estimate)):
        return Interval(estimate, estimate, estimate, n, "zero variance")
    means, errors = _resample(sums, sizes, resamples, rng)
    half = float(special.stdtrit(len(sums) - 1, TAILS[1])) * error
    usable = errors > 1e-9 * error
    if usable.mean() < 0.99:
        return Interval(estimate, estimate - half, estimate + half, n, "student t")
    lower, upper = np.quantile((means[usable] - estimate) / errors[usable], TAILS)
    low, high = min(float(-upper * error), -half), max(float(-lower * error), half)
    return Interval(estimate, estimate + low, estimate + high, n, "studentised")


def mean_interval(
    values: ArrayLike, clusters: ArrayLike | None = None, *, resamples: int = 2000
) -> Interval:
    """Return the mean with the interval this project uses: studentised below 100 clusters, else
    BCa.
    """
    count = len(np.unique(np.asarray(clusters))) if clusters is not None else np.size(values)
    method = studentised if count < STUDENTISED_BELOW else bca
    return method(values, clusters, resamples=resamples)


def rate_interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Interval:
    """Return the mean of values from 0 to 1 with its interval; where all of them are 0, or all 1,
    that of a share.

    Example:
        >>> rate_interval([1.0, 1.0, 1.0]).low < 0.5
        True
        >>> rate_interval([0.5, 0.5, 0.5]).low is None
        True
    """
    if set(values) in ({0.0}, {1.0}):
        return share_interval([value == 1 for value in values], clusters)
    return mean_interval(values, clusters).within(0, 1)


# ---- Agreement of two raters ----


def accuracy(predicted: Sequence[Hashable], truth: Sequence[Hashable]) -> Interval:
    """Return the share of items where both say the same, with its Wilson interval.

    Example:
        >>> accuracy(["A", "B"], ["A", "A"]).estimate
        0.5
    """
    return wilson(sum(a == b for a, b in zip(predicted, truth, strict=True)), len(truth))


def _kappa(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kappa of confusion tables of shape (..., labels, labels); NaN where only one label occurs."""
    total = table.sum(axis=(-1, -2))
    observed = np.trace(table, axis1=-2, axis2=-1) / total
    expected = (table.sum(axis=-1) * table.sum(axis=-2)).sum(axis=-1) / total**2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected < 1 - 1e-12, (observed - expected) / (1 - expected), np.nan)


def cohens_kappa(
    first: Sequence[Hashable], second: Sequence[Hashable], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return Cohen's kappa with a percentile bootstrap interval; None where only one label occurs.

    Example:
        >>> cohens_kappa(list("AABB"), list("AABB")).estimate
        1.0

    Source: Cohen (1960), Educational and Psychological Measurement 20.
    """
    pairs = list(zip(first, second, strict=True))
    labels = list(dict.fromkeys(label for pair in pairs for label in pair))
    n = len(pairs)
    if n == 0:
        return Interval(None, None, None, 0, "bootstrap")
    table = np.zeros((len(labels), len(labels)))
    for a, b in pairs:
        table[labels.index(a), labels.index(b)] += 1
    estimate = float(_kappa(table))
    if np.isnan(estimate):
        return Interval(None, None, None, n, "undefined: one label")
    if n == 1:
        return Interval(estimate, None, None, n, "bootstrap")
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, (table / n).reshape(-1), size=resamples)
    kappas = _kappa(drawn.reshape(resamples, *table.shape).astype(float))
    low, high = np.quantile(kappas[~np.isnan(kappas)], TAILS)
    return Interval(estimate, float(low), float(high), n, "bootstrap")
