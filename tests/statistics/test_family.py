"""The error rate of a table of comparisons: 5% over all of it, whichever hypotheses are true."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special

from recipes_lib.statistics.family import Hypotheses, adjust

STUDIES = 4000
MOST = 0.05 + 2.6 * (0.05 * 0.95 / STUDIES) ** 0.5  # of an error rate of 5%, 1 in 200 exceed it


def test_the_primary_question_has_four_fifths_and_the_rest_one_fifth() -> None:
    first, *rest = adjust([Hypotheses(0.04, primary=True), *[Hypotheses(0.0025)] * 4])
    assert first.p <= 0.05 and all(one.p <= 0.05 for one in rest)
    first, *rest = adjust([Hypotheses(0.041, primary=True), Hypotheses(0.0026), Hypotheses(0.9)])
    assert first.p > 0.05 and rest[0].p <= 0.05
    assert adjust([Hypotheses(0.9, primary=True), Hypotheses(0.011)])[1].p > 0.05


def test_a_family_that_is_rejected_passes_its_part_on() -> None:
    behind = [Hypotheses(0.02), Hypotheses(0.04)]
    found = adjust([Hypotheses(0.001, primary=True), *behind])
    assert [one.p <= 0.05 for one in found] == [True, True, True]
    assert [one.level for one in found] == [0.05, 0.025, 0.025]
    kept = adjust([Hypotheses(0.5, primary=True), *behind])
    assert [one.p <= 0.05 for one in kept] == [False, False, False]
    assert [one.level for one in kept] == pytest.approx([0.04, 0.005, 0.005])
    # and back: everything behind it was found, so the primary one is held to 5%
    assert adjust([Hypotheses(0.045, primary=True), Hypotheses(0.001)])[0].p <= 0.05


@pytest.mark.parametrize("correlation", [0.0, 0.6])
@pytest.mark.parametrize(
    ("primary", "secondary"),  # means of normal statistics; 0 is a true "no difference"
    [
        ([0.0], [0.0] * 8),
        ([0.0], [4.0] * 8),
        ([9.0], [0.0] * 8),
        ([2.0], [0.0] * 5 + [3.0] * 3),
        ([0.0, 3.0, 3.0], [0.0, 3.0] * 4),
    ],
)
def test_a_false_difference_is_claimed_in_at_most_5_of_100_studies(
    primary: list[float], secondary: list[float], correlation: float
) -> None:
    rng = np.random.default_rng([len(primary), *map(round, primary + secondary)])
    means = np.array(primary + secondary)
    shared = np.sqrt(correlation) * rng.normal(size=(STUDIES, 1))
    drawn = means + shared + np.sqrt(1 - correlation) * rng.normal(size=(STUDIES, len(means)))
    false = 0
    for values in 2 * special.ndtr(-np.abs(drawn)):
        rows = [Hypotheses(p, primary=n < len(primary)) for n, p in enumerate(values)]
        false += any(
            one.p <= 0.05 and mean == 0 for one, mean in zip(adjust(rows), means, strict=True)
        )
    assert false / STUDIES <= MOST
    if means[0] == 0 and not any(means) and not correlation:
        assert false / STUDIES >= 0.035  # nor is the rate given away


def bounds_of(estimates: np.ndarray, margin: float) -> list[tuple[float, float]]:
    """Twice the one-sided p of lying above -margin and below it, of normal estimates."""
    above, below = (
        np.minimum(1, 2 * special.ndtr(-distance))
        for distance in (estimates + margin, margin - estimates)
    )
    return list(zip(above, below, strict=True))


def test_margins_take_nothing_from_the_differences() -> None:
    plain = adjust([Hypotheses(0.01), Hypotheses(0.02), Hypotheses(0.3)])
    margins = adjust([Hypotheses(p, (0.4, 0.6)) for p in (0.01, 0.02, 0.3)])
    assert margins[0].p == plain[0].p == pytest.approx(0.03)
    # what is found keeps half a place for its margins: 2.5 places in place of 2
    assert (plain[1].p, margins[1].p) == pytest.approx((0.04, 0.05))
    # a margin that is found needs no second test of the difference
    assert adjust([Hypotheses(0.6, (0.04, 0.9))])[0].bounds[0] == pytest.approx(0.04)


@pytest.mark.parametrize("correlation", [0.0, 0.6])
@pytest.mark.parametrize(
    ("primary", "secondary"),  # true effects in standard errors; the margin is 4
    [
        ([-4.0], [4.0, -4.0, 4.0, -4.0]),
        ([4.0], [0.0, 0.0, 4.0, 4.0]),
        ([8.0], [4.0, 4.0, 0.0, 0.0]),
        ([0.0], [4.0, 0.0, 4.0, -4.0]),
        ([-9.0, 9.0, -4.0], [9.0, 4.0, 0.0]),
        ([0.0], [0.0] * 5),
    ],
)
def test_a_false_difference_or_margin_is_claimed_in_at_most_5_of_100_studies(
    primary: list[float], secondary: list[float], correlation: float
) -> None:
    rng = np.random.default_rng(
        [7, len(primary), *(round(9 + mean) for mean in primary + secondary)]
    )
    means = np.array(primary + secondary)
    shared = np.sqrt(correlation) * rng.normal(size=(STUDIES, 1))
    drawn = means + shared + np.sqrt(1 - correlation) * rng.normal(size=(STUDIES, len(means)))
    false = 0
    for estimates in drawn:
        values = 2 * special.ndtr(-np.abs(estimates))
        rows = [
            Hypotheses(p, bounds, n < len(primary))
            for n, (p, bounds) in enumerate(zip(values, bounds_of(estimates, 4.0), strict=True))
        ]
        for one, mean in zip(adjust(rows), means, strict=True):
            shown = [p <= 0.05 for p in (one.p, *one.bounds)]
            if any(np.logical_and(shown, (mean == 0, mean <= -4, mean >= 4))):
                false += 1
                break
    assert false / STUDIES <= MOST
