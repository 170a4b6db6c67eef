"""What is wrong with answers stands beside each other, arm by arm, in every form of a report."""

from __future__ import annotations

import json
from pathlib import Path

from tests.compare.test_validity import (  # noqa: F401
    arms,
    evaluated,
    items,
    root,
    run,
    written,
)

from recipes_lib.compare.answers import compare_answers
from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.measurements import Measurements, RunMeasurements
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


def answered(root: Path, name: str, texts: list[str], cut: int) -> RunMeasurements:  # noqa: F811
    """A run that gave these answers, the first ones cut."""
    told = {"name": name, "fingerprint": name, "answers": {"n": len(texts), "empty": 0, "cut": cut}}
    rows = [
        {
            "key": f"{name}{n}",
            "question_id": str(n),
            "turn": 1,
            "answer": text,
            "finish_reason": "length" if n < cut else "stop",
            "model": name,
        }
        for n, text in enumerate(texts)
    ]
    written(root / name, "generations.jsonl", rows)
    values = [1.0, 0.0] * (len(texts) // 2)
    return run(root, name, evaluated(root / name, answers=told, audit=None, items=items(values)))


def test_shares_of_faults_are_compared_in_pairs_and_take_nothing_from_the_tests(
    root: Path,  # noqa: F811
) -> None:
    texts = [f"answer {n} of its own" for n in range(40)]
    loop = "I think so. I think so. I think so."
    measurements = arms(
        a=answered(root, "a", texts, 0),
        b=answered(root, "b", [*[f"{n}: {loop}" for n in range(9)], *texts[9:]], 12),
    )
    comparison = compare_arms(measurements)
    cut, loops = comparison.answer_differences
    assert (cut.first, cut.second, cut.fault, cut.questions) == ("b", "a", "cut", 40)
    assert cut.difference == 12 / 40 and 0.1 < cut.low < 0.3 < cut.high < 0.5
    assert (loops.fault, loops.difference) == ("loops", 9 / 40) and loops.low > 0.05
    assert comparison.tests == len(comparison.rows) == 1
    assert "b against a  cut        +30.0 points [" in "\n".join(comparison_lines(comparison))
    content = gather("x", measurements, comparison)
    assert f"| b against a | cut | {cut.text} | 40 |" in report_markdown(content, [])
    assert "described, not tested, because" in report_html(content, [])
    assert cut.text.split()[0] in report_latex(content, [])
    numbers = json.loads(numbers_json(content))["numbers"]
    (told,) = [
        one
        for one in numbers
        if one["kind"] == "answers" and one.get("other_arm") and one["metric"] == "cut"
    ]
    assert told["value"] == 0.3 and (told["low"], told["high"]) == (cut.low, cut.high)


def test_what_only_one_arms_files_tell_is_not_compared(root: Path) -> None:  # noqa: F811
    texts = [f"answer {n} of its own" for n in range(40)]
    b = answered(root, "b", texts, 12)
    (root / "b" / "evals/alpaca_eval/generations.jsonl").unlink()
    assert not compare_arms(arms(a=answered(root, "a", texts, 3), b=b)).answer_differences


def test_one_training_beside_several_differs_by_the_same_whichever_stands_first(
    root: Path,  # noqa: F811
) -> None:
    texts = [f"answer {n} of its own" for n in range(40)]
    seeds = tuple(answered(root, f"b{n}", texts, n) for n in (9, 12))
    measurements = arms(a=answered(root, "a", texts, 3), b=seeds)
    one, other = compare_answers(measurements, [("a", "b"), ("b", "a")])
    assert (one.first, one.second, one.difference) == ("a", "b", -7.5 / 40)
    assert (other.first, other.second, other.difference) == ("b", "a", 7.5 / 40)
    assert (one.low, one.high) == (-other.high, -other.low) and one.low < one.high
