"""What human labels make of a sentence: the corrected rate is claimed, and the judge's is said."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recipes_lib.compare.claims import compare_arms, numbers_text
from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.relabelling import relabelled
from recipes_lib.compare.row import TableRow
from recipes_lib.compare.table import build_rows, build_scores, corrected
from recipes_lib.eval_log import Measure, Sample
from recipes_lib.statistics.labels import random_choice_p, rectified
from recipes_lib.statistics.paired import Array
from recipes_lib.study.ledger import _results_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import human_labels
import study_power


def measures(name: str, opponent: str, judged: Array, human: Array) -> list[list[Measure]]:
    """The measures of an arm, one per training."""
    return [
        [
            replace(
                study_power.measure("win_rate", opponent.format(seed), values, f"{name}-{seed}"),
                samples=tuple(
                    Sample(str(n), value=float(value), human=None if np.isnan(told) else told)
                    for n, (value, told) in enumerate(zip(values, said, strict=True))
                ),
            )
        ]
        for seed, (values, said) in enumerate(zip(judged, human, strict=True))
    ]


def arms(**lists: list[list[Measure]]) -> Measurements:
    return Measurements({name: study_power._arm(name, mine) for name, mine in lists.items()})


def row_of(measurements: Measurements) -> TableRow:
    (row,) = corrected(build_rows(measurements), power=False)
    return row


def head_to_head(labels: int, judge: str = "biased", seeds: int = 1) -> Measurements:
    judged, human = human_labels.study(np.random.default_rng(0), 0.5, judge, labels, seeds)
    return arms(b=[[] for _ in range(seeds)], a=measures("a", "b-{}", judged, human))


def test_a_claim_rests_on_the_corrected_rate_and_says_what_the_judge_alone_would_have_said() -> (
    None
):
    alone, row = row_of(head_to_head(0)), row_of(head_to_head(200))
    assert alone.p_holm is not None and row.p_holm is not None and row.tested is not None
    assert alone.p_holm < 0.001 and row.p_holm > 0.05
    assert row.tested.low < 0 < row.tested.high
    said = f"corrected by 200 human labels (the judge alone: {alone.effect} {alone.limits})"
    assert said in numbers_text(row)
    assert row.flags == ("200 human labels, taken to be a random choice",)
    assert row.to_dict()["judge_alone"] == f"{alone.effect} {alone.limits}"
    assert "judge_alone" not in alone.to_dict()


def test_what_a_difference_would_need_are_labels_too() -> None:
    (row,) = compare_arms(head_to_head(200)).rows
    assert row.verdict == "no difference shown" and row.needed is not None
    labels = math.ceil(200 * row.needed / 805)
    assert f"would need about {row.needed:,} questions and {labels:,} human labels." in row.sentence


def test_the_score_of_an_arm_is_the_corrected_rate_too() -> None:
    measured = head_to_head(200)
    (score,), row = build_scores(measured), row_of(measured)
    assert score.value == pytest.approx(row.first_value) and score.low < 0.5 < score.high
    assert score.label == "win_rate, corrected by 200 human labels"


def test_too_few_labels_of_a_training_correct_nothing_and_are_said() -> None:
    alone, row = row_of(head_to_head(0)), row_of(head_to_head(19))
    assert row.tested == alone.tested
    told = "not used: 19 of one model's answers, fewer than 20"
    assert row.flags == (f"19 human labels {told}",)
    assert row_of(head_to_head(19, seeds=2)).flags == (f"38 human labels {told}",)


def test_labels_of_the_answers_that_the_judge_liked_are_no_random_choice() -> None:
    judged, human = human_labels.study(np.random.default_rng(0), 0.5, "biased", 805)
    liked = np.flatnonzero(judged[0] == 1)[:30]
    human[0, np.setdiff1d(np.arange(805), liked)] = np.nan
    measured = arms(b=[[]], a=measures("a", "b-{}", judged, human))
    (row,) = compare_arms(measured).rows
    assert build_scores(measured)[0].label == "win_rate"
    assert row.verdict == "cannot be tested" and "are no random choice" in row.sentence
    ps = []
    for seed in range(500):
        drawn = human_labels.study(np.random.default_rng(seed), 0.5, "biased", 30, 3)
        ps.append(random_choice_p(*drawn))
    assert 0.02 <= np.mean(np.array(ps) <= 0.05) <= 0.075
    assert min(ps) > 1e-4


def test_every_training_needs_labels_of_its_own() -> None:
    judged, human = human_labels.study(np.random.default_rng(0), 0.5, "biased", 60, 3)
    row = row_of(arms(b=[[]] * 3, a=measures("a", "b-{}", judged, human)))
    assert row.labels == 180 and row.tested is not None and row.tested.seeds == 3
    assert row.first_value == pytest.approx(rectified(judged, human).mean())
    human[1] = np.nan
    row = row_of(arms(b=[[]] * 3, a=measures("a", "b-{}", judged, human)))
    assert row.labels == 0 and "0 of one model's answers" in row.flags[0]


def test_labels_of_both_arms_correct_a_difference_and_of_one_arm_nothing() -> None:
    rng = np.random.default_rng(1)
    judged, human = human_labels.study(rng, 0.5, "biased", 150)
    fair, asked = human_labels.study(rng, 0.5, "perfect", 160)
    one = measures("a", "reference", judged, human)
    alone = row_of(arms(b=measures("b", "reference", fair, asked * np.nan), a=one))
    assert alone.flags == ("150 human labels not used: 0 of one model's answers, fewer than 20",)
    assert alone.labels == 0 and alone.p_holm is not None and alone.p_holm < 0.001
    row = row_of(arms(b=measures("b", "reference", fair, asked), a=one))
    assert row.labels == 310 and row.p_holm is not None and row.p_holm > 0.05
    assert alone.effect in row.judge_alone and row.difference == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize(
    ("judge", "seeds"), [("rarely wrong", 1), ("useless, biased", 1), ("biased", 3)]
)
def test_copies_of_the_study_are_corrected_anew_each(
    judge: str, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(human_labels, "QUESTIONS", 150)
    own = compare_arms(head_to_head(60, judge, seeds), relabel=relabelled).relabelling
    assert own is not None and own.claims / own.copies <= 0.0638
    if judge == "rarely wrong":
        assert own.planted is not None
        assert 0.75 <= own.planted.found / own.planted.copies <= 0.9


def test_labels_that_come_after_a_look_are_other_results() -> None:
    def result(labels: int) -> str:
        return _results_of(row_of(head_to_head(labels)), str)

    assert result(0) == result(19) != result(60) == result(60) != result(61)
