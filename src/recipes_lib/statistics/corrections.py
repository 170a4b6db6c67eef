"""Correction for testing several hypotheses at once."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm-adjusted p values in the given order; a None (no test possible) stays None and
    does not count.

    Example:
        >>> holm([0.01, None, 0.04])
        [0.02, None, 0.04]

    Source: Holm (1979), Scandinavian Journal of Statistics 6.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = largest
    return adjusted
