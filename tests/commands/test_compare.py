"""`recipes compare`: the table of any runs, and what cannot be compared."""

import json
import re

import pytest
from tests.analysis import made_up
from tests.analysis.test_foreign import annotations, lm_eval

from recipes_lib.cli import main
from recipes_lib.core.files import write_json


@pytest.fixture
def runs(tmp_path, monkeypatch):
    root = tmp_path / "runs"
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(root))
    monkeypatch.chdir(tmp_path)
    for name, rank, skill in (("r8", 8, 0.4), ("r32", 32, 0.8)):
        folder = made_up.write_run(root, name, rank=rank)
        made_up.write_judged(folder, 60, skill=skill)
        grades = [float(1 + n % 5) for n in range(80)]
        suite = {"name": "mt_bench", "suite": "mt_bench"}
        made_up.write_values(folder, grades, **suite, metric="grade", unit="grade")
        made_up.write_values(folder, [float(n % 3 == 0) for n in range(90)])
    made_up.write_judged(root / "r32", 60, against="r8", skill=0.7)
    return root


ALL = {"alpaca_eval/win_rate", "mt_bench/grade", "checks/pass_rate"}


def compare(capsys, *words, code=0) -> str:
    """Return what the verb printed on stdout, or on stderr if it printed nothing there."""
    assert main(["compare", *words]) == code
    out, err = capsys.readouterr()
    return out or err


def test_the_table_names_effects_and_verdicts_as_text_object_or_file(runs, tmp_path, capsys):
    shown = compare(capsys, "r8", "r32")
    for word in ("r32 against r8", "AlpacaEval win rate, head to head", "p (Holm)", "pass rate"):
        assert word in shown
    assert shown.rstrip().splitlines()[-1] == "next: recipes compare r8 r32 --html report.html"
    value = json.loads(compare(capsys, "r8", "r32", "--json"))
    assert {row["metric"] for row in value["rows"]} == ALL
    shown = compare(capsys, "r8")
    assert "value [95%]" in shown
    compare(capsys, "r8", "r32", "--html", "out.html")
    assert (tmp_path / "out.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "runs"]


def test_words_that_cannot_be_compared_are_one_line(runs, capsys):
    made_up.write_run(runs, "bare")
    for words, said in (
        (["bare"], "none of these has an evaluation with a result"),
        (["r8", "r8"], "'r8' is named twice"),
        (["r9"], "no run named"),
        (["gone.csv"], "gone.csv: there is no such file"),
        (["runs/"], "this folder holds no results that can be read"),
        (["r8", "r32", "--margin", "rouge=0.1"], "margin rouge: these have no such metric"),
        (["r8", "r32", "--margin", "mt_bench"], "--margin mt_bench: not METRIC=NUMBER"),
        (["r8", "r32", "--margin", "mt_bench=little"], "--margin mt_bench=little: not METRIC"),
        (["r8", "r32", "--gate", "=0.1"], "--gate =0.1: not METRIC=NUMBER"),
        (["r8", "r32", "--gate", "acc"], "--gate acc: not METRIC=NUMBER"),
        (["r8", "r32", "--gate", "rouge=0.1"], "margin rouge: these have no such metric"),
    ):
        assert said in compare(capsys, *words, code=2), words


def test_a_damaged_evaluation_is_refused_by_its_line(runs, capsys):
    file = runs / "r8" / "evals" / "mt_bench" / "items.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"\xff" + lines[1], *lines[2:]]))
    assert f"{file}:2: this line is damaged" in compare(capsys, "r8", "r32", code=4)
    file.write_bytes(b"".join(lines[:-3]))
    assert "the result is of 80 samples, 77 are stored" in compare(capsys, "r8", "r32", code=4)


def test_results_of_other_programs_are_compared_and_nothing_is_written(tmp_path, capsys):
    first = lm_eval(tmp_path / "a", [1.0] * 60 + [0.0] * 40)
    second = lm_eval(tmp_path / "b", [1.0] * 90 + [0.0] * 10)
    before = sorted(tmp_path.rglob("*"))
    shown = compare(capsys, str(first), str(second))
    assert "b scored better than a" in shown and "another seed may differ" in shown
    files = [str(annotations(tmp_path / f"{n}.json", n, [2.0, 1.0] * 40)) for n in ("x", "y")]
    assert json.loads(compare(capsys, *files, "--json"))["rows"][0]["n"] == 80
    assert len(sorted(tmp_path.rglob("*"))) == len(before) + 2


def test_a_margin_adds_its_verdict_to_the_rows_of_its_metric(runs, capsys):
    words = ("r8", "r32", "--margin", "mt_bench/grade=1")
    rows = json.loads(compare(capsys, *words, "--json"))["rows"]
    known = {row["label"]: (row["margin"], row["within"]) for row in rows}
    assert known["grade"] == (1.0, "equivalent")
    assert all(value == (None, "") for label, value in known.items() if label != "grade")
    assert "equivalent" in compare(capsys, *words)


def test_a_gate_passes_only_what_is_shown_and_fails_by_its_exit_code(runs, tmp_path, capsys):
    """A drop that was observed to be small is not enough: the interval has to be within it."""
    results = {}
    for name, right in (("old", 90), ("less", 88), ("worse", 10)):
        results[name] = str(lm_eval(tmp_path / name, [1.0] * right + [0.0] * (100 - right)))
    many = {}
    for name, right in (("many_old", 900), ("many_less", 896)):
        many[name] = str(lm_eval(tmp_path / name, [1.0] * right + [0.0] * (1000 - right)))
    gate = ("--gate", "acc=2 points")
    shown = compare(capsys, results["old"], results["less"], *gate, code=1)
    assert "not shown: " in shown.splitlines()[-2]
    assert shown.splitlines()[-1].startswith("next: recipes compare ")
    shown = compare(capsys, many["many_old"], many["many_less"], *gate)
    assert shown.splitlines()[-2] == "passed: no arm is shown to be worse than many_old"
    shown = compare(capsys, results["old"], results["worse"], *gate, code=1)
    assert "worse scored worse than old" in shown.splitlines()[-2]
    value = json.loads(compare(capsys, results["old"], results["worse"], *gate, "--json", code=1))
    assert value["exit_code"] == 1 and "scored worse" in value["gate"][0]


def test_a_gate_is_about_its_own_margins_and_takes_several_trainings_of_an_arm(runs, capsys):
    for name in ("r8-s1", "r8-s2", "r9-s2", "r9-s3"):
        folder = made_up.write_run(runs, name, seed=int(name[-1]) % 2)
        for eval, unit in (("known", 2), ("open", 5)):
            values = [float((n + int(name[-1])) % unit == 0) for n in range(100 * unit)]
            made_up.write_values(folder, values, name=eval)
    words = ("r8=r8-s*", "r9=r9-s*", "--gate", "known/pass_rate=15 points")
    shown = compare(capsys, *words, "--margin", "open/pass_rate=0.0001")
    assert shown.splitlines()[-2] == "passed: no arm is shown to be worse than r8"
    assert "not shown: " in compare(capsys, *words, "open/pass_rate=0.0001", code=1)


def test_markdown_is_the_same_report_for_the_comment_of_a_pull_request(tmp_path, capsys):
    first = lm_eval(tmp_path / "a", [1.0] * 60 + [0.0] * 40)
    second = lm_eval(tmp_path / "b", [1.0] * 90 + [0.0] * 10)
    lines = compare(capsys, str(first), str(second), "--markdown").splitlines()
    assert lines[0] == "# How do a and b compare?"
    assert lines[2].startswith("b scored better than a in") and r"p \< 0.001" in lines[2]
    head = next(number for number, line in enumerate(lines) if line.startswith("| metric |"))
    for line in lines[head : head + 3]:  # eight columns in every row, and both ends
        assert len(re.split(r"(?<!\\)\|", line)) == 10


def test_runs_of_a_study_without_verdicts_have_none_outside_of_it(runs, capsys):
    for name in ("r8", "r32"):
        file = runs / name / "run.json"
        write_json(file, json.loads(file.read_text()) | {"design_locks": {"s": "hash"}})
    assert "runs of the study s (r8 and r32), which has no report" in compare(capsys, "r8", "r32")
    for line in ("Exploratory: primary changed.", "Interim: training r64 still missing."):
        write_json(runs / "s" / "comparison.json", {"cannot_say": [line]})
        value = json.loads(compare(capsys, "r8", "r32", "--json"))
        assert {row["verdict"] for row in value["rows"]} == {"no verdict"}
        assert any(line.rstrip(".") in reason for reason in value["cannot_say"])
    for damaged in ({}, {"cannot_say": 5}, {"cannot_say": "Exploratory: primary changed."}):
        write_json(runs / "s" / "comparison.json", damaged)
        assert "(r8 and r32), which has no report that can be read" in compare(capsys, "r8", "r32")
    write_json(runs / "s" / "comparison.json", {"cannot_say": ["The judge failed its audit."]})
    assert "runs of the study" not in compare(capsys, "r8", "r32")


def test_a_pair_of_many_runs_is_told_as_one_of_their_pairs(runs, capsys):
    assert "pairs" not in compare(capsys, "r8", "r32")
    for name in ("r4", "r16"):
        made_up.write_judged(made_up.write_run(runs, name), 60)
    made_up.write_judged(made_up.write_run(runs, "base--tiny"), 60)
    said = "2 of 4 runs here that have alpaca_eval are compared: 1 of 6 pairs"
    assert said in compare(capsys, "r8", "r32")
    assert "pairs" not in compare(capsys, "r8", "r32", "r4", "r16")
    # trainings of one arm are no pair, whatever their evaluation is called
    for seed, name in enumerate(("r8-s1", "r8-s2", "r9-s1", "r9-s2", "r10")):
        made_up.write_judged(made_up.write_run(runs, name, seed=seed), 60, name="mine[1]*")
    said = compare(capsys, "r8=r8-s*", "r9=r9-s*")
    assert "4 of 5 runs here that have mine[1]* are compared: 4 of 10 pairs" in said
