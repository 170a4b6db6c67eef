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
from recipes_lib.compare.row import TableRow, corrected_values, measures_of
from recipes_lib.compare.table import build_rows, build_scores, corrected
from recipes_lib.eval_log import Measure, Sample
from recipes_lib.report.content import _seed_means
from recipes_lib.statistics.labels import random_choice_p, rectified
from recipes_lib.statistics.paired import Array

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import human_labels
import study_power
from tests.compare.test_claims import arm as trained
from tests.compare.test_claims import study as declared


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
    told = "not used: of 19 questions in one training, fewer than 20"
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
    assert row.labels == 0 and "of 0 questions in one training" in row.flags[0]


def test_a_corrected_difference_is_not_held_against_what_the_judge_s_own_rates_differ_by() -> None:
    def arm_of(name: str, *people: float) -> list[list[Measure]]:
        """Trainings that the judge likes alike, and people as these rates say; NaN: not asked."""
        judged, human = np.empty((2, len(people), 150))
        for training, rate in enumerate(people):
            judged[training] = np.resize([1.0, 0.5, 0.0], 150)
            judged[training, -1] = 0.5 * training / 2
            human[training] = np.where(np.arange(150) % 10 < 10 * rate, 1.0, 0.0)
            human[training, 90:] = np.nan
            human[training] *= 1 if rate >= 0 else np.nan
        return measures(name, "reference", judged, human)

    def row_with(r4: list[list[Measure]]) -> TableRow:
        lists = {"r4": r4, "r8": arm_of("r8", 0.1), "r32": arm_of("r32", 0.9)}
        made = Measurements({name: trained(name, mine) for name, mine in lists.items()})
        rows = compare_arms(made, (), declared("r4", "r8", "r32")).rows
        return next(row for row in rows if set(row.arms) == {"r32", "r8"})

    row = row_with(arm_of("r4", -1, -1, -1))  # the judge gives them nearly the same rate
    assert row.verdict == "better" and row.labels == 180
    assert "(the judge alone: 0.0 points)" in row.sentence  # no interval: all items agree
    assert "two trainings cannot tell" in row.sentence and "effect" not in row.sentence
    row = row_with(arm_of("r4", 0.5, 0.5, 0.6))
    assert "so this is its effect: two trainings of one recipe differ by no more" in row.sentence


def test_what_seeds_differ_by_is_that_of_the_corrected_rate() -> None:
    measured = arms(
        b=[[]] * 2,
        a=measures(
            "a", "b-{}", *human_labels.study(np.random.default_rng(0), 0.5, "biased", 60, 2)
        ),
    )
    (score,) = build_scores(measured)
    corrected = corrected_values(measures_of(measured, "a")[("e", "", "win_rate"), "b"])
    assert "corrected by 120" in score.label
    assert _seed_means(measured, score) == pytest.approx(list(corrected.mean(axis=1)))


def test_labels_of_several_answers_to_one_question_count_as_one() -> None:
    drawn = [(str(n), draw) for n in range(40) for draw in (1, 2, 3, 4)]

    def row_with(questions: int) -> TableRow:
        samples = tuple(
            Sample(
                name,
                value=float(int(name) % 2),
                draw=draw,
                human=float(int(name) % 3 == 0) if int(name) < questions else None,
            )
            for name, draw in drawn
        )
        ((one,),) = measures("a", "b-{}", np.zeros((1, 1)), np.full((1, 1), np.nan))
        return row_of(arms(b=[[]], a=[[replace(one, samples=samples)]]))

    told = "40 human labels not used: of 10 questions in one training, fewer than 20"
    assert row_with(10).labels == 0 and row_with(10).flags == (told,)
    assert row_with(20).labels == 80


def test_labels_of_both_arms_correct_a_difference_and_of_one_arm_nothing() -> None:
    rng = np.random.default_rng(1)
    judged, human = human_labels.study(rng, 0.5, "biased", 150)
    fair, asked = human_labels.study(rng, 0.5, "perfect", 160)
    one = measures("a", "reference", judged, human)
    alone = row_of(arms(b=measures("b", "reference", fair, asked * np.nan), a=one))
    assert alone.flags == (
        "150 human labels not used: of 0 questions in one training, fewer than 20",
    )
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
