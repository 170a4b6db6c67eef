"""Levels and futility of looks, and simulated studies that stop by them."""

import numpy as np
import pytest
from tests.analysis.simulated import answers, arms_with, at_looks

from recipes_lib.analysis.aims import Aims
from recipes_lib.analysis.claims import conclude
from recipes_lib.analysis.futility import Target, chance, expected_seeds
from recipes_lib.analysis.looks import looks_after, shares
from recipes_lib.stats import compare, planned_effect


def tables(gap: float, seeds: int, questions: int, spread: float, rng: np.random.Generator):
    """Return two arms of 0/1 answers, so far apart and with so much between seeds."""
    hard = rng.uniform(-0.15, 0.15, questions)
    arms = []
    for sign in (1, -1):
        rates = 0.5 + sign * gap / 2 + hard + rng.normal(0, spread, (seeds, 1))
        arms.append((rng.random((seeds, questions)) < rates) * 1.0)
    return arms


def test_the_shares_of_all_looks_add_up_to_the_level_and_the_last_has_four_fifths() -> None:
    for number in range(1, 7):
        assert sum(shares(number)) == pytest.approx(1.0)
        assert shares(number)[-1] == (0.8 if number > 1 else 1.0)
    first, last = looks_after([3, 5], arms=4)
    assert (first.saved, first.is_last, last.saved, last.is_last) == (8, False, 0, True)
    assert first.place == "look 1 of 2, after 3 of 5 seeds"


def test_the_chance_is_small_without_a_difference_and_large_with_a_clear_one() -> None:
    rng = np.random.default_rng(1)
    target = Target(seeds=5, alpha=0.04)
    chances = []
    for gap in (0.0, 0.1, 0.3):
        of_gap = []
        for _ in range(30):
            first, second = tables(gap, 3, 400, 0.0, rng)
            of_gap.append(chance(compare(first, second, range(400)), target))
        chances.append(float(np.median(of_gap)))
    assert chances[0] < 0.1 and chances[2] > 0.99
    assert chances == sorted(chances)


def test_with_a_margin_futility_asks_about_everything_that_can_be_shown() -> None:
    first, second = tables(0.0, 3, 400, 0.0, np.random.default_rng(2))
    first[:] = second
    first[0, :20] = 1 - first[0, :20]
    test = compare(first, second, range(400))
    alone = chance(test, Target(seeds=5, alpha=0.04))
    with_margin = chance(test, Target(seeds=5, alpha=0.04, margin=0.2))
    assert alone < 0.1 and with_margin > 0.9
    ahead, behind = tables(0.12, 3, 200, 0.0, np.random.default_rng(3))
    test = compare(ahead, behind, range(200))
    narrow = Target(seeds=5, alpha=1e-6, margin=0.02)
    assert chance(test, narrow) < 0.1
    kept = Target(seeds=5, alpha=1e-3, margin=0.05, favour=1)
    assert chance(test, kept) > chance(test, Target(seeds=5, alpha=1e-3, margin=0.05, favour=-1))


def test_a_plan_expects_fewer_seeds_without_a_difference_than_at_one() -> None:
    effect = planned_effect("pass_rate", 200, 5)
    none = expected_seeds([3, 5], "pass_rate", 200, 0.0)
    at_effect = expected_seeds([3, 5], "pass_rate", 200, effect)
    assert 3.1 < none < 3.5 and 4.2 < at_effect < 4.8
    assert 3 < expected_seeds([3, 5], "pass_rate", 200, 0.0, arms=4, comparisons=6) < 4
    assert expected_seeds([3, 5], "lm_eval/gsm8k", 200, 0.0) is None


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seeds", [(3, 5), (2, 3, 5), (3, 5, 8)])
def test_a_study_that_stops_claims_falsely_in_at_most_a_twentieth_of_cases(seeds) -> None:
    """Each study goes the whole way from answers to claims, at each of its looks."""
    studies = 600
    rng = np.random.default_rng(len(seeds))
    false = 0
    covered = 0
    for _ in range(studies):
        tables = answers([0.5, 0.5], seeds[-1], 200, 0.03, rng)
        *_, last = at_looks(tables, seeds)
        (claim,) = last.claims
        low, high = claim.row.interval
        false += claim.verdict in ("better", "worse")
        covered += low <= 0 <= high
    error = (0.05 * 0.95 / studies) ** 0.5
    assert false / studies <= 0.05 + 2 * error
    assert covered / studies >= 0.95 - 2 * error


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seeds", [(3, 5), (3, 5, 8)])
def test_looks_cost_at_most_six_points_of_power(seeds) -> None:
    studies = 400
    rng = np.random.default_rng(7)
    found = {"looks": 0, "fixed": 0}
    for _ in range(studies):
        tables = answers([0.5, 0.58], seeds[-1], 200, 0.02, rng)
        *_, last = at_looks(tables, seeds)
        found["looks"] += last.claims[0].verdict in ("better", "worse")
        fixed = conclude(arms_with(tables), Aims("pass_rate"))
        found["fixed"] += fixed.claims[0].verdict in ("better", "worse")
    # the two are of the same studies: their difference varies little
    assert found["fixed"] - found["looks"] <= 0.06 * studies + 2 * studies**0.5 / 4, found
    assert found["fixed"] > 0.5 * studies, found
