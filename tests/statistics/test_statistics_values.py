"""The numbers are right: against scipy and statsmodels, against enumeration, and by coverage."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from scipy import stats

from recipes_lib.statistics.family import Hypotheses, adjust
from recipes_lib.statistics.intervals import (
    accuracy,
    bca,
    cohens_kappa,
    mean_interval,
    rate_bounds,
    standard_error,
    studentised,
    wilson,
)
from recipes_lib.statistics.paired import (
    mcnemar_p,
    paired_binary_interval,
    paired_test,
    sign_flip_ps,
)
from recipes_lib.statistics.power import Spread


def sign_flip_p(values: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> float:
    return float(sign_flip_ps(np.atleast_2d(values), resamples=resamples, seed=seed)[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 900), st.data())
def test_wilson_equals_scipy(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert (wilson(k, n).low, wilson(k, n).high) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_the_exact_binomial_test(b: int, c: int) -> None:
    if b + c:
        assert mcnemar_p(b, c) == pytest.approx(stats.binomtest(b, b + c, 0.5).pvalue)


def test_a_table_of_one_family_is_corrected_as_statsmodels_does() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = [0.04, 0.001, 0.2, 0.012, 0.03]
    for primary in (True, False):
        adjusted = adjust([Hypotheses(p, primary=primary) for p in p_values])
        assert [one.p for one in adjusted] == pytest.approx(
            list(multitest.multipletests(p_values, method="holm")[1])
        )


def test_kappa_equals_statsmodels() -> None:
    interrater = pytest.importorskip("statsmodels.stats.inter_rater")
    first, second = list("AABBBCCCCA") * 5, list("ABBBBCCACA") * 5
    table = np.zeros((3, 3))
    for a, b in zip(first, second, strict=True):
        table["ABC".index(a), "ABC".index(b)] += 1
    kappa = cohens_kappa(first, second)
    expected = interrater.cohens_kappa(table)
    assert kappa.estimate == pytest.approx(expected.kappa)
    assert (kappa.low, kappa.high) == pytest.approx(
        (expected.kappa_low, expected.kappa_upp), abs=0.05
    )
    assert accuracy(first, second).estimate == pytest.approx(0.8)


def test_bca_agrees_with_scipy_on_skewed_values() -> None:
    values = np.random.default_rng(3).exponential(size=150)
    ours = bca(values, resamples=6000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=6000, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_the_same_values_give_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(0).normal(size=300)
    assert bca(values) == bca(values)
    assert bca(values, seed=1) != bca(values)


def test_repeating_every_item_inside_its_cluster_does_not_narrow_the_interval() -> None:
    values = np.random.default_rng(0).normal(size=60)
    repeated, clusters = np.repeat(values, 10), np.repeat(np.arange(60), 10)
    assert standard_error(repeated, clusters) == pytest.approx(standard_error(values))
    once, ten = mean_interval(values), mean_interval(repeated, clusters)
    assert (ten.low, ten.high) == pytest.approx((once.low, once.high))
    naive = mean_interval(repeated)
    assert naive.high - naive.low < 0.5 * (ten.high - ten.low)


def test_a_hundred_thousand_clusters_take_a_moment() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    start = time.process_time()
    interval = bca(values)
    assert time.process_time() - start < 5
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / np.sqrt(100_000), rel=0.1)


def test_a_bound_is_the_end_of_an_interval_and_not_a_point():
    bounds = rate_bounds(60, 100, 20)
    assert (bounds.low, bounds.high) == (wilson(60, 100).low, wilson(80, 100).high)
    assert bounds.low < bounds.all_lost < bounds.all_won < bounds.high


def test_unresolved_items_widen_the_bounds_on_both_sides() -> None:
    clean, torn = rate_bounds(60, 100, 0), rate_bounds(60, 100, 20)
    assert (torn.all_lost, torn.all_won) == (0.6, 0.8)
    assert clean.low == wilson(60, 100).low
    assert torn.low == clean.low and torn.high > clean.high


def test_sign_flip_is_exact_for_outcomes_and_grades_and_samples_other_large_ones() -> None:
    assert sign_flip_p([1.0, 1.0, 1.0]) == 0.25
    assert sign_flip_p(np.full(40, 1.0)) == pytest.approx(2 * 0.5**40)
    assert sign_flip_p(np.linspace(1.0, 1.1, 40) ** 0.37) == pytest.approx(1 / 10_001)
    assert sign_flip_p([1.0, -1.0] * 20) == pytest.approx(1.0)


def test_sign_flip_on_a_lattice_equals_the_enumeration() -> None:
    rng = np.random.default_rng(3)
    signs = np.array(list(itertools.product((-1, 1), repeat=12)))
    for _ in range(20):
        grades = rng.integers(-4, 5, 12) / 2
        if grades.any():
            expected = (np.abs(signs @ grades) >= abs(grades.sum()) - 1e-9).mean()
            assert sign_flip_p(grades) == pytest.approx(expected)


def test_sign_flip_is_normal_for_very_many_clusters() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(0.02, 1, 3000)
    z = values.sum() / np.sqrt((values**2).sum())
    assert sign_flip_p(values) == pytest.approx(2 * stats.norm.sf(abs(z)))


def test_adjusted_wald_interval_holds_where_nothing_differs() -> None:
    interval = paired_binary_interval(0, 0, 100)
    assert interval.estimate == 0 and interval.low == pytest.approx(-interval.high)
    assert 0.02 < interval.high < 0.04
    assert paired_binary_interval(0, 0, 0).estimate is None


def test_the_adjusted_wald_interval_covers_with_few_discordant_pairs() -> None:
    rng = np.random.default_rng(5)
    drawn = rng.multinomial(80, [0.04, 0.01, 0.95], size=2000)
    covered = [
        (i := paired_binary_interval(int(a), int(b), 80)).low <= 0.03 <= i.high for a, b, _ in drawn
    ]
    assert np.mean(covered) > 0.93


def test_sign_flip_keeps_its_level_under_the_null() -> None:
    rng = np.random.default_rng(5)
    rejected = sum(
        (sign_flip_p(rng.normal(size=25), resamples=400, seed=i) or 1) <= 0.05 for i in range(300)
    )
    assert rejected <= 28  # binomial 99.9% limit of a 5% test over 300


@pytest.mark.parametrize("n", [20, 80])
def test_studentised_interval_covers_a_skewed_mean(n: int) -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for i in range(300):
        interval = studentised(rng.exponential(size=n), resamples=500, seed=i)
        covered += interval.low <= 1.0 <= interval.high
    assert covered / 300 >= 0.91


def test_binary_arms_use_mcnemar_and_clustered_ones_the_sign_flip() -> None:
    first, second = [1, 1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1, 1]
    assert paired_test(first, second).test == "mcnemar exact"
    assert paired_test(first, second).p == mcnemar_p(6, 1)
    assert paired_test(first, second, clusters=[0, 0, 1, 1, 2, 2, 3, 3]).test == "sign flip"


def test_self_comparison_is_never_significant() -> None:
    values = np.random.default_rng(0).normal(size=200)
    result = paired_test(values, values)
    assert (result.effect, result.low, result.high, result.p) == (0.0, 0.0, 0.0, None)


def test_an_effect_of_the_detectable_size_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(2)
    found = 0
    for i in range(200):
        differences = rng.normal(size=100)
        effect = Spread(differences.var(ddof=1) / 100).mde()
        found += (sign_flip_p(differences + effect, resamples=300, seed=i) or 1) <= 0.05
    assert 0.7 <= found / 200 <= 0.9
