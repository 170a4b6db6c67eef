"""Paired comparisons of two arms on the same items: exact McNemar, sign-flip permutation, clustered bootstrap of the difference.

Positive effects favour the first arm. The tests are two-sided.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from recipes_lib.statistics.intervals import Interval, cluster_sums, mean_interval

EXACT_SIGN_FLIPS = 14  # up to 2**14 sign patterns are enumerated
_CHUNK = 2_000_000


@dataclass(frozen=True)
class PairedResult:
    """The difference of two arms on the same items; `p` is None where no test can be made."""

    effect: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    test: str
    interval_method: str
    level: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return asdict(self)


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
    return float(min(1.0, 2 * stats.binom.cdf(min(only_first, only_second), discordant, 0.5)))


def paired_differences(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Return first minus second.

    Raises:
        ValueError: if the arms have different numbers of items.
    """
    a, b = np.asarray(first, dtype=float).reshape(-1), np.asarray(second, dtype=float).reshape(-1)
    if len(a) != len(b):
        raise ValueError(f"paired arms need the same items: {len(a)} and {len(b)} values")
    return a - b


def sign_flip_p(differences: ArrayLike, clusters: ArrayLike | None = None, *, resamples: int = 10_000, seed: int = 0) -> float | None:
    """Return the two-sided p of the sign-flip permutation test on the sum of the differences; None when all are zero.

    Whole clusters are flipped. Up to 14 non-zero clusters all patterns are enumerated, above that `resamples` random ones plus
    the observed one are used, so p is never 0.
    """
    values = np.asarray(differences, dtype=float).reshape(-1)
    sums = cluster_sums(values, clusters)[0] if len(values) else values
    sums = sums[np.abs(sums) > 1e-12]
    count = len(sums)
    if count == 0:
        return None
    observed = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    if count <= EXACT_SIGN_FLIPS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=count)))
        return float((np.abs(signs @ sums) >= observed).mean())
    rng = np.random.default_rng(seed)
    hits, step = 0, max(1, _CHUNK // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        signs = rng.integers(0, 2, (rows, count)) * 2.0 - 1.0
        hits += int((np.abs(signs @ sums) >= observed).sum())
    return (hits + 1) / (resamples + 1)


def paired_interval(
    first: ArrayLike, second: ArrayLike, clusters: ArrayLike | None = None, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return the mean difference with its bootstrap interval over clusters (questions)."""
    return mean_interval(paired_differences(first, second), clusters, resamples=resamples, seed=seed, level=level)


def paired_test(
    first: ArrayLike, second: ArrayLike, clusters: ArrayLike | None = None, *, seed: int = 0, level: float = 0.95
) -> PairedResult:
    """Compare two arms item by item: effect, interval and p.

    McNemar's exact test where both arms are 0/1 and no cluster has two items; the sign-flip permutation test otherwise.
    """
    differences = paired_differences(first, second)
    interval = mean_interval(differences, clusters, seed=seed, level=level)
    binary = all(np.isin(np.asarray(arm, dtype=float), (0.0, 1.0)).all() for arm in (first, second))
    clustered = clusters is not None and len(np.unique(np.asarray(clusters))) < len(differences)
    if binary and not clustered:
        p, test = mcnemar_p(int((differences > 0).sum()), int((differences < 0).sum())), "mcnemar exact"
    else:
        p, test = sign_flip_p(differences, clusters, seed=seed), "sign flip"
    return PairedResult(interval.estimate, interval.low, interval.high, p, len(differences), test, interval.method, level)
