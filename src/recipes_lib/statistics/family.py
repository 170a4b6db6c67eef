"""Many comparisons, one error rate: which hypotheses of a table are rejected at 5% over them all.

A study asks one primary question; everything else it measures is secondary. The primary comparisons
start with 80% of the error rate (4%), the secondary ones with 20% (1%), each shared within its
family as Holm does. A family of which everything is rejected passes its part to the other: behind a
primary question that is answered the secondary comparisons are held to the whole 5%, and a plain
difference elsewhere is not lost behind a question that is not. Testing the primary question alone
at 5% and the rest strictly behind it would keep the same error rate, find a primary difference that
is 3% smaller (with many questions), and claim nothing at all where it is not found.

A comparison may have further hypotheses: that its difference lies beyond a margin, on either side.
At most one of "beyond it below", "zero" and "beyond it above" is true, so they share the level of
their comparison; the margins use half of it each way, as a two-sided interval does, which frees the
other half once zero is rejected.

Why the error stays at 5%, whatever the dependence between the tests: consider the first rejection
of a true hypothesis. Until then every true one was open, and there is at most one per comparison,
so the level at which it was rejected is at most the one that it has among the true hypotheses
alone; those levels add up to 5%.

Source: Holm (1979), Scandinavian Journal of Statistics 6 (within a family); Wiens (2003),
Pharmaceutical Statistics 2, and Bretz, Maurer, Brannath and Posch (2009), Statistics in Medicine 28
(a part kept for the secondary family, and passing it on); Hommel, Bretz and Maurer (2007),
Statistics in Medicine 26 (why the steps are a closed test); Shaffer (1986), Journal of the American
Statistical Association 81 (hypotheses of which one at most is true).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

SHARES = {True: 0.8, False: 0.2}  # of the error rate: of the primary family, of the secondary one


@dataclass(frozen=True)
class Hypotheses:
    """What one comparison tests.

    Args:
        p: two-sided p of no difference.
        bounds: for each margin the alpha at which the two-sided interval touches it; 1 where the
            estimate lies beyond.
        level: what the smallest p of its family is held to; `adjust` tells it.
    """

    p: float
    bounds: tuple[float, ...] = ()
    primary: bool = False
    level: float = math.nan


def adjust(comparisons: Sequence[Hypotheses], alpha: float = 0.05) -> list[Hypotheses]:
    """Return the hypotheses of a table with adjusted p values: one is rejected at alpha where its
    value is at most alpha. Without a primary comparison, or with nothing else, they are Holm's.

    Example:
        >>> [one.p for one in adjust([Hypotheses(0.02, primary=True), Hypotheses(0.03)])]
        [0.025, 0.03]
    """
    waiting: dict[bool, list[tuple[float, int, int]]] = {True: [], False: []}
    for row, one in enumerate(comparisons):
        waiting[one.primary] += [(p, row, place) for place, p in enumerate((one.p, *one.bounds))]
    for hypotheses in waiting.values():
        hypotheses.sort(reverse=True)
    sizes = {family: sum(one.primary == family for one in comparisons) for family in SHARES}
    weights = {family: float(size) for family, size in sizes.items()}
    counts = [1.0] * len(comparisons)
    adjusted = [[math.nan] * (1 + len(one.bounds)) for one in comparisons]
    worst = {True: 0.0, False: 0.0}  # the largest adjusted p of each family
    largest = 0.0
    while waiting[True] or waiting[False]:
        reached, family = min(
            (hypotheses[-1][0] * (weights[family] / _share(family, waiting)), family)
            for family, hypotheses in waiting.items()
            if hypotheses
        )
        _, row, place = waiting[family].pop()
        largest = worst[family] = max(largest, min(1.0, reached))
        mine = adjusted[row]
        mine[place] = largest
        # An open zero counts whole, an open margin half.
        count = 1.0 if math.isnan(mine[0]) else 0.5 if any(map(math.isnan, mine)) else 0.0
        weights[family] -= counts[row] - count
        counts[row] = count
    levels = {
        family: alpha * (1.0 if worst[not family] <= alpha else SHARES[family]) / max(1, size)
        for family, size in sizes.items()
    }
    return [
        replace(one, p=mine[0], bounds=tuple(mine[1:]), level=levels[one.primary])
        for one, mine in zip(comparisons, adjusted, strict=True)
    ]


def _share(family: bool, waiting: Mapping[bool, Sequence[object]]) -> float:
    """The part of the error rate that a family has: all of it once the other is done."""
    return SHARES[family] if waiting[not family] else 1.0


def first_level(primary: int, secondary: int, alpha: float = 0.05) -> float:
    """Return the level that the smallest p of the primary family is held to.

    Args:
        primary: comparisons of the primary question.
        secondary: all others.

    Example:
        >>> round(first_level(1, 60), 3), round(first_level(1, 0), 3)
        (0.04, 0.05)
    """
    return alpha * (SHARES[True] if secondary else 1.0) / max(1, primary)
