"""Arms that were trained with several seeds: seeds and questions are crossed, and both vary.

Resampling two to five seeds cannot give a 95% interval, and Satterthwaite's approximation covers
90-93% with two or three seeds that differ (benchmarks/statistics_simulation.py measures both).
Howe's combination of two t intervals, one over seeds and one over questions, covers 94-98% from two
seeds on; that it is wide with two seeds is the truth about two seeds.

A few seeds can agree to the last item by chance, and then show no variance at all. So no statement
is bolder than the one that the questions alone allow: p is the larger of Howe's and the sign flips
of whole questions averaged over seeds, and the interval spans both.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from recipes_lib.statistics.intervals import LEVEL, Interval, codes_of, mean_interval
from recipes_lib.statistics.paired import Array, Tested, alpha_of, number_or_none, sign_flip_ps
from recipes_lib.statistics.power import Spread

METHOD = "seeds and questions, t"
# Beyond it the sign flips are sampled, or normal: sums over seeds have so many sizes that each of a
# study's copies would take seconds.
MAX_LATTICE_OVER_SEEDS = 5_000


def question_means(values: Array, clusters: ArrayLike | None) -> Array:
    """Return one value per seed and question, scaled so that their plain mean is the mean over all
    items.

    Args:
        values: one row per seed, one column per item; or a stack of such tables, one per study.
        clusters: the question of each item; None where each item is a question.
    """
    if clusters is None or not values.size:
        return values
    codes = codes_of(clusters)
    count = int(codes.max()) + 1
    if count == len(codes):
        return values[..., np.argsort(codes)]
    rows = values.reshape(-1, len(codes))
    sums = np.stack([np.bincount(codes, weights=row, minlength=count) for row in rows])
    sizes = np.bincount(codes, minlength=count).astype(float)
    # A question with more items than others weighs more in the mean, and moves it less when it is
    # left out: linearised ratio mean.
    mean = values.mean(axis=(-2, -1), keepdims=True)
    sums = sums.reshape(*values.shape[:-1], count)
    return np.asarray(mean + (sums - mean * sizes) * count / len(codes))


def _mean_squares(tables: Array) -> tuple[Array, Array, Array]:
    """Mean squares of seeds, questions and their interaction of (seeds x questions) tables."""
    seeds, questions = tables.shape[-2:]
    overall = tables.mean(axis=(-2, -1), keepdims=True)
    by_seed, by_question = tables.mean(axis=-1, keepdims=True), tables.mean(axis=-2, keepdims=True)
    rest = tables - by_seed - by_question + overall
    both = (-2, -1)
    return (
        questions * ((by_seed - overall) ** 2).sum(axis=both) / (seeds - 1),
        seeds * ((by_question - overall) ** 2).sum(axis=both) / (questions - 1),
        (rest**2).sum(axis=both) / ((seeds - 1) * (questions - 1)),
    )


def crossed_interval(table: ArrayLike, level: float = LEVEL) -> tuple[Interval, float | None]:
    """Return the mean of a (seeds x questions) table with an interval over both, and the two-sided
    p against zero.

    Howe's squared half width is t(S-1)^2 MS(seeds)/SQ + t(Q-1)^2 (MS(questions) - MS(rest))/SQ, the
    second part never below zero; his p is the level at which that interval touches zero. The
    interval is never inside the one over questions averaged over seeds, and p never below the
    sign-flip p of those averages.

    Returns:
        The interval (limits None for fewer than two seeds or questions) and p (None where there is
        no variance).

    Source: Howe (1974), Journal of the American Statistical Association 69; Burdick and Graybill
        (1992), Confidence Intervals on Variance Components, chapter 3.
    """
    values = np.asarray(table, dtype=float)
    seeds, questions = values.shape
    estimate = float(values.mean()) if values.size else None
    if estimate is None or seeds < 2 or questions < 2:
        return Interval(estimate, None, None, questions, METHOD, level), None
    p = number_or_none(crossed_ps(values[None])[0])
    if p is None:
        return Interval(estimate, estimate, estimate, questions, "zero variance", level), None
    by_seed, excess = (float(part[0]) for part in _variances(values[None]))
    wide = float(_half(1 - level, values.shape, by_seed, excess))
    over_questions = mean_interval(values.mean(axis=0))
    low, high = estimate - wide, estimate + wide
    if over_questions.low is not None and over_questions.high is not None:
        low, high = min(low, over_questions.low), max(high, over_questions.high)
    return Interval(estimate, low, high, questions, METHOD, level), p


def crossed_ps(tables: Array) -> Array:
    """Return the p of `crossed_interval` for many (seeds x questions) tables, NaN without one."""
    if min(tables.shape[1:]) < 2:
        return np.full(len(tables), np.nan)
    by_seed, excess = _variances(tables)
    flips = sign_flip_ps(tables.sum(axis=1), lattice=MAX_LATTICE_OVER_SEEDS)
    distance = np.abs(tables.mean(axis=(1, 2)))
    crossed = alpha_of(lambda alpha: _half(alpha, tables.shape, by_seed, excess), distance)
    p = np.maximum(crossed, np.nan_to_num(flips))
    return np.where(np.isnan(by_seed), np.nan, p)


def _variances(tables: Array) -> tuple[Array, Array]:
    """The variance of each table's mean over its seeds, and what questions add to it; NaN where
    nothing varies.
    """
    seeds, questions = tables.shape[1:]
    by_seed, by_question, rest = (square / (seeds * questions) for square in _mean_squares(tables))
    by_seed = np.where(by_seed + by_question <= 1e-24, np.nan, by_seed + _rounding(tables) / seeds)
    return by_seed, np.maximum(by_question - rest, 0.0)


def _rounding(tables: Array) -> Array:
    """The variance that a seed's mean has for being a multiple of the smallest step between values:
    the step squared over 12.

    Source: Sheppard (1897), Proceedings of the London Mathematical Society 29.
    """
    gaps = np.diff(np.sort(tables.reshape(len(tables), -1), axis=1), axis=1)
    steps = np.where(gaps > 1e-9, gaps, np.inf).min(axis=1, initial=np.inf)
    return np.where(np.isfinite(steps), steps / tables.shape[2], 0.0) ** 2 / 12


def _half(alpha: ArrayLike, shape: tuple[int, ...], by_seed: ArrayLike, excess: ArrayLike) -> Array:
    """Half the width of Howe's interval."""
    first, second = (special.stdtrit(size - 1, 1 - np.asarray(alpha) / 2) for size in shape[-2:])
    return np.sqrt(first**2 * by_seed + second**2 * excess)


def seeds_test(first: ArrayLike, second: ArrayLike, clusters: ArrayLike | None = None) -> Tested:
    """Compare two arms with several seeds item by item; seeds that both arms have are paired in the
    order given.

    Args:
        first: one row per seed, one column per item.
        second: the same for the other arm; a single row is an arm without seeds of its own (a base
            model, an opponent).
        clusters: the question of each item.

    Raises:
        ValueError: the arms have different numbers of seeds (above one) or of items.
    """
    a, b = (np.atleast_2d(np.asarray(values, dtype=float)) for values in (first, second))
    if a.shape[1] != b.shape[1] or (a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0])):
        raise ValueError(
            f"arms of {a.shape[0]} x {a.shape[1]} and {b.shape[0]} x {b.shape[1]} seeds x items"
            " cannot be paired"
        )
    table = question_means(a - b, clusters)
    interval, p = crossed_interval(table)
    return Tested(
        effect=interval.estimate,
        low=interval.low,
        high=interval.high,
        p=p,
        n=a.shape[1],
        questions=table.shape[1],
        seeds=len(table),
        test="crossed t",
        interval_method=interval.method,
        spread=_spread(table),
    )


def seed_deviation(table: Array) -> float:
    """Return by how much the means of trainings differ beyond what their questions explain: a
    standard deviation, 0 below two seeds or questions.
    """
    if min(table.shape) < 2:
        return 0.0
    by_seed, _, rest = _mean_squares(table)
    return math.sqrt(max(float(by_seed - rest), 0.0) / table.shape[1])


def _spread(table: Array) -> Spread | None:
    """What the power of a comparison over seeds and questions rests on.

    None below two of either, and where all seeds have one and the same mean: that is chance, and no
    measure of how much seeds differ.
    """
    if min(table.shape) < 2:
        return None
    by_seed, by_question, rest = (float(square) / table.size for square in _mean_squares(table))
    if by_seed <= 1e-24:
        return None
    by_seed += float(_rounding(table[None])[0]) / len(table)
    excess, (seeds, questions) = max(by_question - rest, 0.0), table.shape
    return Spread(excess, questions - 1, by_seed, seeds - 1, flips=by_question)
