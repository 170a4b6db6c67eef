"""What is wrong with answers stands beside each other, arm by arm, in every form of a report."""

from __future__ import annotations

import json
from pathlib import Path

from tests.compare.test_validity import arms, evaluated, items, root, run  # noqa: F401

from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.table_lines import comparison_lines
from recipes_lib.report.content import gather
from recipes_lib.report.documents import report_html, report_latex, report_markdown
from recipes_lib.report.numbers import numbers_json


def measured(root: Path) -> Measurements:  # noqa: F811
    """Arm a with two seeds, one of them compared with b too; b is of an earlier release."""

    def answered(name: str, **faults: object) -> object:
        told = {"name": name, "answers": {"n": 10, "empty": 1, "cut": 2, **faults}}
        return evaluated(root / name, answers=told, audit=None, items=items([1.0, 0.0] * 5))

    same = {"identical": {"count": 3, "share": 0.3}}
    seeds = [run(root, f"a{n}", *[answered(f"a{n}", loops=n, **same)] * n) for n in (1, 2)]
    return arms(a=tuple(seeds), b=run(root, "b", answered("b")))


def test_answers_are_counted_once_per_seed_and_what_is_not_known_is_not_zero(
    root: Path,  # noqa: F811
) -> None:
    a, b = compare_arms(measured(root)).answers
    assert (a.n, a.cut, a.loops, a.empty, a.same) == (20, 4, 3, 2, 6)
    assert a.share("cut") == 0.2 and a.characters == 5.5  # items are 1 to 10 characters long
    assert b.loops is None and b.share("loops") is None and b.same == 0
    assert a.cells == ("20", "4 (20.0%)", "3 (15.0%)", "2 (10.0%)", "6 (30.0%)", "6")
    assert b.cells[2] == "n/a"


def test_every_form_of_a_report_has_the_table_of_answers(root: Path) -> None:  # noqa: F811
    measurements = measured(root)
    comparison = compare_arms(measurements)
    lines = comparison_lines(comparison)
    head = next(number for number, line in enumerate(lines) if line.startswith("answers of"))
    assert lines[head].split()[2:6] == ["run", "answers", "cut", "in"]
    assert lines[head + 1].split()[:4] == ["alpaca_eval", "a", "20", "4"]
    content = gather("x", measurements, comparison)
    cells = " | ".join(comparison.answers[0].cells)
    assert f"| alpaca\\_eval | a | {cells} |" in report_markdown(content, [])
    assert '<td class="num" data-label="in a loop">3 (15.0%)</td>' in report_html(content, [])
    assert r"& 3 (15.0\%) &" in report_latex(content, [])
    numbers = [
        one for one in json.loads(numbers_json(content))["numbers"] if one["kind"] == "answers"
    ]
    assert {one["metric"]: one["value"] for one in numbers if one["arm"] == "a"} == {
        "cut": 0.2,
        "loops": 0.15,
        "empty": 0.1,
        "same": 0.3,
        "characters": 5.5,
    }
    assert "loops" not in {one["metric"] for one in numbers if one["arm"] == "b"}
