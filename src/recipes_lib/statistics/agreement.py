"""Agreement of two raters: accuracy with an interval, Cohen's kappa with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from recipes_lib.statistics.intervals import Interval, wilson


def accuracy(
    predicted: Sequence[Hashable], truth: Sequence[Hashable], level: float = 0.95
) -> Interval:
    """Return the share of items where both say the same, with its Wilson interval.

    Example:
        >>> accuracy(["A", "B"], ["A", "A"]).estimate
        0.5
    """
    return wilson(sum(a == b for a, b in zip(predicted, truth, strict=True)), len(truth), level)


def _kappa(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kappa of confusion tables of shape (..., labels, labels); NaN where only one label occurs."""
    total = table.sum(axis=(-1, -2))
    observed = np.trace(table, axis1=-2, axis2=-1) / total
    expected = (table.sum(axis=-1) * table.sum(axis=-2)).sum(axis=-1) / total**2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected < 1 - 1e-12, (observed - expected) / (1 - expected), np.nan)


def cohens_kappa(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return Cohen's kappa with a percentile bootstrap interval; None where only one label occurs
    (kappa is undefined).

    Example:
        >>> cohens_kappa(list("AABB"), list("AABB")).estimate
        1.0

    Source: Cohen (1960), Educational and Psychological Measurement 20.
    """
    pairs = list(zip(first, second, strict=True))
    labels = {
        label: index
        for index, label in enumerate(dict.fromkeys(label for pair in pairs for label in pair))
    }
    n = len(pairs)
    if n == 0:
        return Interval(None, None, None, 0, "bootstrap", level)
    table = np.zeros((len(labels), len(labels)))
    for a, b in pairs:
        table[labels[a], labels[b]] += 1
    estimate = float(_kappa(table))
    if np.isnan(estimate):
        return Interval(None, None, None, n, "undefined: one label", level)
    if n == 1:
        return Interval(estimate, None, None, n, "bootstrap", level)
    drawn = (
        np.random.default_rng(seed)
        .multinomial(n, (table / n).reshape(-1), size=resamples)
        .reshape(resamples, *table.shape)
    )
    kappas = _kappa(drawn.astype(float))
    kappas = kappas[~np.isnan(kappas)]
    low, high = np.quantile(kappas, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(estimate, float(low), float(high), n, "bootstrap", level)
