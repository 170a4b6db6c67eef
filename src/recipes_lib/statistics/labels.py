"""Human labels of some items correct what a judge said of all: prediction-powered inference.

The corrected mean is that of the judge's values, shrunk, plus what the labelled items show the
judge to be off by. Each item gets a value of its own whose plain mean is the corrected mean and
whose spread is that of the estimate, so that every test and interval of this project takes it. The
labelled items are taken to be a random choice of all items.

Source: Angelopoulos et al. (2023), "Prediction-powered inference"; Angelopoulos, Duchi and Zrnic
    (2023), "PPI++", with the weight of its authors' ppi_py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special

from recipes_lib.statistics.intervals import TAILS, Z
from recipes_lib.statistics.paired import Array

FEWEST_LABELS = 20
_UNSEEN = 1.0  # squared size of an error over the whole scale that no label happened to show


def rectified(judged: Array, human: Array) -> Array:
    """Return values whose mean, training by training, is the judge's, corrected by the labels; NaN
    where the judge gave no verdict.

    Args:
        judged: the judge's value of each item, items last; NaN where there is none.
        human: what people said of it; NaN where nobody was asked.
    """
    known = ~np.isnan(judged)
    labelled = known & ~np.isnan(human)
    n, items = (np.sum(some, axis=-1, keepdims=True) for some in (labelled, known))

    def mean(values: Array) -> Array:
        return np.asarray(np.where(labelled, values, 0.0).sum(axis=-1, keepdims=True) / n)

    centred = judged - mean(judged)
    spread = np.nanvar(judged, axis=-1, ddof=1, keepdims=True)
    weight = mean(centred * (human - mean(human))) / np.where(spread > 0, spread, np.inf)
    weight = np.clip(weight, 0.0, 1.0)
    off = mean(human - weight * judged)
    rest = np.where(labelled, human - weight * judged - off, 0.0)
    # n labels tell little of their own spread: two numbers were fitted to them, and where the judge
    # errs rarely they may hold no error at all. What stands for that moves no mean: the errors that
    # were seen, made larger; where there are none, errors of either sign in turn.
    squares = (rest**2).sum(axis=-1, keepdims=True)
    place = np.cumsum(labelled, axis=-1)
    turns = np.where(labelled & (place <= n // 2 * 2), 1.0 - 2 * (place % 2), 0.0)
    seen = squares > 1e-12
    rest = np.where(
        seen,
        rest * np.sqrt(1 + _UNSEEN / np.where(seen, squares, 1.0)),
        turns * np.sqrt(_UNSEEN / (n // 2 * 2)),
    )
    wider = np.sqrt(n / (n - 2)) * special.stdtrit(n - 2, TAILS[1]) / Z
    return np.asarray(weight * judged + off + wider * items / n * rest)


def labels_of_each(judged: Array, human: Array) -> NDArray[np.int64]:
    """Return how many items with a verdict people labelled, training by training."""
    return np.asarray((~np.isnan(judged) & ~np.isnan(human)).sum(axis=-1))


def random_choice_p(judged: Array, human: Array) -> float:
    """Return how likely a random choice of items is to have a judged mean as far from that of all
    as the labelled ones have: the smallest p over trainings, times their number.
    """
    labelled = ~np.isnan(judged) & ~np.isnan(human)
    n, items = labelled.sum(axis=-1), (~np.isnan(judged)).sum(axis=-1)
    away = np.where(labelled, judged, 0.0).sum(axis=-1) / n - np.nanmean(judged, axis=-1)
    error = np.sqrt(np.nanvar(judged, axis=-1, ddof=1) / n * (1 - n / items))
    z = np.where(error > 1e-12, np.abs(away) / np.where(error > 1e-12, error, 1.0), 0.0)
    return float(min(1.0, 2 * special.ndtr(-z).min() * z.size))
