"""Paired comparisons of two arms on the same questions, and the interval of one arm's mean.

One mechanism carries every statement: the mean paired difference, its variance over questions and
over training seeds, and Student's t. The interval, p, equivalence and the minimum detectable effect
(MDE) come from one half width, so they cannot contradict each other. For small samples:

- On a bounded scale (0/1, win/tie/loss, grades) the table gains two questions, one each way, of the
  size that differences have. A few questions that all agree then do not show certainty.
- Without bounds (losses) the half width grows with the skewness of the differences.
- No p is smaller than that of an exact sign test in which all questions agree.
- A true mean of d needs at least n|d|/size questions that differ, which bounds the variance at the
  far end of an interval from below: a margin is not shown by a few losses that happen to be alone.

Sources: Miller (2024), "Adding Error Bars to Evals" (clustered paired differences); Howe (1974),
JASA 69 (seeds crossed with questions); Agresti and Min (2005), Statistics in Medicine 24, Bonett
and Price (2012), JEBS 37 (added pairs); Johnson (1978), JASA 73 (skewness).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # not scipy.stats, whose import takes a second more

ALPHA, POWER, LONG_TAIL = 0.05, 0.8, 1.5  # the last: a skewness
# Of alpha, where a table has primary tests and others: 4% and 1%.
PRIMARY_SHARE, OTHER_SHARE = 0.8, 0.2
Limits = tuple[float, float]
# Assumed of a metric: the variance of two arms' difference on one question, half of which is new in
# each training, and the standard deviation of a training's mean over seeds.
SPREADS = {"win_rate": (0.175, 0.01), "pass_rate": (0.25, 0.01)}


def _quantile(freedom: float, alpha: float) -> float:
    """Return the value that |t| exceeds with probability alpha."""
    return float(special.stdtrit(freedom, 1 - alpha / 2))


@lru_cache
def detectable(freedom: float, alpha: float) -> float:
    """Return the difference, in estimated standard errors, that a t test finds with 80% power."""
    shown = math.sqrt(2 / freedom) * float(special.poch(freedom / 2, 0.5))  # of a true deviation
    return float(special.nctdtrinc(freedom, 1 - POWER, _quantile(freedom, alpha))) / shown


@dataclass(frozen=True)
class Estimate:
    """A mean paired difference with the variance of that mean, by source."""

    value: float
    center: float  # of the interval: the added questions draw it towards zero
    questions: int  # clusters of items
    freedom: float  # degrees of freedom over questions
    added: int  # questions: 2 on a bounded scale
    seeds: int
    reach: float  # the largest difference on the scale; infinite without bounds
    size: float  # root mean square of the differences that are not zero
    skewness: float  # of the differences between questions
    grain: float  # half a step of the mean where every question counts one way or the other
    var_plain: float  # over questions, seeds averaged
    var_pooled: float  # the same with the added questions
    var_rest: float  # the part of it that is new in each seed
    var_seeds: float  # over seeds

    def _width(self, q: float, s: float, pooled: float, alpha: float) -> float:
        """Combine q errors of questions and s of seeds (Howe), never below those of questions."""
        if math.isinf(self.reach):  # Johnson's correction, on whichever side it hurts
            t = _quantile(self.freedom, alpha)
            q += abs(self.skewness) * (2 * t * t + 1) / 6 / math.sqrt(self.questions)
        crossed = q * q * max(pooled - self.var_rest, 0.0) + s * s * self.var_seeds
        return math.sqrt(max(crossed, q * q * pooled)) + self.grain

    def half_width(self, alpha: float = ALPHA, mean: float = 0.0) -> float:
        """Return half the interval at level 1 - alpha; infinite with too few questions for it.

        A true `mean` further out than that of the data has a variance of its own at least.
        """
        if alpha < 2.0 ** (1 - self.questions):
            return math.inf
        pooled = self.var_pooled
        if abs(mean) > abs(self.center) and math.isfinite(self.reach):
            least = abs(mean) * max(self.size - abs(mean), 0.0)
            pooled = max(pooled, least / (self.questions + self.added))
        t, s = _quantile(self.freedom, alpha), _quantile(max(1, self.seeds - 1), alpha)
        return self._width(t, s, pooled, alpha)

    def interval(self, alpha: float = ALPHA) -> Limits | None:
        """Return the interval at level 1 - alpha; None where the data allow none."""
        half = self.half_width(alpha)
        if not 1e-12 < half < math.inf:
            return None
        ends = [self.center - half, self.center + half]
        for _ in range(40 if math.isfinite(self.reach) else 0):  # outwards, to where both agree
            low, high = (self.half_width(alpha, end) for end in ends)
            moved = [self.center - low, self.center + high]
            if max(abs(moved[0] - ends[0]), abs(moved[1] - ends[1])) < 1e-9:
                break
            ends = moved
        return max(ends[0], -self.reach), min(ends[1], self.reach)

    def p(self, null: float = 0.0) -> float:
        """Return the two-sided p of the mean being `null`: the alpha whose interval touches it."""
        distance = abs(self.center - null)
        if distance == 0 or self.half_width() < 1e-12:  # nothing varies
            return 1.0
        low, high = -12.0, 0.0  # log10 of alpha
        for _ in range(50):
            middle = (low + high) / 2
            wide = self.half_width(10**middle, null) > distance
            low, high = (middle, high) if wide else (low, middle)
        return float(10**high)

    def mde(self, alpha: float = ALPHA) -> float:
        """Return the smallest true difference that is found with 80% probability at level alpha.

        On a bounded scale the variance moves with the difference d: it has less room further out,
        and where both arms answer alike every difference is a question that begins to differ.
        """
        n = self.questions
        if alpha < 2.0 ** (1 - n):
            return math.inf
        t, s = detectable(self.freedom, alpha), detectable(max(1, self.seeds - 1), alpha)
        shrunk = (n + self.added) / n  # the added questions draw the mean towards zero
        d = self._width(t, s, self.var_plain * shrunk**2, alpha)
        if self.added:
            seen = math.sqrt(max(self.value**2 - self.var_plain, 0.0))  # d that the data have
            alike = max(0.0, 1 - 2 * (self.var_plain * n + self.value**2) / self.size**2)
            grows = (t * shrunk) ** 2 / n * alike * self.size
            falls = (t * shrunk) ** 2 / n / self.seeds
            fixed = max(0.0, d * d - grows * seen + falls * seen * seen)
            d = (grows + math.sqrt(grows**2 + 4 * (1 + falls) * fixed)) / 2 / (1 + falls)
        return d if d > 1e-12 else math.inf

    @property
    def tail_against(self) -> bool:
        """Whether a long tail points away from the mean; fewer than 50 questions seldom show it."""
        return math.isinf(self.reach) and self.skewness * float(np.sign(self.value)) < -LONG_TAIL


def estimate(table: NDArray[np.float64], questions: ArrayLike, reach: float = math.inf) -> Estimate:
    """Estimate the mean of a (seeds x items) table; the items of one question are one cluster."""
    codes = np.unique(np.asarray(questions), return_inverse=True)[1].reshape(-1)
    sizes, mean = np.bincount(codes), float(table.mean())
    sums = np.stack([np.bincount(codes, weights=row) for row in table])
    seeds, count = sums.shape
    # A question with more items weighs more (linearised mean). A few large ones show only the part
    # `shown` of the variance (Bell and McCaffrey 2002), and fewer degrees of freedom.
    s2, s3, s4 = (float(((sizes / sizes.sum()) ** power).sum()) for power in (2, 3, 4))
    shown = (1 + s2 - 2 * s3 / s2) / (1 - 1 / count) if count > 1 else 1.0
    by_q = mean + (sums - mean * sizes) / sizes.mean() / math.sqrt(shown)
    means, added = by_q.mean(axis=0), 2 if math.isfinite(reach) else 0
    differ = np.abs(sums.mean(axis=0)) > 1e-9
    size = float(np.sqrt((means[differ] ** 2).mean())) if differ.any() else reach
    spread = float(means.var())
    skewness = float(((means - mean) ** 3).mean()) / spread**1.5 if spread > 1e-24 else 0.0
    if added:
        by_q = np.hstack([by_q, np.tile([size, -size], (seeds, 1))])
    center, total = float(by_q.mean()), by_q.shape[1]
    one_size = seeds == 1 and added and count == table.size and np.ptp(np.abs(table)) < 1e-12
    grain = size / total if one_size and differ.all() else 0.0
    pooled = float(by_q.mean(axis=0).var(ddof=1)) / total if total > 1 else 0.0
    rest = over_seeds = 0.0
    if min(total, seeds) > 1:
        by_seed = by_q.mean(axis=1, keepdims=True)
        squares = float(((by_q - by_q.mean(axis=0) - by_seed + center) ** 2).sum())
        rest = squares / (seeds - 1) / (total - 1) / (seeds * total)
        step = float(np.abs(table[table != 0]).min(initial=reach)) / table.shape[1]
        over_seeds = (float(by_seed.var(ddof=1)) + step**2 / 12) / seeds  # Sheppard: rounding
    variances = (spread / max(1, count - 1), pooled, rest, over_seeds)
    shape = (count, max(1.0, s2 * s2 / s4 + added - 1), added, seeds, reach)
    return Estimate(mean, center, *shape, size, skewness, grain, *variances)


@dataclass(frozen=True)
class Comparison:
    """Two arms on the same items; a claim must hold in every case."""

    resolved: Estimate  # the items that have a verdict in every seed of both arms
    worst: Estimate  # all items, those without a verdict counted against the first arm
    best: Estimate  # the same in favour of the first arm
    unresolved: int = 0  # items without a verdict
    share: float = 1.0  # of the values that have one

    @property
    def _cases(self) -> tuple[Estimate, ...]:
        return (self.resolved, self.worst, self.best) if self.unresolved else (self.resolved,)

    @property
    def p(self) -> float:
        """The largest p of all cases; 1 where they point in different directions."""
        one_way = len({np.sign(case.center) for case in self._cases}) == 1
        return max(case.p() for case in self._cases) if one_way else 1.0

    def p_within(self, margin: float) -> Limits:
        """Return the doubled one-sided p of a mean below -margin, and of one above margin."""
        low = max(case.p(-margin) if case.center > -margin else 1.0 for case in self._cases)
        high = max(case.p(margin) if case.center < margin else 1.0 for case in self._cases)
        return low, high

    def interval(self, alpha: float = ALPHA) -> Limits | None:
        """Return the interval that spans those of all cases."""
        ends = [case.interval(alpha) or (-math.inf, math.inf) for case in self._cases]
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        return (low, high) if high < math.inf else None

    def mde(self, alpha: float = ALPHA) -> float:
        """Return the difference found with 80% probability if all open items count against it."""
        known = self.share * self.resolved.value
        effects = [case.mde(alpha) + abs(known - case.value) for case in self._cases[-2:]]
        return max(effects) / self.share if self.share else math.inf


def compare(
    first: ArrayLike, second: ArrayLike, questions: ArrayLike, scale: Limits | None = (0.0, 1.0)
) -> Comparison:
    """Compare two (seeds x items) tables; NaN is an item without a verdict.

    `second` may have one row for all seeds (a base model; 0.5 for outcomes against the opponent).
    `scale` holds the smallest and the largest value; None stands for values without bounds.
    """
    arms = (np.atleast_2d(np.asarray(values, dtype=float)) for values in (first, second))
    a, b = np.broadcast_arrays(*arms)
    valued, labels = np.isfinite(a) & np.isfinite(b), np.asarray(questions)
    known, reach = valued.all(axis=0), math.inf
    if scale is not None:  # a constant in the middle of the scale limits the reach
        rival = float(b.flat[0]) if (b == b.flat[0]).all() else scale[0]
        reach = max(scale[1] - rival, rival - scale[0])
    if known.all():
        case = estimate(a - b, labels, reach)
        return Comparison(case, case, case)
    if scale is None:
        raise ValueError(f"{int((~known).sum())} items have no value on a scale without bounds")
    worst, best = (
        estimate(np.where(np.isnan(a), x, a) - np.where(np.isnan(b), y, b), labels, reach)
        for x, y in (scale, scale[::-1])
    )
    resolved = estimate((a - b)[:, known], labels[known], reach) if known.any() else worst
    return Comparison(resolved, worst, best, int((~known).sum()), float(valued.mean()))


def adjust(ps: Sequence[float], primary: Sequence[bool]) -> list[float]:
    """Return p values by Holm (1979): primary ones at 4%, others at 1%; one family at 5%."""
    out, both = [1.0] * len(ps), any(primary) and not all(primary)
    for family, share in ((True, PRIMARY_SHARE), (False, OTHER_SHARE)):
        places = sorted(
            (i for i, is_primary in enumerate(primary) if is_primary == family), key=ps.__getitem__
        )
        worst = 0.0
        for rank, place in enumerate(places):
            worst = max(worst, ps[place] * (len(places) - rank) / (share if both else 1.0))
            out[place] = min(1.0, worst)
    return out


def mean_interval(values: ArrayLike, questions: ArrayLike, scale: Limits | None) -> Limits | None:
    """Return the 95% interval of one arm's mean (on a bounded scale Agresti and Coull 1998)."""
    table = np.atleast_2d(np.asarray(values, dtype=float))
    middle, reach = (sum(scale) / 2, (scale[1] - scale[0]) / 2) if scale else (0.0, math.inf)
    ends = estimate(table - middle, questions, reach).interval()
    return None if ends is None else (ends[0] + middle, ends[1] + middle)


def planned_effect(metric: str, questions: int, seeds: int, comparisons: float = 1) -> float | None:
    """Return the smallest true difference that 80% of studies with such a metric find, corrected
    over `comparisons`; None of a metric whose spread nobody assumed.
    """
    spreads = SPREADS.get(metric.rpartition("/")[2])
    if spreads is None or not questions:
        return None
    variance, spread = spreads
    errors = [detectable(max(1, n - 1), ALPHA / comparisons) ** 2 for n in (questions, seeds)]
    own, new = variance / 2 / questions, variance / 2 / questions / seeds
    over_seeds = (2 * spread**2 / seeds + new) * (seeds > 1)
    return math.sqrt(max(errors[0] * own + errors[1] * over_seeds, errors[0] * (own + new)))
