"""The estimator: its numbers against others, that interval, p and margin agree, and over simulated
studies its false claims, coverage and power. docs/statistics.md has the whole table.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import gammaln, xlogy

from recipes_lib.stats import adjust, compare, estimate, mean_interval

Arms = tuple[NDArray[np.float64], NDArray[np.float64]]
Draw = Callable[[np.random.Generator, int, float], Arms]


def test_the_interval_of_a_share_is_near_wilson_s() -> None:
    for hits, low, high in ((30, 0.2189, 0.3958), (3, 0.0103, 0.0845), (97, 0.9155, 0.9897)):
        values = [1.0] * hits + [0.0] * (100 - hits)
        ends = mean_interval(values, range(100), (0.0, 1.0))
        assert ends == pytest.approx((low, high), abs=0.02)


def test_holm_keeps_four_fifths_of_the_level_for_the_primary_question() -> None:
    assert adjust([0.01, 0.04], [False, False]) == pytest.approx([0.02, 0.04])
    assert adjust([0.04, 0.01, 0.02], [True, False, False]) == pytest.approx([0.05, 0.1, 0.1])
    assert adjust([], []) == []


def test_interval_p_and_margin_never_contradict_each_other() -> None:
    rng = np.random.default_rng(2)
    for number in range(120):
        n, seeds = int(rng.integers(6, 200)), int(rng.integers(1, 4))
        a = (rng.random((seeds, n)) < rng.random()).astype(float)
        b = (rng.random((seeds, n)) < rng.random()).astype(float)
        if number % 3 == 0:
            a[0, : int(rng.integers(0, 3))] = np.nan
        if number % 3 == 1:  # few questions differ, all of them one way
            a, b = (np.arange(n)[None] % 40 == 0).astype(float), np.zeros((1, n))
            a, b = (a, b) if number % 2 else (b, a)
        result = compare(a, b, np.arange(n) // int(rng.integers(1, 3)))
        interval = result.interval()
        if interval is None:
            assert result.p > 0.05 or not result.resolved.value
            continue
        low, high = interval
        assert (low > 0 or high < 0) == (result.p < 0.05)
        ends = [abs(end) * near for end in interval for near in (0.98, 1.02)]
        for margin in (0.02, 0.1, *(end for end in ends if end < 1)):
            above, below = result.p_within(margin)
            assert (low > -margin) == (above < 0.05) and (high < margin) == (below < 0.05)


def test_items_without_a_verdict_count_both_ways() -> None:
    values = np.array([[1.0] * 60 + [0.0] * 40])
    values[0, :5] = np.nan
    result = compare(values, np.full((1, 100), 0.5), np.arange(100))
    interval = result.interval()
    assert result.unresolved == 5 and interval is not None
    assert result.worst.value < result.resolved.value < result.best.value
    assert interval[0] < result.resolved.interval()[0]  # type: ignore[index]


def test_nothing_that_varies_is_no_evidence() -> None:
    same = compare(np.ones((1, 50)), np.ones((1, 50)), range(50))
    assert same.p == 1.0 and not same.resolved.value
    losses = estimate(np.full((1, 60), 0.1), range(60))
    assert losses.p() == 1.0 and losses.interval() is None
    for n in (5, 12):  # no p is below that of a sign test
        assert compare(np.ones((1, n)), np.zeros((1, n)), range(n)).p >= 0.999 * 2.0 ** (1 - n)


def test_skewed_losses_have_a_wider_interval() -> None:
    samples = np.linspace(-1, 1, 80), np.random.default_rng(4).gamma(1, 1, 80)
    tables = ((each - each.mean())[None] / each.std() for each in samples)
    even, skewed = (estimate(table, range(80)).half_width() for table in tables)
    assert skewed > 1.1 * even


def test_few_losses_alone_do_not_show_a_margin() -> None:
    """Where every pair that differs is a loss, as at a true margin, 2.5% are promised."""
    rng = np.random.default_rng(3)
    for n, losses in ((200, 4), (805, 6), (200, 20)):
        margin, shown = losses / n, 0
        for _ in range(300):
            first = np.where(rng.random(n) < margin, 0.0, 1.0)
            shown += compare(first, np.ones(n), np.arange(n)).p_within(margin)[0] <= 0.05
        assert shown / 300 <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 300), (n, losses)


def test_the_stated_effect_has_the_range_that_few_seeds_leave() -> None:
    """About 80% of the ranges hold what a study that knew the spread of its seeds would state."""
    rng = np.random.default_rng(1)
    studies = []
    for _ in range(300):
        chances = 0.5 + 0.15 * rng.normal(0, 1, 200) + rng.normal(0, 0.05, (2, 3, 1))
        first, second = (rng.random((2, 3, 200)) < chances.clip(0, 1)).astype(float)
        studies.append(compare(first, second, range(200)))
    stated = np.array([study.mde() for study in studies])
    low, high = np.transpose([study.mde_range() for study in studies])
    assert np.quantile(stated, 0.9) > 3 * np.quantile(stated, 0.1)
    # the same for the mean variance of all studies; c4 of three seeds is 0.8862
    spread = 0.8862**2 * np.mean([study.resolved.var_seeds for study in studies])
    known = [study.mde(spread=spread / study.resolved.var_seeds) for study in studies]
    assert (low <= stated).all() and (stated <= high).all()
    inside = (low <= np.mean(known)) & (np.mean(known) <= high)
    assert 0.72 <= inside.mean() <= 0.88


# the chances of a question that differs one way and the other, by the true difference
Chances = Callable[[float], tuple[float, float]]


def right_or_wrong(base: float, shared: float) -> Chances:
    """Two arms, `shared` of the questions equally hard for both."""
    own = 1 - shared
    return lambda d: (shared * d + own * (base + d) * (1 - base), own * (1 - base - d) * base)


def outcomes(ties: float) -> Chances:
    """Win, tie and loss against one half; the difference is that of the win rate."""
    return lambda d: ((1 - ties) / 2 + d, (1 - ties) / 2 - d)


def averages(n: int, chances: Chances, size: float, true: float) -> tuple[float, float, float]:
    """How often a difference is found, how often the interval holds the true one, and the mean of
    the stated effects, over all counts of questions that differ one way and the other.
    """
    ways, sums = [*chances(true)], np.zeros(4)
    ways.append(max(0.0, 1 - sum(ways)))
    for first in range(n + 1):
        for second in range(n + 1 - first):
            counts = np.array([first, second, n - first - second])
            chance = gammaln(n + 1) - gammaln(counts + 1).sum() + xlogy(counts, ways).sum()
            if chance > -14:
                result = compare(
                    np.repeat([size, -size, 0], counts), 0.0 * np.arange(n), range(n), (-size, size)
                )
                low, high = result.interval() or (-math.inf, math.inf)
                found = high < 0 or low > 0
                sums += math.exp(chance) * np.array([1, found, low <= true <= high, result.mde()])
    return tuple(sums[1:] / sums[0])


@pytest.mark.parametrize(
    ("n", "chances", "size", "power"),
    [
        (50, right_or_wrong(0.5, 0.5), 1.0, (0.77, 0.86)),
        (80, right_or_wrong(0.5, 0.9), 1.0, (0.75, 0.86)),
        (100, right_or_wrong(0.98, 0.9), 1.0, None),  # the effect is beyond the scale
        (20, outcomes(0.1), 0.5, (0.77, 0.86)),
        (50, outcomes(0.0), 0.5, (0.77, 0.86)),
        (60, outcomes(0.6), 0.5, (0.77, 0.86)),
    ],
)
def test_false_claims_coverage_and_power_by_question(n, chances, size, power) -> None:
    """The stated effect is that of studies without a difference."""
    false, coverage, stated = averages(n, chances, size, 0.0)
    assert false <= 0.052 and coverage >= 0.948
    if power:
        found, coverage, _ = averages(n, chances, size, stated)
        assert power[0] <= found <= power[1] and coverage >= 0.945


def seeded(seeds: int, deviation: float) -> Draw:
    """Several trainings of each arm that differ by `deviation`. No rate leaves the scale: cut off
    there, the true difference would be smaller than `effect`.
    """

    def draw(rng: np.random.Generator, n: int, effect: float) -> Arms:
        hard = rng.uniform(-0.15, 0.15, n)
        means = [
            0.5 + shift + hard + deviation * rng.uniform(-math.sqrt(3), math.sqrt(3), (seeds, 1))
            for shift in (effect / 2, -effect / 2)
        ]
        assert all(mean.min() >= 0 and mean.max() <= 1 for mean in means)
        first, second = ((rng.random((seeds, n)) < mean).astype(float) for mean in means)
        return first, second

    return draw


def losses(shape: float) -> Draw:
    """A loss per row: skewed differences."""

    def draw(rng: np.random.Generator, n: int, effect: float) -> Arms:
        noise = rng.normal(0, 1, (1, n))
        if shape:
            noise = rng.gamma(4 / shape**2, shape / 2, (1, n)) - 2 / shape
        return noise + effect, np.zeros((1, n))

    return draw


def simulate(draw: Draw, n: int, studies: int, effect: float) -> tuple[float, float, float]:
    """Return the share of studies with p <= 5%, the share whose interval holds the effect, and the
    mean of the effects that they state.
    """
    rng, sums = np.random.default_rng(round(1e6 * effect)), np.zeros(3)
    scale = None if draw.__qualname__.startswith("losses") else (0.0, 1.0)
    for _ in range(studies):
        result = compare(*draw(rng, n, effect), np.arange(n), scale)
        low, high = result.interval() or (-9.0, 9.0)
        sums += not low <= 0 <= high, low <= effect <= high, min(1.0, result.mde())
    found, covered, stated = sums / studies
    return found, covered, stated


CELLS: dict[str, tuple[Draw, int]] = {
    "2 seeds, SD 0, n = 805": (seeded(2, 0.0), 805),
    "2 seeds, SD 6 points, n = 200": (seeded(2, 0.06), 200),
    "3 seeds, SD 3 points, n = 200": (seeded(3, 0.03), 200),
    "5 seeds, SD 6 points, n = 805": (seeded(5, 0.06), 805),
    "losses, normal, n = 80": (losses(0), 80),
    "losses, skewness 1, n = 80": (losses(1), 80),
}
STUDIES = pytest.mark.parametrize(
    "studies",
    [pytest.param(250, marks=pytest.mark.slow), pytest.param(4000, marks=pytest.mark.nightly)],
)


def bound(share: float, studies: int) -> float:
    """Four standard errors of a share."""
    return 4 * math.sqrt(share * (1 - share) / studies)


@STUDIES
def test_claims_are_seldom_false_and_intervals_hold_the_truth(studies: int) -> None:
    wrong = {}
    for name, (draw, n) in CELLS.items():
        false, coverage, _ = simulate(draw, n, studies, 0.0)
        limits = bound(0.05, studies)
        if false > 0.05 + limits or coverage < 0.95 - limits:
            wrong[name] = false, coverage
    assert not wrong


@STUDIES
def test_the_difference_that_trainings_state_is_found_in_four_fifths_of_studies(studies) -> None:
    """It is the one that studies which have it state on average; two far seeds state too much."""
    wrong = {}
    for name, (draw, n) in CELLS.items():
        effect = simulate(draw, n, studies, 0.1)[2]
        if effect > 0.5:
            continue
        effect = simulate(draw, n, 2 * studies, effect)[2]
        power = simulate(draw, n, studies, effect)[0]
        if not 0.77 - bound(0.8, studies) <= power <= 0.86 + bound(0.8, studies):
            wrong[name] = effect, power
    assert not wrong
