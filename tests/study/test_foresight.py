"""`recipes study plan` says what difference the primary question can find, and finds it."""

from __future__ import annotations

import numpy as np
import pytest

from recipes_lib.analysis.stats import compare
from recipes_lib.study.status import SPREADS, smallest


def test_more_questions_and_more_seeds_find_less() -> None:
    few, many = (smallest(*SPREADS["win_rate"], questions, 3) for questions in (100, 805))
    assert smallest(*SPREADS["win_rate"], 805, 5) < many < few


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_difference_of_a_plan_is_found_in_four_of_five_studies(seeds: int) -> None:
    (variance, spread), rng = SPREADS["win_rate"], np.random.default_rng(0)
    effect, hits, studies = smallest(variance, spread, 400, seeds), 0, 400
    for _ in range(studies):
        own = rng.normal(0, np.sqrt(variance / 2), 400)
        new = rng.normal(0, np.sqrt(variance / 2), (seeds, 400))
        moved = rng.normal(0, spread * np.sqrt(2) * (seeds > 1), (seeds, 1))
        result = compare(effect + own + new + moved, np.zeros((1, 400)), range(400), None)
        hits += result.p <= 0.05
    assert 0.7 <= hits / studies <= 0.9
