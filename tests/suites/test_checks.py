"""Answers that rules decide: each rule at its edges, rows that cannot be used, and a whole
evaluation of a tiny model read back as a log.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.generation.conftest import make_run, runs_folder  # noqa: F401

from recipes_lib.cli import main
from recipes_lib.core.errors import DataError
from recipes_lib.eval_files import read_evals
from recipes_lib.eval_log import Sample
from recipes_lib.eval_recipe import load_eval
from recipes_lib.suites.checks import _rate
from recipes_lib.suites.questions import load_questions
from recipes_lib.suites.rules import RULES, Rule

PROJECT = Path(__file__).resolve().parents[2]
CITY = {"type": "object", "required": ["name"]}


@pytest.mark.parametrize(
    ("name", "expected", "passes", "fails"),
    [
        ("exact", "Paris", ["Paris", " Paris\n"], ["paris", "Paris.", ""]),
        ("exact", ["yes", "Yes"], ["yes", "Yes"], ["YES"]),
        ("contains", "Paris", ["It is Paris."], ["It is paris.", ""]),
        ("contains", ["a", "b"], ["b a"], ["a"]),
        ("excludes", ["sorry", "cannot"], ["Done."], ["I cannot.", "so sorry"]),
        ("regex", r"^In short: .+\nMore: .+$", ["In short: a\nMore: b"], ["In short: a"]),
        ("number", 42, ["42", "6 x 7 = 42.", "of 41, 42"], ["42 or 41", "none", "420"]),
        ("number", -1234.5, ["-1,234.5"], ["1,234.5", "-1.2345"]),
        (
            "choice",
            "B",
            ["B", "b) two", "(B)", "The answer is B.", "B\nbecause"],
            ["A", "Both", ""],
        ),
        ("choice", "A", ["A."], ["A dog is one", "A or B: the answer is B"]),
        ("json", CITY, ['{"name": 1}', 'Here:\n```json\n{"name": 1}\n```'], ["{}", "name", "[1"]),
        ("max_words", 2, ["", "one two"], ["one two three"]),
        ("min_words", 2, ["one two"], ["one", ""]),
    ],
)
def test_a_rule_passes_and_fails(name, expected, passes, fails) -> None:
    check = Rule(name, expected)
    assert RULES[name].fits(expected)
    assert [text for text in passes if not check.passes(text)] == []
    assert [text for text in fails if check.passes(text)] == []


def test_case_and_tolerance_are_options_of_a_check() -> None:
    assert Rule("exact", "Paris", ignore_case=True).passes("PARIS")
    assert Rule("regex", "^paris$", ignore_case=True).passes("Paris")
    assert Rule("number", 3.14, tolerance=0.01).passes("about 3.145")
    assert not Rule("number", 3.14, tolerance=0.01).passes("about 3.16")


@pytest.mark.parametrize(
    ("name", "expected", "text", "result"),
    [
        ("contains", "Paris", "Paris is", True),  # nothing can take it away
        ("contains", "Paris", "Par", None),
        ("excludes", "sorry", "sorry, ", False),
        ("excludes", "sorry", "sor", None),
        ("max_words", 2, "one two three", False),
        ("max_words", 2, "one two", None),
        ("min_words", 2, "one two", True),
        ("number", 4, "4", None),  # 42, perhaps
        ("exact", "a", "b", None),
    ],
)
def test_an_answer_that_was_cut_is_decided_only_where_no_text_can_change_it(
    name, expected, text, result
) -> None:
    assert Rule(name, expected).passes(text, cut=True) is result


def test_unresolved_answers_widen_the_interval_to_both_sides() -> None:
    values = [1.0] * 6 + [0.0] * 2 + [None] * 2
    rate = _rate(
        [
            Sample(str(number), value=one, outcome="unresolved" if one is None else "graded")
            for number, one in enumerate(values)
        ]
    )
    assert rate["estimate"] == 0.75 and rate["n"] == 10 and rate["unresolved"] == 2
    assert rate["low"] == pytest.approx(0.3127, abs=1e-4)  # Wilson, 6 of 10
    assert rate["high"] == pytest.approx(0.9433, abs=1e-4)  # Wilson, 8 of 10
    assert _rate([Sample("q")])["estimate"] is None


def rows_in(folder: Path, *rows: object) -> Path:
    """An eval recipe over these rows, which may be text."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    recipe = folder / "mine.yaml"
    recipe.write_text(
        "suite: {name: checks}\ndata: {questions: rows.jsonl}\ngeneration: {max_new_tokens: 4}\n"
    )
    return recipe


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"check": "exact", "expected": "a"}, "a row needs a text under 'prompt'"),
        ({"prompt": "?"}, "a row needs a 'check', or a list of 'checks'"),
        ({"prompt": "?", "check": "exakt", "expected": "a"}, "unknown check 'exakt'"),
        ({"prompt": "?", "check": "number", "expected": "4"}, "expects a number, not '4'"),
        ({"prompt": "?", "check": "number", "expected": True}, "expects a number, not True"),
        ({"prompt": "?", "check": "regex", "expected": "("}, "expects a regular expression"),
        ({"prompt": "?", "check": "json", "expected": {"type": 7}}, "expects a JSON Schema"),
        ({"prompt": "?", "check": "contains", "expected": []}, "a list of which all must occur"),
        ({"prompt": "?", "checks": []}, "'checks' must be a list of checks"),
        ({"prompt": "?", "checks": ["exact"]}, "'checks' must be a list of checks"),
        (
            {"prompt": "?", "checks": [{"check": "exact", "expected": "a", "case": 1}]},
            "a check has no key 'case'",
        ),
        (
            {"prompt": "?", "check": "number", "expected": 1, "tolerance": -1},
            "'tolerance' must be 0 or more, not -1",
        ),
    ],
)
def test_a_row_that_cannot_be_checked_is_named_with_its_line(tmp_path: Path, row, said) -> None:
    good = {"prompt": "?", "check": "exact", "expected": "a"}
    recipe = load_eval(rows_in(tmp_path, good, row))
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        load_questions(recipe)
    assert caught.value.line == 2 and str(caught.value.file).endswith("rows.jsonl")


def test_the_check_of_an_eval_names_every_bad_row_of_its_file(tmp_path: Path, capsys) -> None:
    rows = [{"prompt": "?", "check": "exact", "expected": "a"}, {"check": "exact"}, {"prompt": "?"}]
    recipe = rows_in(tmp_path, *rows)
    assert main(["check", str(recipe)]) == 4
    said = capsys.readouterr().err
    assert "rows.jsonl:2: a row needs a text under 'prompt'" in said
    assert "rows.jsonl:3: a row needs a 'check'" in said
    rows_in(tmp_path, rows[0])
    assert main(["check", str(recipe)]) == 0


def test_a_judge_is_refused_where_rules_decide(tmp_path: Path, capsys) -> None:
    recipe = rows_in(tmp_path, {"prompt": "?", "check": "exact", "expected": "a"})
    recipe.write_text(recipe.read_text() + "judge: {model: any}\n")
    assert main(["check", str(recipe)]) == 2
    assert "mine.yaml:4: checks asks no judge" in capsys.readouterr().err


def test_an_opponent_is_refused_where_no_suite_compares(tmp_path: Path, capsys) -> None:
    recipe = rows_in(tmp_path, {"prompt": "?", "check": "exact", "expected": "a"})
    assert main(["eval", str(recipe), "one", "--against", "base"]) == 2
    assert "--against has no meaning for checks" in capsys.readouterr().err


def test_an_evaluation_by_rules_is_a_log_that_comparisons_read(
    make_run,  # noqa: F811
    runs_folder,  # noqa: F811
    tmp_path: Path,
    capsys,
) -> None:
    make_run("one", seed=1)
    make_run("two", seed=2)
    recipe = rows_in(
        tmp_path,
        {"prompt": "Say a", "check": "max_words", "expected": 0, "category": "short"},
        {"prompt": "Say b", "check": "min_words", "expected": 0, "category": "long"},
        {"prompt": "Say c", "check": "exact", "expected": "c", "category": "long"},
        {
            "prompt": "Say d",
            "checks": [{"check": "max_words", "expected": words} for words in (0, 99)],
            "category": "short",
        },
    )
    assert main(["eval", str(recipe), "one", "two"]) == 0
    told = capsys.readouterr().out
    assert "answers that pass [95%]" in told and "short" in told
    (log,), unfinished = read_evals(runs_folder / "one")
    (measure,) = log.measures
    assert not unfinished and measure.key == (log.eval, "", "pass_rate")
    assert [(one.category, one.value) for one in measure.samples[:2]] == [
        ("short", 0.0),
        ("long", 1.0),
    ]
    assert measure.samples[3].value == 0.0  # both of two checks of one name count
    assert measure.samples[2].value in (None, 0.0)  # four tokens: cut, or another text than c
    assert main(["compare", "one", "two"]) == 0
    assert "answers that pass" in capsys.readouterr().out


def test_several_answers_to_a_row_are_checked_each_and_the_row_stays_one_question(
    make_run,  # noqa: F811
    runs_folder,  # noqa: F811
    tmp_path: Path,
    capsys,
) -> None:
    make_run("one", seed=1)
    make_run("two", seed=2)
    rows = [{"prompt": f"Say {n}", "check": "min_words", "expected": 3} for n in range(7)]
    recipe = str(rows_in(tmp_path, *rows))
    words = ["generation.temperature=1", "generation.max_new_tokens=16", "--json"]
    assert main(["eval", recipe, "one", "two", *words, "generation.samples=3"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["pass_rate"]["n"] for result in results] == [21, 21]
    assert main(["compare", "one", "two"]) == 0
    assert "21 items of 7 questions" in capsys.readouterr().out
    assert main(["eval", recipe, "two", *words]) == 0
    assert main(["compare", "one", "two"]) == 0
    told = capsys.readouterr().out
    assert "1 answer per question of 1 and 3" in told
    assert "were not asked in the same way: generation.samples" in told


def test_the_style_of_the_quickstarts_rows_is_what_its_eval_checks() -> None:
    questions = load_questions(load_eval(PROJECT / "evals/quickstart/house_style.yaml")).questions
    (check,) = {question.checks for question in questions}.pop()
    shipped = PROJECT / "recipes/quickstart/data/instructions.jsonl"
    rows = [json.loads(line) for line in shipped.read_text(encoding="utf-8").splitlines()]
    assert len(questions) == 20 and len(rows) == 328
    assert all(check.passes(row["response"]) for row in rows)
    assert not check.passes("In short: yes.")
    asked = {question.turns[0].partition("\n\n")[0] for question in questions}
    assert not asked & {row["instruction"] for row in rows}
