"""`recipes study plan` says what difference the primary question can find, and finds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recipes_lib.analysis.stats import compare
from recipes_lib.study.config import load_study
from recipes_lib.study.foresight import _KINDS, Foresight, foresee, smallest

EVAL = "study--alpaca_eval"


def foreseen(folder: Path, questions: int | None, *words: str) -> Foresight:
    found = foresee(load_study(folder / "tiny.yaml", words), {EVAL: questions})
    assert found is not None
    return found


def test_the_plan_names_size_difference_and_assumption(study_folder: Path) -> None:
    first, second = foreseen(study_folder, 805, "seeds=[1, 2, 3]").lines()
    assert "805 questions, 3 seeds per arm, 3 comparisons" in first
    assert "points in 80% of studies (assumed: 30% ties" in second


def test_more_questions_and_more_seeds_find_less(study_folder: Path) -> None:
    few, many = (foreseen(study_folder, n).finds for n in (100, 805))
    assert few and many and many < few
    three, five = (foreseen(study_folder, 805, f"seeds={list(range(n))}").finds for n in (3, 5))
    assert three and five and five < three


def test_what_is_not_known_is_said(study_folder: Path) -> None:
    assert "however large" in foreseen(study_folder, 4).lines()[1]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_difference_of_a_plan_is_found_in_four_of_five_studies(seeds: int) -> None:
    kind, rng = _KINDS["win_rate"], np.random.default_rng(0)
    effect, found, studies = smallest(kind, 400, seeds, 0.05), 0, 400
    for _ in range(studies):
        own = rng.normal(0, np.sqrt(kind.variance / 2), 400)
        new = rng.normal(0, np.sqrt(kind.variance / 2), (seeds, 400))
        moved = rng.normal(0, kind.seeds * np.sqrt(2) * (seeds > 1), (seeds, 1))
        result = compare(effect + own + new + moved, np.zeros((1, 400)), range(400), None)
        found += result.p <= 0.05
    assert 0.7 <= found / studies <= 0.9
