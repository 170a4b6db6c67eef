"""The estimator: its numbers against others, that interval, p and margin agree, and over simulated
studies its false claims, coverage and power. docs/statistics.md has the whole table.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from recipes_lib.analysis.stats import adjust, compare, estimate, mean_interval, wilson

Draw = Callable[[np.random.Generator, int, float], tuple[NDArray[np.float64], NDArray[np.float64]]]


def test_wilson_and_rates_are_those_of_the_books() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20)[0] == 0.0 and wilson(20, 20)[1] == 1.0
    low, high = mean_interval([1.0] * 30 + [0.0] * 70, range(100), (0.0, 1.0)) or (0, 0)
    assert low == pytest.approx(wilson(30, 100)[0], abs=0.02)
    assert high == pytest.approx(wilson(30, 100)[1], abs=0.02)


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
        result = compare(a, b, np.arange(n) // int(rng.integers(1, 3)))
        interval = result.interval()
        if interval is None:
            assert result.p > 0.05 or not result.resolved.value
            continue
        low, high = interval
        assert (low > 0 or high < 0) == (result.p < 0.05)
        for margin in (0.02, 0.1):
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
    assert compare(np.ones((1, 5)), np.zeros((1, 5)), range(5)).p > 0.05  # too few questions


def test_few_losses_alone_do_not_show_a_margin() -> None:
    """Where every pair that differs is a loss, as at a true margin, 2.5% are promised."""
    rng = np.random.default_rng(3)
    for n, losses in ((200, 4), (805, 6), (200, 20)):
        margin, shown = losses / n, 0
        for _ in range(300):
            first = np.where(rng.random(n) < margin, 0.0, 1.0)
            shown += compare(first, np.ones(n), np.arange(n)).p_within(margin)[0] <= 0.05
        assert shown / 300 <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 300), (n, losses)


# ---- Simulated studies ----


def right_or_wrong(base: float, shared: float) -> Draw:
    """Two arms on one set of questions; `shared` is how often both meet the same difficulty."""

    def draw(rng: np.random.Generator, n: int, effect: float) -> tuple[NDArray, NDArray]:
        one = rng.random((1, n))
        other = np.where(rng.random((1, n)) < shared, one, rng.random((1, n)))
        return (one < base + effect).astype(float), (other < base).astype(float)

    return draw


def outcomes(ties: float) -> Draw:
    """Win, tie and loss against one half; the effect is that of the win rate."""

    def draw(rng: np.random.Generator, n: int, effect: float) -> tuple[NDArray, NDArray]:
        won = rng.random((1, n)) < 0.5 + effect / (1 - ties)
        values = np.where(rng.random((1, n)) < ties, 0.5, won.astype(float))
        return values, np.full((1, n), 0.5)

    return draw


def seeded(seeds: int, deviation: float) -> Draw:
    """Several trainings of each arm that differ by `deviation`."""

    def draw(rng: np.random.Generator, n: int, effect: float) -> tuple[NDArray, NDArray]:
        hard = rng.normal(0, 0.2, n)
        means = [
            np.clip(0.5 + shift + hard + rng.normal(0, deviation, (seeds, 1)), 0, 1)
            for shift in (effect, 0.0)
        ]
        first, second = ((rng.random((seeds, n)) < mean).astype(float) for mean in means)
        return first, second

    return draw


def losses(shape: float) -> Draw:
    """A loss per row: skewed differences."""

    def draw(rng: np.random.Generator, n: int, effect: float) -> tuple[NDArray, NDArray]:
        noise = (
            rng.gamma(4 / shape**2, shape / 2, (1, n)) - 2 / shape
            if shape
            else rng.normal(0, 1, (1, n))
        )
        return noise + effect, np.zeros((1, n))

    return draw


def simulate(draw: Draw, n: int, studies: int, effect: float, seed: int = 0) -> tuple[float, float]:
    """Return the share of studies with p <= 5%, and the share whose interval holds the effect."""
    rng = np.random.default_rng(seed)
    found = covered = 0
    bounded = not draw.__qualname__.startswith("losses")
    for _ in range(studies):
        first, second = draw(rng, n, effect)
        interval = compare(first, second, np.arange(n), (0.0, 1.0) if bounded else None).interval()
        found += interval is not None and not interval[0] <= 0 <= interval[1]
        covered += interval is None or interval[0] <= effect <= interval[1]
    return found / studies, covered / studies


CELLS: dict[str, tuple[Draw, int]] = {
    "right or wrong, n = 50": (right_or_wrong(0.5, 0.5), 50),
    "right or wrong, n = 200": (right_or_wrong(0.5, 0.5), 200),
    "right or wrong, 98%, n = 200": (right_or_wrong(0.98, 0.9), 200),
    "wins, 10% ties, n = 20": (outcomes(0.1), 20),
    "wins, 60% ties, n = 80": (outcomes(0.6), 80),
    "wins, no ties, n = 50": (outcomes(0.0), 50),
    "2 seeds, SD 0, n = 200": (seeded(2, 0.0), 200),
    "2 seeds, SD 6 points, n = 200": (seeded(2, 0.06), 200),
    "3 seeds, SD 3 points, n = 200": (seeded(3, 0.03), 200),
    "5 seeds, SD 6 points, n = 805": (seeded(5, 0.06), 805),
    "losses, normal, n = 80": (losses(0), 80),
    "losses, skewness 1, n = 80": (losses(1), 80),
}


def bound(share: float, studies: int) -> float:
    """Four standard errors of a share."""
    return 4 * math.sqrt(share * (1 - share) / studies)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    "studies",
    [pytest.param(250, marks=pytest.mark.slow), pytest.param(4000, marks=pytest.mark.nightly)],
)
def test_claims_are_seldom_false_and_intervals_hold_the_truth(name: str, studies: int) -> None:
    draw, n = CELLS[name]
    false, coverage = simulate(draw, n, studies, 0.0)
    assert false <= 0.05 + bound(0.05, studies)
    assert coverage >= 0.95 - bound(0.05, studies)


@pytest.mark.slow
def test_the_stated_difference_is_found_in_four_fifths_of_studies() -> None:
    failures = []
    for name, studies in (("right or wrong, n = 200", 300), ("3 seeds, SD 3 points, n = 200", 300)):
        draw, n = CELLS[name]
        rng = np.random.default_rng(5)
        stated = [compare(*draw(rng, n, 0.0), np.arange(n)).mde() for _ in range(100)]
        power, _ = simulate(draw, n, studies, float(np.mean(stated)), seed=7)
        if not 0.8 - bound(0.8, studies) - 0.02 <= power <= 0.87 + bound(0.8, studies):
            failures.append((name, power))
    assert not failures
