"""`recipes compare`: the table for any runs, `base` as a word, one file of HTML, and what cannot be
compared.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.analysis import made_up
from tests.analysis.test_foreign import annotations, lm_eval

from recipes_lib.cli import main


@pytest.fixture
def runs(tmp_path, monkeypatch):
    root = tmp_path / "runs"
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(root))
    monkeypatch.chdir(tmp_path)
    for name, rank, skill in (("r8", 8, 0.4), ("r32", 32, 0.8)):
        folder = made_up.write_run(root, name, rank=rank)
        made_up.write_judged(folder, 60, skill=skill)
        grades = [float(1 + n % 5) for n in range(80)]
        made_up.write_values(
            folder, grades, name="mt_bench", suite="mt_bench", metric="grade", unit="grade"
        )
        made_up.write_values(folder, [float(n % 3 == 0) for n in range(90)])
    made_up.write_judged(root / "r32", 60, against="r8", skill=0.7)
    return root


def make_base(root: Path, **changes) -> None:
    """The record of a base model as an evaluation leaves it."""
    base = made_up.write_run(root, "base--model--12345678")
    model = {"name_or_path": "some/model", "revision": None, "dtype": "bfloat16"} | changes
    state = {
        "format_version": 1,
        "name": base.name,
        "state": "finished",
        "updated": "x",
        "kind": "base",
        "stand_in": {"model": model, "quantization": None},
        "prompt_format_hash": "p" * 64,
    }
    made_up.write_json(base / "run.json", state)
    (base / "metrics.jsonl").unlink()
    made_up.write_values(base, [float(n % 4 == 0) for n in range(90)])


def test_the_table_names_arms_effect_p_n_and_verdict(runs, capsys):
    assert main(["compare", "r8", "r32"]) == 0
    shown = capsys.readouterr().out
    assert (
        "r32 against r8" in shown
        and "AlpacaEval win rate, head to head" in shown
        and "p (Holm)" in shown
    )
    assert "pass rate" in shown and "grade" in shown
    assert shown.rstrip().splitlines()[-1] == "next: recipes compare r8 r32 --html report.html"


def test_json_is_one_object(runs, capsys):
    assert main(["compare", "r8", "r32", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert {row["metric"] for row in value["rows"]} == {
        "alpaca_eval/win_rate",
        "mt_bench/grade",
        "checks/pass_rate",
    }
    assert "is its effect" not in json.dumps(value)


def test_a_run_without_an_evaluation_is_said_to_have_none(runs, capsys):
    made_up.write_run(runs, "bare")
    assert main(["compare", "bare"]) == 2
    said = capsys.readouterr().err
    assert "none of these has an evaluation with a result" in said and "recipes eval" in said


@pytest.mark.parametrize(
    "damage",
    [b'{"step": 90, "lo', b"\0" * 512, b'{"step": 9\xff0}\n'],
    ids=["torn", "zeros", "no text"],
)
def test_a_damaged_end_of_the_metrics_costs_the_comparison_a_warning(runs, capsys, damage):
    with (runs / "r8" / "metrics.jsonl").open("ab") as stream:
        stream.write(damage)
    assert main(["compare", "r8", "r32", "--json"]) == 0
    said = capsys.readouterr()
    assert {row["metric"] for row in json.loads(said.out)["rows"]} == {
        "alpaca_eval/win_rate",
        "mt_bench/grade",
        "checks/pass_rate",
    }
    assert said.err.count("\n") == 1 and "metrics.jsonl:42: this line is damaged" in said.err


def test_a_damaged_evaluation_is_left_out_and_named_and_the_others_are_compared(runs, capsys):
    file = runs / "r8" / "evals" / "mt_bench" / "items.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"\xff" + lines[1], *lines[2:]]))
    assert main(["compare", "r8", "r32", "--json"]) == 0
    said = capsys.readouterr()
    assert {row["metric"] for row in json.loads(said.out)["rows"]} == {
        "alpaca_eval/win_rate",
        "checks/pass_rate",
    }
    assert f"an evaluation is damaged and left out: {file}:2: this line is damaged" in said.err
    for other in ("alpaca_eval", "checks"):
        (runs / "r8" / "evals" / other / "result.json").write_text("")
    assert main(["compare", "r8"]) == 4


def test_html_is_one_file(runs, tmp_path, capsys):
    assert main(["compare", "r8", "r32", "--html", "out.html"]) == 0
    assert (tmp_path / "out.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "runs"]
    assert main(["compare", "r8", "r32", "--html", "runs"]) == 2


def test_base_is_the_base_of_the_others(runs, capsys):
    assert main(["compare", "r8", "base"]) == 2
    assert "never evaluated" in capsys.readouterr().err
    make_base(runs)
    assert main(["compare", "r8", "base"]) == 0
    assert "r8 against base" in capsys.readouterr().out


def test_another_models_base_is_not_taken(runs, capsys):
    make_base(runs, name_or_path="other/model")
    assert main(["compare", "r8", "base"]) == 2


def test_one_run_shows_its_scores(runs, capsys):
    assert main(["compare", "r8"]) == 0
    assert "value [95%]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [(["r8", "r8"], "named twice"), (["r9"], "no run named"), (["base"], "base of what")],
)
def test_words_that_cannot_be_compared(runs, capsys, words, said):
    assert main(["compare", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_result_that_does_not_agree_with_its_samples_is_refused(runs, capsys):
    samples = runs / "r8" / "evals" / "alpaca_eval" / "items.jsonl"
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:-3]))
    assert main(["compare", "r8", "r32"]) == 4
    assert "the result is of 60 samples, 57 are stored" in capsys.readouterr().err


def test_results_of_other_programs_are_compared_and_nothing_is_written(tmp_path, capsys):
    first = lm_eval(tmp_path / "a", [1.0] * 60 + [0.0] * 40)
    second = lm_eval(tmp_path / "b", [1.0] * 90 + [0.0] * 10)
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", str(first), str(second)]) == 0
    shown = capsys.readouterr().out
    assert "b is better than a" in shown or "a is worse than b" in shown
    files = [str(annotations(tmp_path / f"{n}.json", n, [2.0, 1.0] * 40)) for n in ("x", "y")]
    assert main(["compare", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["n"] == 80
    assert len(sorted(tmp_path.rglob("*"))) == len(before) + 2


def test_a_margin_adds_its_verdict_to_the_rows_of_its_metric(runs, capsys):
    assert main(["compare", "r8", "r32", "--margin", "mt_bench/grade=1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    known = {row["label"]: (row["margin"], row["within"]) for row in rows}
    assert known["grade"] == (1.0, "equivalent")
    assert all(value == (None, "") for label, value in known.items() if label != "grade")
    assert main(["compare", "r8", "r32", "--margin", "mt_bench/grade=1"]) == 0
    assert "equivalent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rouge=0.1", "--margin rouge: these have no such metric in common"),
        ("mt_bench", "--margin mt_bench: no margin"),
        ("mt_bench=little", "--margin mt_bench=little: no margin"),
    ],
)
def test_a_margin_that_is_none_is_one_line(runs, capsys, word, said):
    assert main(["compare", "r8", "r32", "--margin", word]) == 2
    assert capsys.readouterr().err.startswith(said)
