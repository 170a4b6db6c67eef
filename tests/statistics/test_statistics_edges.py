"""No item, one item, ties and no variance: an answer that says n/a, never a crash."""

from __future__ import annotations

import numpy as np
import pytest

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
from recipes_lib.statistics.paired import mcnemar_p, paired_test, sign_flip_ps
from recipes_lib.statistics.power import Spread

MEANS = [bca, studentised, mean_interval]


@pytest.mark.parametrize("method", MEANS)
def test_no_item_has_no_mean_and_no_interval(method) -> None:
    interval = method([])
    assert (interval.estimate, interval.low, interval.high, interval.n) == (None, None, None, 0)


@pytest.mark.parametrize("method", MEANS)
def test_one_item_has_a_mean_but_no_interval(method) -> None:
    interval = method([3.0])
    assert (interval.estimate, interval.low, interval.high) == (3.0, None, None)


@pytest.mark.parametrize("method", MEANS)
def test_many_items_of_one_cluster_have_no_interval(method) -> None:
    assert method([1.0, 2.0, 5.0], ["q", "q", "q"]).low is None


@pytest.mark.parametrize("method", MEANS)
def test_equal_values_give_an_interval_of_no_width_that_says_so(method) -> None:
    interval = method([0.1] * 200)
    assert interval.low == interval.high == pytest.approx(0.1)
    assert interval.method == "zero variance"


def test_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        mean_interval([1.0, float("nan")])


def test_rates_without_items_are_unknown() -> None:
    assert wilson(0, 0).estimate is None
    assert rate_bounds(0, 0, 0).all_won is None
    assert standard_error([1.0]) is None


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError):
        wilson(3, 2)
    with pytest.raises(ValueError):
        rate_bounds(8, 10, 3)


def test_all_ties_cannot_be_tested() -> None:
    assert mcnemar_p(0, 0) is None
    assert np.isnan(sign_flip_ps(np.zeros((1, 50)))[0])
    assert np.isnan(sign_flip_ps(np.zeros((1, 0)))[0])
    result = paired_test([1, 0, 1], [1, 0, 1])
    assert result.p is None and result.effect == 0.0
    assert paired_test([], []).p is None
    assert paired_test([2.0], [1.5]).low is None


def test_pairs_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2"):
        paired_test([1, 0, 1], [1, 0])


def test_power_without_spread_is_unknown() -> None:
    assert Spread(0.0).mde() is None


def test_agreement_of_nothing_one_and_one_label() -> None:
    assert accuracy([], []).estimate is None
    assert cohens_kappa([], []).estimate is None
    assert cohens_kappa(["A"], ["A"]).estimate is None
    assert cohens_kappa(["A"] * 9, ["A"] * 9).method == "undefined: one label"
