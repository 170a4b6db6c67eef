"""Human labels correct a judge's mean: estimate, interval, and what a biased judge claims."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from recipes_lib.statistics.intervals import mean_interval
from recipes_lib.statistics.labels import random_choice_p, rectified
from recipes_lib.statistics.unresolved import compare

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import human_labels

# Labelled and unlabelled items as (judge, people): how many, then estimate and 95% interval of
# ppi_py 0.2.3 (numpy 2.4.6): ppi_mean_pointestimate and ppi_mean_ci(alpha=0.05). The first two are
# its published deforestation example, examples/baselines/forest_badmodel.npz: the first n of
# numpy.random.default_rng(0).permutation(1596) are labelled.
PPI_PY = [
    (
        {(0, 0): 79, (0, 1): 18, (1, 0): 3, (1, 1): 0},
        {0: 1466, 1: 30},
        (0.18, 0.10470064263657669, 0.2552993573634233),
    ),
    (
        {(0, 0): 160, (0, 1): 31, (1, 0): 8, (1, 1): 1},
        {0: 1372, 1: 24},
        (0.16, 0.10919192655191057, 0.21080807344808944),
    ),
    (
        {
            (1, 1): 31,
            (1, 0.5): 9,
            (1, 0): 4,
            (0.5, 1): 6,
            (0.5, 0.5): 14,
            (0.5, 0): 5,
            (0, 1): 2,
            (0, 0.5): 7,
            (0, 0): 22,
        },
        {1: 330, 0.5: 200, 0: 175},
        (0.5666814125231378, 0.5017003588574555, 0.6316624661888203),
    ),
]


@pytest.mark.parametrize(("labelled", "unlabelled", "theirs"), PPI_PY)
def test_estimate_and_interval_are_those_of_ppi_py_and_the_interval_a_little_wider(
    labelled: Mapping[tuple[float, float], int],
    unlabelled: Mapping[float, int],
    theirs: tuple[float, float, float],
) -> None:
    pairs = [pair for pair, n in labelled.items() for _ in range(n)]
    rest = [(value, np.nan) for value, n in unlabelled.items() for _ in range(n)]
    judged, human = np.array([*pairs, *rest], dtype=float).T
    interval = mean_interval(rectified(judged, human))
    estimate, low, high = theirs
    assert interval.estimate == pytest.approx(estimate, abs=1e-12)
    # few labels tell little of their own spread, which theirs leaves out
    assert 1 <= (interval.high - interval.low) / (high - low) <= 1.09
    assert interval.low == pytest.approx(low, abs=0.012)
    assert interval.high == pytest.approx(high, abs=0.012)


def test_all_items_labelled_leave_nothing_of_the_judge() -> None:
    judged, human = human_labels.study(np.random.default_rng(1), 0.6, "useless", 805)
    assert rectified(judged, human).mean() == pytest.approx(human.mean())


def test_a_judge_that_labels_never_contradict_is_still_not_certain() -> None:
    judged = np.tile([1.0, 0.0], 400)
    human = np.where(np.arange(800) < 20, judged, np.nan)
    interval, alone = mean_interval(rectified(judged, human)), mean_interval(judged)
    assert interval.estimate == pytest.approx(0.5, abs=0.01)
    # 3 / 20, the rule of three: an error that no label shows may be as frequent
    assert interval.high - interval.estimate > 0.1 > alone.high - 0.5


def test_an_item_without_a_verdict_stays_open() -> None:
    judged, human = human_labels.study(np.random.default_rng(2), 0.5, "biased", 60)
    judged[0, [3, 5]] = np.nan
    assert np.isnan(rectified(judged, human))[0].nonzero()[0].tolist() == [3, 5]


def test_each_training_is_corrected_by_its_own_labels() -> None:
    judged, human = human_labels.study(np.random.default_rng(3), 0.5, "biased", 60, seeds=3)
    together = rectified(judged, human)
    for one, training in enumerate(together):
        assert training == pytest.approx(rectified(judged[one], human[one]))


def test_labels_of_every_answer_to_a_few_questions_claim_no_more_than_labels_of_one_each() -> None:
    rng, questions, half = np.random.default_rng(4), np.repeat(np.arange(200), 4), np.full(800, 0.5)
    claims, refused = 0, 0
    for _ in range(100):
        truth = np.repeat(rng.integers(0, 2, 200).astype(float), 4)
        judged = np.where((truth == 0) & np.repeat(rng.random(200) < 0.4, 4), 1.0, truth)
        asked = np.isin(questions, rng.choice(200, 20, replace=False))
        human = np.where(asked, truth, np.nan)
        refused += random_choice_p(judged, human, questions) < 0.05
        tested = compare(rectified(judged, human, questions), half, questions)
        claims += tested.p is not None and tested.p <= 0.05
    assert claims <= 10 and refused <= 10  # 5, and two standard errors


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_biased_judge_claims_falsely_alone_and_not_with_labels(seeds: int) -> None:
    alone, claims, covered = human_labels.simulate(0.5, "biased", 50, 60, seeds)
    assert alone > 0.9 and claims <= 0.05 + 2 * (0.05 * 0.95 / 60) ** 0.5
    assert covered >= 0.88
