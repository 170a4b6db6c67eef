"""Paired comparisons of two arms on the same questions, and the interval of one arm's mean.

One mechanism carries every statement: the mean paired difference, its variance over questions and
over training seeds, and Student's t. The interval, p, equivalence and the minimum detectable effect
(MDE) come from one half width, so they cannot contradict each other. For small samples:

- On a bounded scale (0/1, win/tie/loss, grades) two pseudo-questions are added, one in each
  direction, of the size that differences have, so that a few unanimous questions do not look
  certain.
- Without bounds (losses) the half width grows with the skewness of the differences.
- No p is smaller than that of an exact sign test in which all questions agree.
- A true mean of d needs at least n|d|/size questions that differ, which bounds the variance at the
  far end of an interval from below, so that a handful of losses cannot prove non-inferiority.

Sources: Miller (2024), "Adding Error Bars to Evals" (clustered paired differences); Howe (1974),
JASA 69 (seeds crossed with questions); Agresti and Min (2005), Statistics in Medicine 24, Bonett
and Price (2012), JEBS 37 (added pairs); Johnson (1978), JASA 73 (skewness).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # not scipy.stats, whose import takes a second more

ALPHA = 0.05
POWER = 0.8  # of the stated detectable effect
POWER_RANGE = 0.1  # of chi-square on either side of the spread of seeds that it is stated for
LONG_TAIL = 1.5  # a skewness
# Of alpha, where a table has primary tests and others: 4% and 1%.
PRIMARY_SHARE = 0.8
OTHER_SHARE = 0.2
Limits = tuple[float, float]
# Assumed per metric: the variance of the paired difference per question (half of it is new in each
# training), and the standard deviation of an arm's mean over seeds.
SPREADS = {"win_rate": (0.175, 0.01), "pass_rate": (0.25, 0.01)}


def _quantile(freedom: float, alpha: float) -> float:
    """Return the value that |t| exceeds with probability alpha."""
    return float(special.stdtrit(freedom, 1 - alpha / 2))


def _seen_part(freedom: float) -> float:
    """Return the mean of an estimated deviation over the true one (c4 of quality control)."""
    return math.sqrt(2 / freedom) * float(special.poch(freedom / 2, 0.5))


@lru_cache
def detectable(freedom: float, alpha: float) -> float:
    """Return the difference, in estimated standard errors, that a t test finds with 80% power."""
    # The noncentrality of t that exceeds the two-sided quantile in 80% of studies.
    noncentrality = float(special.nctdtrinc(freedom, 1 - POWER, _quantile(freedom, alpha)))
    return noncentrality / _seen_part(freedom)


@dataclass(frozen=True, kw_only=True)
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

    def _width(self, of_questions: float, of_seeds: float, pooled: float, alpha: float) -> float:
        """Return half a width of so many standard errors of questions and of seeds.

        They are combined as Howe (1974) does for two crossed factors, and never give less than the
        errors of questions alone.
        """
        if math.isinf(self.reach):
            # Johnson (1978): a skewed mean shifts t by skewness (2 t^2 + 1) / (6 sqrt n), which is
            # taken on whichever side it hurts.
            t = _quantile(self.freedom, alpha)
            shift = abs(self.skewness) * (2 * t * t + 1) / 6 / math.sqrt(self.questions)
            of_questions += shift
        shared = max(pooled - self.var_rest, 0.0)  # what the seeds of one question have in common
        crossed = of_questions * of_questions * shared + of_seeds * of_seeds * self.var_seeds
        return math.sqrt(max(crossed, of_questions * of_questions * pooled)) + self.grain

    def half_width(self, alpha: float = ALPHA, mean: float = 0.0) -> float:
        """Return half the interval at level 1 - alpha; infinite with too few questions for it.

        A hypothesised `mean` beyond the observed one implies a minimum variance.
        """
        if alpha < 2.0 ** (1 - self.questions):  # p of a sign test in which all questions agree
            return math.inf
        pooled = self.var_pooled
        if abs(mean) > abs(self.center) and math.isfinite(self.reach):
            # If a share m / size of the questions differ, by `size` each, their variance is
            # m (size - m); no pattern of differences of this size with this mean varies less.
            least = abs(mean) * max(self.size - abs(mean), 0.0)
            pooled = max(pooled, least / (self.questions + self.added))
        of_questions = _quantile(self.freedom, alpha)
        of_seeds = _quantile(max(1, self.seeds - 1), alpha)
        return self._width(of_questions, of_seeds, pooled, alpha)

    def interval(self, alpha: float = ALPHA) -> Limits | None:
        """Return the interval at level 1 - alpha; None where the data allow none."""
        half = self.half_width(alpha)
        if not 1e-12 < half < math.inf:
            return None
        low = self.center - half
        high = self.center + half
        # An end further out has a larger variance at least: move outwards to where both agree.
        steps = 0 if math.isinf(self.reach) else 40
        for _ in range(steps):
            lower = self.center - self.half_width(alpha, low)
            higher = self.center + self.half_width(alpha, high)
            if max(abs(lower - low), abs(higher - high)) < 1e-9:
                break
            low = lower
            high = higher
        return max(low, -self.reach), min(high, self.reach)

    def p(self, null: float = 0.0) -> float:
        """Return the two-sided p of the mean being `null`: the alpha whose interval touches it."""
        distance = abs(self.center - null)
        if distance == 0 or self.half_width() < 1e-12:  # nothing varies
            return 1.0
        # Bisection of log10(alpha) until the interval ends at `null`.
        low = -12.0
        high = 0.0
        for _ in range(50):
            middle = (low + high) / 2
            if self.half_width(10**middle, null) > distance:
                low = middle
            else:
                high = middle
        return float(10**high)

    def mde(self, alpha: float = ALPHA) -> float:
        """Return the smallest true difference that is found with 80% probability at level alpha.

        On a bounded scale the variance moves with the difference d: it has less room further out,
        and where both arms answer alike every difference is a question that begins to differ.
        """
        n = self.questions
        if alpha < 2.0 ** (1 - n):
            return math.inf
        of_questions = detectable(self.freedom, alpha)
        of_seeds = detectable(max(1, self.seeds - 1), alpha)
        shrunk = (n + self.added) / n  # the added questions draw the mean towards zero
        d = self._width(of_questions, of_seeds, self.var_plain * shrunk**2, alpha)
        if self.added:
            # d^2 is this width squared at the observed d, plus `grows` for each unit of d further
            # out and minus `falls` for each of d^2: solved for d.
            observed = math.sqrt(max(self.value**2 - self.var_plain, 0.0))
            share_alike = max(0.0, 1 - 2 * (self.var_plain * n + self.value**2) / self.size**2)
            grows = (of_questions * shrunk) ** 2 / n * share_alike * self.size
            falls = (of_questions * shrunk) ** 2 / n / self.seeds
            fixed = max(0.0, d * d - grows * observed + falls * observed * observed)
            d = (grows + math.sqrt(grows**2 + 4 * (1 + falls) * fixed)) / 2 / (1 + falls)
        if d <= 1e-12:
            return math.inf
        return d

    @property
    def tail_against(self) -> bool:
        """Whether a long tail points away from the mean; fewer than 50 questions seldom show it."""
        return math.isinf(self.reach) and self.skewness * float(np.sign(self.value)) < -LONG_TAIL


def estimate(table: NDArray[np.float64], questions: ArrayLike, reach: float = math.inf) -> Estimate:
    """Estimate the mean of a (seeds x items) table; the items of one question are one cluster."""
    codes = np.unique(np.asarray(questions), return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(codes)  # items of each question
    mean = float(table.mean())
    sums = np.stack([np.bincount(codes, weights=row) for row in table])
    seeds, count = sums.shape

    # A question with more items weighs more (linearised mean). A few large ones show only a part of
    # the variance, and give fewer degrees of freedom (Bell and McCaffrey 2002).
    weights = sizes / sizes.sum()
    second = float((weights**2).sum())
    third = float((weights**3).sum())
    fourth = float((weights**4).sum())
    seen_part = 1.0
    if count > 1:
        seen_part = (1 + second - 2 * third / second) / (1 - 1 / count)
    by_question = mean + (sums - mean * sizes) / sizes.mean() / math.sqrt(seen_part)
    means = by_question.mean(axis=0)  # over seeds
    differ = np.abs(sums.mean(axis=0)) > 1e-9
    size = reach
    if differ.any():
        size = float(np.sqrt((means[differ] ** 2).mean()))
    spread = float(means.var())
    skewness = 0.0
    if spread > 1e-24:
        skewness = float(((means - mean) ** 3).mean()) / spread**1.5

    # Added pairs (Agresti and Min 2005; Bonett and Price 2012).
    added = 0
    if math.isfinite(reach):
        added = 2
        by_question = np.hstack([by_question, np.tile([size, -size], (seeds, 1))])
    center = float(by_question.mean())
    total = by_question.shape[1]
    is_one_item_each = seeds == 1 and count == table.size
    is_one_size = is_one_item_each and differ.all() and np.ptp(np.abs(table)) < 1e-12
    grain = 0.0
    if added and is_one_size:
        grain = size / total

    pooled = 0.0
    if total > 1:
        pooled = float(by_question.mean(axis=0).var(ddof=1)) / total
    rest = 0.0
    over_seeds = 0.0
    if min(total, seeds) > 1:
        # Two-way analysis of variance without replication: what neither questions nor seeds say.
        by_seed = by_question.mean(axis=1, keepdims=True)
        squares = float(((by_question - by_question.mean(axis=0) - by_seed + center) ** 2).sum())
        rest = squares / (seeds - 1) / (total - 1) / (seeds * total)
        # Means of a few items are rounded to steps; Sheppard: that hides step^2 / 12 of a variance.
        step = float(np.abs(table[table != 0]).min(initial=reach)) / table.shape[1]
        over_seeds = (float(by_seed.var(ddof=1)) + step**2 / 12) / seeds
    return Estimate(
        value=mean,
        center=center,
        questions=count,
        freedom=max(1.0, second * second / fourth + added - 1),
        added=added,
        seeds=seeds,
        reach=reach,
        size=size,
        skewness=skewness,
        grain=grain,
        var_plain=spread / max(1, count - 1),
        var_pooled=pooled,
        var_rest=rest,
        var_seeds=over_seeds,
    )


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
        if not self.unresolved:
            return (self.resolved,)
        return self.resolved, self.worst, self.best

    @property
    def p(self) -> float:
        """The largest p of all cases; 1 where they point in different directions."""
        directions = {np.sign(case.center) for case in self._cases}
        if len(directions) > 1:
            return 1.0
        return max(case.p() for case in self._cases)

    def p_within(self, margin: float) -> Limits:
        """Return the doubled one-sided p of a mean below -margin, and of one above margin."""
        low = 0.0
        high = 0.0
        for case in self._cases:
            low = max(low, case.p(-margin) if case.center > -margin else 1.0)
            high = max(high, case.p(margin) if case.center < margin else 1.0)
        return low, high

    def interval(self, alpha: float = ALPHA) -> Limits | None:
        """Return the interval that spans those of all cases."""
        ends = [case.interval(alpha) or (-math.inf, math.inf) for case in self._cases]
        low = min(low for low, _ in ends)
        high = max(high for _, high in ends)
        if math.isinf(high):
            return None
        return low, high

    def mde_range(self, alpha: float = ALPHA) -> Limits:
        """Return `mde` with the least and the largest spread of seeds that they allow: the ends of
        the 80% interval of their variance (chi-square, seeds - 1 degrees of freedom).
        """
        seeds = self.resolved.seeds
        if seeds == 1:
            effect = self.mde(alpha)
            return effect, effect
        ends = []
        for share in (POWER_RANGE, 1 - POWER_RANGE):
            # of the true variance over the one seen; `detectable` corrects for the mean of the
            # deviation seen, which the quantile has in it
            factor = (seeds - 1) / float(special.chdtri(seeds - 1, share))
            factor *= _seen_part(seeds - 1) ** 2
            ends.append(self.mde(alpha, factor))
        return ends[0], ends[1]

    def mde(self, alpha: float = ALPHA, spread: float = 1.0) -> float:
        """Return the difference found with 80% probability if all open items count against it, and
        seeds have `spread` times the variance seen.
        """
        if not self.share:
            return math.inf
        expected = self.share * self.resolved.value
        effects = []
        for case in self._cases[-2:]:
            spread_out = replace(case, var_seeds=spread * case.var_seeds)
            effects.append(spread_out.mde(alpha) + abs(expected - case.value))
        return max(effects) / self.share


def compare(
    first: ArrayLike, second: ArrayLike, questions: ArrayLike, scale: Limits | None = (0.0, 1.0)
) -> Comparison:
    """Compare two (seeds x items) tables; NaN is an item without a verdict.

    `second` may have one row for all seeds (a base model; 0.5 for outcomes against the opponent).
    `scale` holds the smallest and the largest value; None stands for values without bounds.
    """
    a, b = np.broadcast_arrays(
        np.atleast_2d(np.asarray(first, dtype=float)),
        np.atleast_2d(np.asarray(second, dtype=float)),
    )
    labels = np.asarray(questions)
    has_value = np.isfinite(a) & np.isfinite(b)
    is_resolved = has_value.all(axis=0)
    unresolved = int((~is_resolved).sum())
    reach = math.inf
    if scale is not None:
        # The second arm may be a constant in the middle of the scale, which limits the reach.
        rival = scale[0]
        if (b == b.flat[0]).all():
            rival = float(b.flat[0])
        reach = max(scale[1] - rival, rival - scale[0])
    if not unresolved:
        case = estimate(a - b, labels, reach)
        return Comparison(resolved=case, worst=case, best=case)
    if scale is None:
        raise ValueError(f"{unresolved} items have no value on a scale without bounds")
    lowest, highest = scale
    worst = estimate(_filled(a, lowest) - _filled(b, highest), labels, reach)
    best = estimate(_filled(a, highest) - _filled(b, lowest), labels, reach)
    resolved = worst
    if is_resolved.any():
        resolved = estimate((a - b)[:, is_resolved], labels[is_resolved], reach)
    return Comparison(
        resolved=resolved,
        worst=worst,
        best=best,
        unresolved=unresolved,
        share=float(has_value.mean()),
    )


def _filled(values: NDArray[np.float64], value: float) -> NDArray[np.float64]:
    """The values with `value` where there is none."""
    return np.where(np.isnan(values), value, values)


def adjust(ps: Sequence[float], primary: Sequence[bool]) -> list[float]:
    """Return p values by Holm (1979): primary ones at 4%, others at 1%; one family at 5%."""
    adjusted = [1.0] * len(ps)
    has_both = any(primary) and not all(primary)
    for family, share in ((True, PRIMARY_SHARE), (False, OTHER_SHARE)):
        members = [index for index, is_primary in enumerate(primary) if is_primary == family]
        members.sort(key=ps.__getitem__)
        level = share if has_both else 1.0
        worst = 0.0
        for rank, index in enumerate(members):
            worst = max(worst, ps[index] * (len(members) - rank) / level)
            adjusted[index] = min(1.0, worst)
    return adjusted


def mean_interval(values: ArrayLike, questions: ArrayLike, scale: Limits | None) -> Limits | None:
    """Return the 95% interval of one arm's mean (on a bounded scale Agresti and Coull 1998)."""
    table = np.atleast_2d(np.asarray(values, dtype=float))
    middle = 0.0
    reach = math.inf
    if scale is not None:
        middle = sum(scale) / 2
        reach = (scale[1] - scale[0]) / 2
    ends = estimate(table - middle, questions, reach).interval()
    if ends is None:
        return None
    return ends[0] + middle, ends[1] + middle


def planned_effect(metric: str, questions: int, seeds: int, comparisons: float = 1) -> float | None:
    """Return the smallest true difference that 80% of studies with such a metric find, corrected
    over `comparisons`; None of a metric whose spread nobody assumed.
    """
    spreads = SPREADS.get(metric.rpartition("/")[2])
    if spreads is None or not questions:
        return None
    variance, spread = spreads
    alpha = ALPHA / comparisons
    of_questions = detectable(max(1, questions - 1), alpha) ** 2
    of_seeds = detectable(max(1, seeds - 1), alpha) ** 2
    shared = variance / 2 / questions  # of the questions, the same in every training
    new = variance / 2 / questions / seeds  # new in each training
    over_seeds = 0.0
    if seeds > 1:
        over_seeds = 2 * spread**2 / seeds + new  # of two arms
    crossed = of_questions * shared + of_seeds * over_seeds
    return math.sqrt(max(crossed, of_questions * (shared + new)))
