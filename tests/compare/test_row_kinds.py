"""A further kind of rows is a function that yields them and one entry of the registry: its effect,
its words and its sentences go everywhere that rows go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from recipes_lib.compare import table
from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.measurements import ArmMeasurements, Measurements, RunMeasurements
from recipes_lib.compare.row import TableRow
from recipes_lib.compare.table_lines import comparison_lines
from recipes_lib.report.content import gather
from recipes_lib.report.documents import report_html, report_latex, report_markdown
from recipes_lib.report.numbers import number_rows
from recipes_lib.statistics import paired

SECONDS = {"slow": 300.0, "fast": 100.0}


@dataclass(frozen=True, kw_only=True)
class SpeedRow(TableRow):
    """A comparison of seconds, whose effect is a ratio."""

    sentences: ClassVar[Mapping[str, str]] = {
        "difference": "{first} is {verdict} in {where} than {second}: {numbers}."
    }

    @property
    def effect(self) -> str:
        return f"{self.first_value / self.second_value:.1f} x"

    @property
    def words(self) -> str:
        return "ratio"


def speed_rows(measurements: Measurements, first: str, second: str) -> Iterator[TableRow]:
    values = [float(measurements.arms[name].runs[0].state["seconds"]) for name in (first, second)]
    difference = values[0] - values[1]
    yield SpeedRow(
        metric="seconds",
        label="training time",
        first=first,
        second=second,
        unit="number",
        higher_is_better=False,
        first_value=values[0],
        second_value=values[1],
        tested=paired.Tested(
            effect=difference,
            low=difference - 9,
            high=difference + 9,
            p=0.001,
            n=40,
            questions=40,
            seeds=3,
            test="toy",
            interval_method="toy",
        ),
    )


@pytest.fixture
def measurements() -> Measurements:
    return Measurements(
        {
            name: ArmMeasurements(
                name,
                (
                    RunMeasurements(
                        name=name,
                        folder=Path(name),
                        state={"seconds": seconds},
                        resolved={},
                        environment={},
                        splits={},
                        curves=(),
                        evals=(),
                    ),
                ),
            )
            for name, seconds in SECONDS.items()
        }
    )


def test_a_further_kind_of_rows_reaches_sentences_terminal_report_and_numbers(
    monkeypatch: pytest.MonkeyPatch, measurements: Measurements
) -> None:
    assert compare_arms(measurements).rows == ()
    monkeypatch.setattr(table, "ROW_KINDS", (*table.ROW_KINDS, speed_rows))
    comparison = compare_arms(measurements)
    (row,) = comparison.rows
    said = "fast is better in training time than slow: ratio 0.3 x [−209, −191], p = 0.001 (Holm),"
    assert row.sentence == f"{said} n = 40 questions, 3 seeds."
    assert any("0.3 x [−209, −191]" in line for line in comparison_lines(comparison))
    content = gather("study", measurements, comparison)
    for form in (report_html, report_markdown, report_latex):
        assert "0.3 x" in form(content, ())
    (number,) = number_rows(content)
    assert (number.kind, number.value, number.verdict) == ("comparison", -200.0, "better")
