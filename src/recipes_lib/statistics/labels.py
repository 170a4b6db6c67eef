"""Human labels of some items correct what a judge said of all: prediction-powered inference.

The corrected mean is that of the judge's values, shrunk, plus what the labelled items show the
judge to be off by. Each item gets a value of its own whose plain mean is the corrected mean and
whose spread is that of the estimate, so that every test and interval of this project takes it. The
labelled items are taken to be a random choice of all items.

Source: Angelopoulos et al. (2023), "Prediction-powered inference"; Angelopoulos, Duchi and Zrnic
    (2023), "PPI++", with the weight of its authors' ppi_py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from recipes_lib.statistics.intervals import TAILS, Z, codes_of
from recipes_lib.statistics.paired import Array

FEWEST_LABELS = 20
_UNSEEN = 1.0  # squared size of an error over the whole scale that no label happened to show


def rectified(judged: Array, human: Array, questions: NDArray[Any] | None = None) -> Array:
    """Return values whose mean, training by training, is the judge's, corrected by the labels; NaN
    where the judge gave no verdict.

    Args:
        judged: the judge's value of each item, items last; NaN where there is none.
        human: what people said of it; NaN where nobody was asked.
        questions: the question of each item: labels of several answers to one question tell of the
            judge's errors no more than one label does. None where each item has its own.
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
    # Few labels tell little of their own spread: two numbers were fitted to them, and where the
    # judge errs rarely they may hold no error at all. What stands for that moves no mean: the
    # errors that were seen, made larger; where there are none, errors of either sign in turn.
    codes = _codes(questions, judged)
    squares = (_sums(rest, codes) ** 2).sum(axis=-1, keepdims=True)
    asked = _sums(labelled.astype(float), codes)  # labels of each question
    told = (asked > 0).sum(axis=-1, keepdims=True)
    place = np.cumsum(asked > 0, axis=-1)
    signs = np.where((asked > 0) & (place <= told // 2 * 2), 1.0 - 2 * (place % 2), 0.0)
    turns = signs / np.maximum(asked, 1.0)
    if codes is not None:
        turns = np.where(labelled, turns[..., codes], 0.0)
    unseen = _UNSEEN * (n / told) ** 2
    seen = squares > 1e-12
    rest = np.where(
        seen,
        rest * np.sqrt(1 + unseen / np.where(seen, squares, 1.0)),
        turns * np.sqrt(unseen / (told // 2 * 2)),
    )
    wider = np.sqrt(told / (told - 2)) * special.stdtrit(told - 2, TAILS[1]) / Z
    return np.asarray(weight * judged + off + wider * items / n * rest)


def labelled_questions(
    judged: Array, human: Array, questions: NDArray[Any] | None = None
) -> NDArray[np.int64]:
    """Return how many questions of each training have a labelled answer with a verdict."""
    labelled = ~np.isnan(judged) & ~np.isnan(human)
    counts = _sums(labelled.astype(float), _codes(questions, judged))
    return np.asarray((counts > 0).sum(axis=-1))


def num_labels(judged: Array, human: Array) -> int:
    """Return how many items with a verdict people labelled, all trainings together."""
    return int((~np.isnan(judged) & ~np.isnan(human)).sum())


def random_choice_p(judged: Array, human: Array, questions: NDArray[Any] | None = None) -> float:
    """Return how likely a random choice of items, or of questions with all their items, is to have
    a judged mean as far from that of all as the labelled ones have: the smallest p over trainings,
    times their number.
    """
    known, codes = ~np.isnan(judged), _codes(questions, judged)
    labelled = known & ~np.isnan(human)
    n, items = labelled.sum(axis=-1), known.sum(axis=-1)
    away = np.where(labelled, judged, 0.0).sum(axis=-1) / n - np.nanmean(judged, axis=-1)
    variance = np.nanvar(judged, axis=-1, ddof=1)
    # Answers to one question are alike: what they share counts once, however many are labelled.
    sizes, sums, squares = (
        _sums(np.where(known, judged, 0.0) ** power * known, codes) for power in (0, 1, 2)
    )
    freedom = np.maximum(sizes - 1, 0.0).sum(axis=-1)
    inside = (squares - sums**2 / np.maximum(sizes, 1.0)).sum(axis=-1)
    own = np.where(freedom > 0, inside / np.maximum(freedom, 1.0), 0.0)
    shared = np.maximum(variance - own, 0.0)
    own = variance - shared
    asked = (_sums(labelled.astype(float), codes) ** 2).sum(axis=-1)
    error = np.sqrt((shared * asked + own * n) / n**2 * (1 - n / items))
    z = np.where(error > 1e-12, np.abs(away) / np.where(error > 1e-12, error, 1.0), 0.0)
    return float(min(1.0, 2 * special.ndtr(-z).min() * z.size))


def _codes(questions: NDArray[Any] | None, judged: Array) -> NDArray[np.int64] | None:
    """The number of each item's question; None where each item has its own."""
    if questions is None or not judged.shape[-1]:
        return None
    codes = codes_of(questions)
    return None if codes.max() + 1 == len(codes) else codes


def _sums(values: Array, codes: NDArray[np.int64] | None) -> Array:
    """The sum of each question's items, items last."""
    if codes is None:
        return values
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    return np.asarray(np.add.reduceat(values[..., order], starts, axis=-1))
