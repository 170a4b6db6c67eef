"""Quantiles of the normal curve, Student's t and chi-square (whole degrees of freedom) without
numpy: a plan says what a study can find, and starts fast.

Source: Abramowitz and Stegun (1964), Handbook of Mathematical Functions, 26.4.4-5 and 26.7.3-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

_NORMAL = NormalDist()
_STEPS = 80


def normal_below(x: float) -> float:
    """Return the chance of a normal value below x."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


@lru_cache(maxsize=4096)
def two_sided_quantile(freedom: float, alpha: float) -> float:
    """Return the value that |t| exceeds with chance alpha; of the normal curve where `freedom` is
    infinite.

    Example:
        >>> round(two_sided_quantile(2, 0.05), 3), round(two_sided_quantile(math.inf, 0.05), 3)
        (4.303, 1.96)
    """
    normal = -_NORMAL.inv_cdf(alpha / 2)
    if math.isinf(freedom):
        return normal
    if freedom != int(freedom):  # between two whole ones, linear in their inverses
        few, more = math.floor(freedom), math.ceil(freedom)
        part = (1 / freedom - 1 / more) / (1 / few - 1 / more)
        low, high = two_sided_quantile(more, alpha), two_sided_quantile(few, alpha)
        return low + part * (high - low)
    # In the angle the whole line is an interval.
    angle = _where(lambda one: 1 - _inside(one, int(freedom)), alpha, 0.0, math.pi / 2)
    return math.tan(angle) * math.sqrt(freedom)


def _inside(angle: float, freedom: int) -> float:
    """The chance of |t| < tan(angle) * sqrt(freedom)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(freedom // 2):
        total += term
        step = 2 * k + 1 + odd
        term *= cosine * cosine * step / (step + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@lru_cache(maxsize=4096)
def chi_square_quantile(freedom: int, above: float) -> float:
    """Return the value that chi-square exceeds with chance `above`.

    Example:
        >>> round(chi_square_quantile(3, 0.05), 3)
        7.815
    """
    top = 10.0 + 10.0 * freedom
    while _beyond(top, freedom) > above:
        top *= 2
    return _where(lambda one: _beyond(one, freedom), above, 0.0, top)


def _beyond(x: float, freedom: int) -> float:
    """The chance of chi-square > x."""
    half, odd = x / 2, freedom % 2
    total = math.erfc(math.sqrt(half)) if odd else 0.0
    term = math.exp(-half) * (math.sqrt(half) / math.gamma(1.5) if odd else 1.0)
    for k in range(freedom // 2):
        total += term
        term *= half / (k + 1 + odd / 2)
    return total


def _where(falling: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a falling function has the wanted value."""
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > wanted else (low, middle)
    return high
