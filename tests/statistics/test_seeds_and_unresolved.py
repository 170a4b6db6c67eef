"""Several seeds, and items without a verdict: both widen what is said, and never the other way
round.
"""

from __future__ import annotations

import numpy as np
import pytest

from recipes_lib.statistics.intervals import standard_error
from recipes_lib.statistics.paired import paired_test
from recipes_lib.statistics.power import Spread
from recipes_lib.statistics.seeds import crossed_interval, question_means, seeds_test
from recipes_lib.statistics.unresolved import compare


def test_seeds_that_disagree_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    questions = rng.normal(0.1, 0.3, 200)
    alike = np.stack([questions + rng.normal(0, 0.1, 200) for _ in range(3)])
    apart = alike + np.array([[-0.2], [0.0], [0.2]])
    narrow, wide = crossed_interval(alike)[0], crossed_interval(apart)[0]
    assert narrow.estimate == pytest.approx(wide.estimate)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_p_is_the_level_at_which_the_interval_touches_zero() -> None:
    table = np.random.default_rng(1).normal(0.15, 0.5, (3, 60))
    p = crossed_interval(table)[1]
    assert (
        p > paired_test(table.mean(axis=0), np.zeros(60)).p
    )  # the seeds decide, not the questions
    touching = crossed_interval(table, level=1 - p)[0]
    assert min(abs(touching.low), abs(touching.high)) == pytest.approx(0, abs=1e-6)


def test_two_seeds_that_agree_to_the_last_item_are_no_certainty() -> None:
    # 34 and 44 of 60 against 30 and 40 of 60: both seeds differ by 4, so nothing seems to vary
    # between them.
    order = np.random.default_rng(0).permutation(60)

    def answers(right: int, seed: int) -> np.ndarray:
        return (np.random.default_rng(seed).permutation(order) < right).astype(float)

    first, second = (
        np.stack([answers(34, 1), answers(44, 2)]),
        np.stack([answers(30, 3), answers(40, 4)]),
    )
    result, averaged = compare(first, second), paired_test(first.mean(axis=0), second.mean(axis=0))
    assert result.effect == pytest.approx(4 / 60)
    assert (
        result.p >= averaged.p > 0.05
        and result.low <= averaged.low < 0 < averaged.high <= result.high
    )
    assert result.mde() is None  # how much seeds differ is not known


def test_one_seed_is_no_crossed_table() -> None:
    interval, p = crossed_interval([[0.1, 0.2, 0.3]])
    assert (interval.low, interval.high, p) == (None, None, None)


def test_seeds_without_any_item_have_no_numbers() -> None:
    interval, p = crossed_interval(question_means(np.empty((2, 0)), []))
    assert (interval.estimate, interval.low, interval.high, p) == (None, None, None, None)
    nothing = compare(np.full((2, 5), np.nan), np.full((1, 5), 0.5), list("abcde"))
    assert (
        nothing.effect is None
        and nothing.unresolved == 5
        and (nothing.lowest, nothing.highest) == (-0.5, 0.5)
    )
    assert compare(np.empty((2, 0)), np.empty((2, 0)), []).effect is None


def test_equal_rows_have_no_variance_and_no_p() -> None:
    interval, p = crossed_interval(np.full((3, 10), 0.2))
    assert interval.low == interval.high == pytest.approx(0.2) and p is None


@pytest.mark.parametrize(("seeds", "spread"), [(2, 0.1), (3, 0.1), (5, 0.05)])
def test_coverage_over_seeds_and_questions(seeds: int, spread: float) -> None:
    rng = np.random.default_rng(seeds)
    covered = 0
    for _ in range(500):
        table = (
            rng.normal(0, 0.3, (1, 80))
            + rng.normal(0, spread, (seeds, 1))
            + rng.normal(0, 0.5, (seeds, 80))
        )
        interval = crossed_interval(table)[0]
        covered += interval.low <= 0 <= interval.high
    assert covered / 500 >= 0.93


def test_question_means_keep_the_mean_over_items() -> None:
    values = np.array([[1.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0]])
    table = question_means(values, ["a", "a", "b", "b", "b"])
    assert table.shape == (2, 2)
    assert table.mean() == pytest.approx(values.mean())


def test_a_base_without_seeds_is_paired_with_every_seed() -> None:
    first = np.random.default_rng(2).integers(0, 2, (3, 50)).astype(float)
    base = np.zeros((1, 50))
    result = seeds_test(first, base)
    assert result.effect == pytest.approx(first.mean())
    with pytest.raises(ValueError, match="cannot be paired"):
        seeds_test(first, np.zeros((2, 50)))


def test_without_unresolved_items_compare_is_the_paired_test() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 2, 80).astype(float), rng.integers(0, 2, 80).astype(float)
    result, plain = compare(a, b), paired_test(a, b)
    assert (result.effect, result.low, result.high, result.p) == (
        plain.effect,
        plain.low,
        plain.high,
        plain.p,
    )
    assert result.unresolved == 0 and result.lowest == result.effect == result.highest


def test_unresolved_items_widen_the_interval_and_raise_p() -> None:
    won = np.array([1.0] * 40 + [0.0] * 15 + [0.5] * 5)
    clean = compare(won, np.full(60, 0.5))
    torn = won.copy()
    torn[:4] = np.nan
    result = compare(torn, np.full(60, 0.5))
    assert clean.p < 0.05
    assert result.unresolved == 4 and result.n == 60
    assert result.low < clean.low and result.high >= clean.high
    assert result.p > clean.p


def test_the_interval_ends_where_the_intervals_of_the_extremes_end() -> None:
    won = np.array([1.0] * 30 + [0.0] * 20 + [np.nan] * 10)
    result, half = compare(won, np.full(60, 0.5)), np.full(60, 0.5)
    lost, all_won = (
        paired_test(np.where(np.isnan(won), fill, won), half, np.arange(60)) for fill in (0.0, 1.0)
    )
    assert (result.low, result.high) == (lost.low, all_won.high)
    assert (
        result.lowest == lost.effect > result.low and result.highest == all_won.effect < result.high
    )


def test_a_difference_that_unresolved_items_could_turn_round_is_never_shown() -> None:
    won = np.array([1.0] * 30 + [0.0] * 10 + [np.nan] * 60)
    result = compare(won, np.full(100, 0.5))
    assert result.effect == 0.25 and result.p == 1.0
    assert result.lowest < 0 < result.highest


def test_an_effect_that_open_items_turn_round_is_never_shown() -> None:
    # What is resolved in both seeds speaks against the first arm, what one seed left open speaks
    # for it, however it is filled.
    first = np.array([[0.0] * 40 + [1.0] * 60, [0.0] * 40 + [np.nan] * 60])
    result = compare(first, np.tile([0.2, 0.3, 0.25, 0.25], 25).reshape(1, -1))
    assert result.effect < 0 < result.lowest < result.highest
    assert result.p == 1.0


def test_nothing_resolved_and_nothing_at_all() -> None:
    result = compare([np.nan] * 5, [0.5] * 5)
    assert result.effect is None and result.n == 5 and result.unresolved == 5
    assert result.low < 0 < result.high and result.p == 1.0
    empty = compare([], [])
    assert (empty.effect, empty.p, empty.n, empty.mde()) == (None, None, 0, None)


def test_grades_are_filled_with_the_ends_of_their_scale() -> None:
    a, b = np.array([5.0, 4.0, np.nan, 3.0]), np.array([4.0, 4.0, 2.0, 3.0])
    result = compare(a, b, scale=(1.0, 5.0))
    assert result.lowest == pytest.approx((1 + 0 - 1 + 0) / 4)
    assert result.highest == pytest.approx((1 + 0 + 3 + 0) / 4)


def test_power_rests_on_the_same_spread() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 2, 800).astype(float), rng.integers(0, 2, 800).astype(float)
    result = compare(a, b)
    assert result.mde() == pytest.approx(2.8016 * standard_error(a - b) + 1 / 800, rel=1e-3)
    assert result.mde(0.01) > result.mde()
    needed = result.questions_needed()
    assert needed is None or (needed > 800) == (abs(result.effect) < result.mde())


def test_two_seeds_that_differ_need_more_seeds_not_more_questions() -> None:
    rng = np.random.default_rng(4)
    first = rng.normal(0, 1, (2, 400)) + np.array([[0.1], [0.9]])
    result = compare(first, np.zeros((1, 400)), scale=(-3, 3))
    assert result.mde() > 5 * 2.8 * 0.05
    assert result.questions_needed() is None


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_stated_difference_is_found_four_times_in_five_over_few_seeds(seeds: int) -> None:
    rng = np.random.default_rng(seeds)

    def studies(effect: float, number: int) -> list:
        shape = (seeds, 60)
        return [
            compare(
                rng.normal(effect, 0.5, shape) + rng.normal(0, 0.1, (seeds, 1)),
                np.zeros((1, 60)),
                scale=(-9, 9),
            )
            for _ in range(number)
        ]

    stated = float(np.mean([one.mde() for one in studies(0.3, 300)]))
    found = np.mean([one.p <= 0.05 for one in studies(stated, 600)])
    assert 0.75 <= found <= 0.87


def test_few_pairs_that_differ_cannot_find_a_small_difference() -> None:
    first, second = np.array([1.0, 1.0, *[0.0] * 78]), np.zeros(80)
    assert compare(first, second).mde() > 6 / 80  # six of six must agree to reach p <= 0.05


def test_open_items_are_counted_against_the_difference_that_would_have_been_found() -> None:
    won = np.array([1.0, 0.0] * 400)
    torn = won.copy()
    torn[:40] = np.nan
    whole, result = compare(won, np.full(800, 0.5)), compare(torn, np.full(800, 0.5))
    # A share f of open items takes half of f from the effect, of which 1 - f is left.
    assert result.mde() == pytest.approx((whole.mde() + 0.025) / 0.95, rel=0.02)
    grades = np.array([4.0, 5.0] * 400)
    torn = np.where(np.arange(800) < 40, np.nan, grades)
    result = compare(torn, grades, scale=(1, 5))
    assert result.mde() > (40 * 3.5 / 800) / 0.95  # the worse side: an open 4 or 5 may be a 1


def test_questions_needed_find_the_effect() -> None:
    spread = Spread(0.01**2, 799)
    factor = spread.questions_factor(0.014)
    assert Spread(0.01**2 / factor, 799).mde() == pytest.approx(0.014, rel=1e-6)
