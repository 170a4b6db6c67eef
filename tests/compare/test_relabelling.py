"""What becomes of copies of a study in which no arm is better, and of planted differences."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from tests.compare.test_claims import arm, of, rates

from recipes_lib.compare import relabelling
from recipes_lib.compare.claims import Comparison, compare_arms
from recipes_lib.compare.findings import Finding
from recipes_lib.compare.relabelling import Relabelling, relabelled
from recipes_lib.compare.row import PairedItems
from recipes_lib.report.content import gather
from recipes_lib.report.documents import write_report
from recipes_lib.statistics import unresolved
from recipes_lib.statistics.unresolved import compare, compare_ps


def answers(share, n=120, seed=0):
    """Right and wrong answers to the same questions."""
    difficulty = np.random.default_rng(7).random(n)
    noise = np.random.default_rng(seed).normal(0, 0.3, n)
    return [float(value) for value in difficulty + noise < share]


def measured(*shares, n=120):
    return of(
        *(
            arm(f"r{2 ** (place + 2)}", [rates(answers(share, n, seed=place))])
            for place, share in enumerate(shares)
        )
    )


def own(measurements, findings=()) -> Comparison:
    return compare_arms(measurements, findings, relabel=relabelled)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.2, 0.9)])
def test_few_copies_hold_a_claim_whether_the_study_does_or_not(shares):
    comparison = own(measured(*shares))
    one = comparison.relabelling
    assert (comparison.rows[0].verdict == "better") == (shares[1] > shares[0])
    # An exact test of one row: near 5%, less for the few values that it can have.
    assert 0.01 <= one.claims / one.copies <= 0.0638 and not one.too_often
    assert one.planted.copies == one.copies == 1000
    assert 0.75 <= one.planted.found / 1000 <= 0.9


def test_a_table_of_many_rows_holds_few_false_claims_too():
    one = own(measured(0.5, 0.5, 0.8)).relabelling
    assert 0.005 <= one.claims / one.copies <= 0.0638
    assert one.planted.found / 1000 >= 0.75


def test_a_test_that_does_not_hold_stops_every_claim(monkeypatch):
    largest, tested = unresolved._largest, PairedItems.tested

    def too_small(effects, ps):
        return largest(effects, ps) / 4

    def narrow(self):
        found = tested(self)
        return dataclasses.replace(found, low=found.effect, high=found.effect)

    assert own(measured(0.2, 0.9)).rows[0].claimed
    monkeypatch.setattr(unresolved, "_largest", too_small)
    monkeypatch.setattr(PairedItems, "tested", narrow)
    monkeypatch.setattr(relabelling, "MORE_COPIES", 2000)
    comparison = own(measured(0.2, 0.9))
    (row,) = comparison.rows
    assert comparison.relabelling.too_often and comparison.relabelling.copies == 2000
    assert [one.code for one in comparison.findings] == ["false-claims"]
    assert not row.claimed and row.sentence.startswith("No claim about r8 and r4")
    assert " is better than " not in " ".join(comparison.answer)


def test_chance_alone_is_told_from_a_test_that_does_not_hold_by_more_copies():
    few = Relabelling(1_000, 65, None, False, ())
    many = Relabelling(10_000, 520, None, False, ())
    assert few.too_often and not many.too_often
    assert Relabelling(10_000, 560, None, False, ()).too_often


def seeds_apart(shift, n=200):
    """Two arms of two trainings each, which differ among themselves more than the arms do."""
    rng = np.random.default_rng(3)
    common = rng.random(n)

    def training(by):
        return [rates(list(common + rng.normal(0, 0.2, n) + by), unit="number")]

    return of(
        arm("r8", [training(0.3), training(-0.3)]),
        arm("r32", [training(-0.25 + shift), training(0.35 + shift)]),
    )


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_two_seeds_that_differ_and_a_true_effect_of_two_seeds_stop_nothing(shift):
    # Whole trainings exchanged between arms would give back the study itself in half of the copies.
    comparison = own(seeds_apart(shift))
    one = comparison.relabelling
    assert one.moved and "each training was moved as far as seeds differ" in one.sentence
    assert not one.too_often and not comparison.findings


def test_trainings_in_copies_differ_as_far_as_they_do_in_the_study():
    row = compare_arms(seeds_apart(0.0)).rows[0]
    copies = relabelling._Copies([row], 1)
    drawn = copies.draw(0, 400)[0]
    means = (drawn.first - drawn.second).mean(axis=-1)
    seen = (row.paired.first - row.paired.second).mean(axis=1)
    assert np.std(means) == pytest.approx(np.std(seen, ddof=1), rel=0.12)
    assert abs(np.mean(means)) < 0.06


def test_a_copy_keeps_what_the_values_of_a_question_are():
    values = [None if place < 5 else value for place, value in enumerate(answers(0.5))]
    against = [0.5 if place % 3 == 0 else value for place, value in enumerate(answers(0.6, seed=2))]
    study = of(
        arm("r8", [[rates(values), rates(against, "win", "r32")]]),
        arm("r32", [rates(values[::-1])]),
    )
    rows = compare_arms(study).rows
    assert {row.head_to_head for row in rows} == {True, False}
    exchanged = []
    for row, one in zip(rows, relabelling._Copies(rows, 1).draw(0, 1), strict=True):
        now, seen = (np.squeeze(each.first - each.second) for each in (one, row.paired))
        assert np.array_equal(np.abs(now), np.abs(seen), equal_nan=True)
        assert set(one.first[~np.isnan(one.first)]) <= {0.0, 0.5, 1.0}
        exchanged.append(now == -seen)
        assert 20 < (exchanged[-1] & (seen != 0)).sum() < 100
    # The same questions are exchanged in both rows.
    differ = (rows[0].paired.first[0] != 0.5) & (np.squeeze(now) != 0) & ~np.isnan(now)
    assert np.array_equal(exchanged[0][differ], exchanged[1][differ])


def test_what_no_sentence_may_claim_is_not_measured():
    error = Finding("confound-data", "error", "Training data differs", arms=("r4", "r8"))
    assert own(measured(0.2, 0.9), [dataclasses.replace(error, code="x")]).relabelling is None
    assert own(measured(0.2, 0.9)).relabelling is not None


def test_a_row_without_items_is_named_and_counts_in_the_correction():
    rows = compare_arms(measured(0.5, 0.5, 0.5)).rows
    rows = [*rows[:2], dataclasses.replace(rows[2], paired=None, label="speed")]
    one = relabelled(rows, lambda row: row)
    assert one is None  # nothing of these rows may be claimed
    claimed = relabelled(rows, lambda row: dataclasses.replace(row, verdict="better"))
    assert claimed.left_out == ("speed",) and "Left out: speed." in claimed.sentence


def test_the_same_data_have_the_same_copies_and_every_form_has_the_line(tmp_path):
    study = measured(0.5, 0.5, n=30)
    comparison = own(study)
    line = comparison.relabelling.sentence
    assert own(study).relabelling == comparison.relabelling
    saved = json.loads(json.dumps(dataclasses.asdict(comparison.relabelling)))
    assert Relabelling.from_dict(saved) == comparison.relabelling
    write_report(tmp_path, gather("study", study, comparison))
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["relabelling"]["sentence"] == line
    shares = [one for one in numbers["numbers"] if one["kind"] == "relabelled"]
    assert shares[0]["value"] == comparison.relabelling.claims / 1000 and shares[0]["n"] == 1000
    for name in ("report.md", "report.html", "report.tex"):
        assert "data with arms relabelled" in (tmp_path / name).read_text(), name


KINDS = {
    "right or wrong": lambda rng, shape: rng.integers(0, 2, shape) * 1.0,
    "grades": lambda rng, shape: rng.integers(1, 6, shape) * 1.0,
    "scores": lambda rng, shape: rng.normal(size=shape),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seeds", "turns", "missing"), [(1, 1, 0), (1, 2, 0.1), (3, 1, 0.1)])
def test_many_studies_at_once_get_the_p_that_each_gets_alone(kind, seeds, turns, missing):
    rng = np.random.default_rng(5)
    first, second = (KINDS[kind](rng, (6, seeds, 40)) for _ in range(2))
    first[:, :, :8][rng.random((6, seeds, 8)) < missing] = np.nan
    questions = np.repeat(np.arange(40 // turns), turns)
    scale = (1.0, 5.0) if kind == "grades" else (0.0, 1.0)
    effects, ps = compare_ps(first, second, questions, scale=scale)
    for a, b, effect, p in zip(first, second, effects, ps, strict=True):
        alone = compare(a, b, questions, scale=scale)
        assert alone.effect == pytest.approx(effect) and alone.p == pytest.approx(p, rel=1e-9)
