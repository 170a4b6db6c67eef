"""Several answers to each question: the question stays the unit of every test and interval."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recipes_lib.compare.row import TableRow
from recipes_lib.compare.table import build_rows
from recipes_lib.eval_log import AnswerFaults, Sample
from recipes_lib.judging.outcomes import summarise
from recipes_lib.statistics.intervals import share_interval
from recipes_lib.statistics.paired import sign_flip_ps

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import study_power


def compared(first: np.ndarray, second: np.ndarray) -> TableRow:
    """The row of two arms with one training each; values by draw and question."""
    runs = {}
    for name, values in (("b", second), ("a", first)):  # the later arm stands first in a row
        samples = [
            Sample(f"q{question}", value=None if np.isnan(value) else float(value), draw=draw)
            for draw, drawn in enumerate(values, 1)
            for question, value in enumerate(drawn)
        ]
        one = replace(study_power.measure("pass_rate", None, np.empty(0), name), samples=samples)
        runs[name] = study_power._arm(name, [[one]])
    (row,) = build_rows(study_power.Measurements(runs))
    return row


def test_the_answers_to_a_question_are_averaged_before_the_test() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.random((3, 30)) < rate for rate in (0.7, 0.4))
    row = compared(first, second)
    assert row.tested is not None and row.tested.spread is not None
    assert (row.tested.n, row.tested.questions) == (90, 30)
    sums = 3 * (first.mean(axis=0) - second.mean(axis=0))
    assert row.tested.p == sign_flip_ps(sums[None])[0]
    assert row.tested.spread.draws == 3
    # independent answers: all of a question's variance is new in each of them
    assert row.tested.spread.drawn_share == pytest.approx(1.0, abs=0.35)


def test_an_answer_that_is_repeated_is_no_new_evidence() -> None:
    rng = np.random.default_rng(1)
    first, second = (rng.random((1, 40)) < rate for rate in (0.7, 0.4))
    once, often = (compared(np.repeat(first, k, 0), np.repeat(second, k, 0)) for k in (1, 5))
    assert once.tested is not None and often.tested is not None
    assert often.tested.effect == pytest.approx(once.tested.effect)
    assert often.tested.p == pytest.approx(once.tested.p)
    assert often.tested.spread is not None and often.tested.spread.drawn == pytest.approx(0.0)
    wide = once.tested.high - once.tested.low
    assert often.tested.high - often.tested.low == pytest.approx(wide, rel=0.1)


def test_arms_with_different_numbers_of_answers_are_compared_by_those_that_both_have() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.random((4, 20)).round(), rng.random((2, 20)).round()
    row, both = compared(first, second), compared(first[:2], second)
    assert row.tested is not None and row.tested.unresolved == 0
    assert row.flags == ("2 answers per question of 4 and 2",)
    assert replace(row, flags=(), measures=()) == replace(both, measures=())


def test_one_open_answer_is_open_alone() -> None:
    values = np.ones((4, 20))
    values[0, 0] = np.nan
    row = compared(values, np.zeros((4, 20)))
    assert row.tested is not None and row.tested.unresolved == 1
    assert row.tested.lowest == pytest.approx(1 - 1 / 80)  # that one failed


def test_repeated_answers_do_not_make_a_rate_narrower() -> None:
    hits = [True] * 12 + [False] * 8
    alone = share_interval(hits)
    often = share_interval(hits * 5, list(range(20)) * 5)
    assert often.high - often.low >= alone.high - alone.low and often.n == 100
    assert share_interval([True] * 100, list(range(20)) * 5).low == share_interval([True] * 20).low
    samples = [
        Sample(f"q{n % 20}", value=float(hit), outcome="win" if hit else "loss", draw=n // 20 + 1)
        for n, hit in enumerate(hits * 5)
    ]
    clustered = summarise(samples, lambda one: one.id)
    assert clustered.win_rate == often
    assert clustered.win_bounds.low < summarise(samples).win_bounds.low


def test_answers_that_are_alike_to_one_question_are_not_one_answer_for_many() -> None:
    texts, questions = ["4", "4", "4", "4", "7", "8"], ["a", "a", "a", "a", "b", "c"]
    assert AnswerFaults.of(texts, 0, 0.1, questions).identical.count == 0
    assert AnswerFaults.of(texts, 0, 0.1).identical.flagged
    assert AnswerFaults.of(texts, 0, 0.1, ["a", "a", "b", "c", "d", "e"]).identical.count == 4
