"""A paired comparison that does not ignore what has no verdict: tested with unresolved items left
out, all against and all in favour.

The interval spans all three, p is the largest of them, and where they do not all point in one
direction p is 1: a difference is only shown if it holds whatever the missing verdicts would have
been.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recipes_lib.statistics.paired import Array, Tested, number_or_none, paired_ps, paired_test
from recipes_lib.statistics.power import Spread
from recipes_lib.statistics.seeds import crossed_ps, question_means, seeds_test


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
    return replace(
        complete,
        low=min((low for low, _ in limits if low is not None), default=None),
        high=max((high for _, high in limits if high is not None), default=None),
        p=number_or_none(_largest(effects, ps)[0]),
        n=a.shape[1],
        questions=len(np.unique(labels)),
        unresolved=int((~known).sum()),
        lowest=worst.effect,
        highest=best.effect,
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
    effect: float | None, extremes: Sequence[Tested], resolved: float
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
        found.append(replace(one.spread, against=against, resolved=resolved))
    return max(found, key=lambda spread: spread.mde() or math.inf)


def _test(a: Array, b: Array, labels: NDArray[Any]) -> Tested:
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
