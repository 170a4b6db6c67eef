"""`recipes compare`: the table of any runs, `base` as a word, and what cannot be compared."""

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
        suite = {"name": "mt_bench", "suite": "mt_bench"}
        made_up.write_values(folder, grades, **suite, metric="grade", unit="grade")
        made_up.write_values(folder, [float(n % 3 == 0) for n in range(90)])
    made_up.write_judged(root / "r32", 60, against="r8", skill=0.7)
    return root


def make_base(root: Path, **changes) -> None:
    """The record of a base model as an evaluation leaves it."""
    base = made_up.write_run(root, "base--model--12345678")
    model = {"name_or_path": "some/model", "revision": None, "dtype": "bfloat16"} | changes
    stand_in = {"model": model, "quantization": None}
    state = {"name": base.name, "state": "finished", "kind": "base", "stand_in": stand_in}
    state |= {"prompt_format_hash": "p" * 64, "updated": "x"}
    made_up.write_json(base / "run.json", state)
    (base / "metrics.jsonl").unlink()
    made_up.write_values(base, [float(n % 4 == 0) for n in range(90)])


ALL = {"alpaca_eval/win_rate", "mt_bench/grade", "checks/pass_rate"}


def compare(capsys, *words, code=0) -> str:
    """Return what the verb printed on stdout, or on stderr if it must fail."""
    assert main(["compare", *words]) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_the_table_names_arms_effect_p_and_verdict_and_is_one_object_or_file(
    runs, tmp_path, capsys
):
    shown = compare(capsys, "r8", "r32")
    for word in ("r32 against r8", "AlpacaEval win rate, head to head", "p (Holm)", "pass rate"):
        assert word in shown
    assert shown.rstrip().splitlines()[-1] == "next: recipes compare r8 r32 --html report.html"
    value = json.loads(compare(capsys, "r8", "r32", "--json"))
    assert {row["metric"] for row in value["rows"]} == ALL
    shown = compare(capsys, "r8")
    assert "value [95%]" in shown and shown.endswith("next: recipes compare r8 base\n")
    compare(capsys, "r8", "r32", "--html", "out.html")
    assert (tmp_path / "out.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "runs"]


def test_words_that_cannot_be_compared_are_one_line(runs, capsys):
    made_up.write_run(runs, "bare")
    for words, said in (
        (["bare"], "none of these has an evaluation with a result"),
        (["r8", "r8"], "'r8' is named twice"),
        (["r9"], "no run named"),
        (["base"], "base of what"),
        (["runs/"], "is a folder without a run"),
        (["r8", "base"], "never evaluated"),
        (["r8", "r32", "--margin", "rouge=0.1"], "--margin rouge: these have no such metric"),
        (["r8", "r32", "--margin", "mt_bench"], "--margin mt_bench: not METRIC=NUMBER"),
        (["r8", "r32", "--margin", "mt_bench=little"], "--margin mt_bench=little: not METRIC"),
    ):
        assert said in compare(capsys, *words, code=2), words


def test_a_damaged_evaluation_is_left_out_and_named_and_the_others_are_compared(runs, capsys):
    file = runs / "r8" / "evals" / "mt_bench" / "items.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"\xff" + lines[1], *lines[2:]]))
    assert main(["compare", "r8", "r32", "--json"]) == 0
    out, err = capsys.readouterr()
    assert {row["metric"] for row in json.loads(out)["rows"]} == ALL - {"mt_bench/grade"}
    assert f"an evaluation is damaged and left out: {file}:2: this line is damaged" in err
    samples = runs / "r8" / "evals" / "alpaca_eval" / "items.jsonl"
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:-3]))
    said = compare(capsys, "r8", "r32", code=4)
    assert "the result is of 60 samples, 57 are stored" in said
    for other in ("alpaca_eval", "checks"):
        (runs / "r8" / "evals" / other / "result.json").write_text("")
    compare(capsys, "r8", code=4)


def test_base_is_the_base_of_the_others_and_not_another_models(runs, capsys):
    make_base(runs, name_or_path="other/model")
    compare(capsys, "r8", "base", code=2)
    make_base(runs)
    assert "r8 against base" in compare(capsys, "r8", "base")


def test_results_of_other_programs_are_compared_and_nothing_is_written(tmp_path, capsys):
    first = lm_eval(tmp_path / "a", [1.0] * 60 + [0.0] * 40)
    second = lm_eval(tmp_path / "b", [1.0] * 90 + [0.0] * 10)
    before = sorted(tmp_path.rglob("*"))
    shown = compare(capsys, str(first), str(second))
    assert "b is better than a" in shown or "a is worse than b" in shown
    assert " base\n" not in compare(capsys, str(first))  # other programs' files know no base
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
