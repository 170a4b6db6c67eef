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
