"""Groups are described: the values of one question are one cluster, however many seeds or turns
gave them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes_lib.compare.measurements import ArmMeasurements, Measurements, RunMeasurements
from recipes_lib.eval_log import EvalLog, Measure, Sample
from recipes_lib.report.breakdowns import breakdowns
from recipes_lib.statistics.intervals import wilson


def measured(runs: int) -> Measurements:
    """One arm whose runs all gave the same right and wrong answers to 40 questions in two
    categories.
    """
    items = tuple(Sample(f"q{n}", 1, "ab"[n % 2], float(n % 3 == 0), "x") for n in range(40))
    made = []
    for number in range(runs):
        file = Path("runs") / f"r{number}" / "evals" / "ev" / "result.json"
        measure = Measure("ev", "alpaca_eval", "win_rate", "win rate", items, file, "reference")
        made.append(
            RunMeasurements(
                f"r{number}",
                file.parents[2],
                {},
                {},
                {},
                {},
                (),
                (EvalLog(eval="ev", suite="x", file=file, measures=(measure,)),),
            )
        )
    return Measurements({"r": ArmMeasurements("r", tuple(made))})


def test_one_value_per_question_has_the_wilson_interval():
    (found,) = breakdowns(measured(1))
    assert [cell.group for cell in found.cells] == ["a", "b"]
    right = sum(n % 3 == 0 for n in range(0, 40, 2))
    assert (found.cells[0].low, found.cells[0].high) == (
        wilson(right, 20).low,
        wilson(right, 20).high,
    )


def test_seeds_that_answer_alike_do_not_narrow_the_interval():
    once, five = (breakdowns(measured(runs))[0].cells[0] for runs in (1, 5))
    assert five.n == 5 * once.n and five.value == pytest.approx(once.value)
    assert five.high - five.low > 0.8 * (once.high - once.low)
