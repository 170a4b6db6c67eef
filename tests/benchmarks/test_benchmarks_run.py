"""Benchmarks are run rarely; these tests keep them working. None checks a speed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]


def start(script: str, *arguments: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    command = [sys.executable, "-W", "ignore", str(PROJECT / "benchmarks" / script), *arguments]
    return subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])  # the scripts add their folder
    spec = importlib.util.spec_from_file_location(
        f"benchmark_{name}", PROJECT / "benchmarks" / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_the_three_largest_costs_of_a_step_are_named(tiny_recipe: Path, tmp_path: Path) -> None:
    done = start("profile_step.py", str(tiny_recipe), "--json", str(tmp_path / "profile.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("largest: ") == 3
    seconds = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))["seconds"]
    assert seconds["matrix products"] > 0 and seconds["attention"] > 0


def test_rows_that_trl_drops_silently_are_counted_and_named(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    long, short = (
        {"instruction": "word " * 200, "context": ""},
        {"instruction": "Say hello", "context": ""},
    )
    rows = [
        {**(long if number % 20 == 0 else short), "response": f"Hello {number}"}
        for number in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    record = tmp_path / "prep.json"
    words = [
        "--source",
        tmp_path / "rows.jsonl",
        "--model",
        tiny_model_dir,
        "--max-length",
        128,
        "--repeats",
        1,
        "--json",
        record,
    ]
    done = start("data_prep.py", *map(str, words))
    facts = json.loads(record.read_text(encoding="utf-8")) if record.exists() else done.stderr
    assert facts["ours"] == {"rows_kept": 57, "dropped_and_named": 3} and facts["trl"] == {
        "rows_kept": 57,
        "dropped_and_named": 0,
    }
    assert facts["cpu_seconds"]["trl"]["n"] == 1 and facts["ratio"]["median"] > 0


def test_preparing_rows_is_measured_for_each_number_of_rows(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    record = tmp_path / "scale.json"
    done = start(
        "data_scale.py",
        "--model",
        str(tiny_model_dir),
        "--rows",
        "400",
        "200",
        "--json",
        str(record),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "400 rows:" in done.stdout and "per row beyond the first 200" in done.stdout
    assert json.loads(record.read_text(encoding="utf-8"))["rows"]["400"]["cpu_seconds"] > 0


def test_the_time_inside_callbacks_and_collation_is_a_share_of_the_loop(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    done = start(
        "train_overhead.py",
        str(tiny_recipe),
        "--steps",
        "2",
        "--json",
        str(tmp_path / "overhead.json"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads((tmp_path / "overhead.json").read_text(encoding="utf-8"))
    assert facts["calls"] >= 6 and 0 < facts["share"] < 1 and facts["loop_s"] > 0


def test_every_light_verb_is_timed(tmp_path: Path) -> None:
    done = start("startup.py", "--repeats", "1", "--json", str(tmp_path / "startup.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        len(json.loads((tmp_path / "startup.json").read_text(encoding="utf-8"))["cpu_seconds"]) == 5
    )


def test_a_peer_that_does_not_install_is_reported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    peer = load("train_cpu", monkeypatch).install("llamafactory", "0.0.0", tmp_path)
    assert peer.python is None and peer.reason.startswith("does not install")


def test_ratios_are_paired_and_the_first_step_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    train_cpu = load("train_cpu", monkeypatch)

    def worker(way: str, seconds: list[float]) -> Any:
        one = object.__new__(train_cpu.Worker)
        one.way, one.failed = way, False
        one.steps = [{"cpu_s": value, "tokens": 100} for value in seconds]
        return one

    ours, theirs = worker("ours", [99, 1, 2, 4]), worker("bare", [1, 2, 2, 12])
    rows = train_cpu.summarise([ours, theirs], ours)
    assert rows[1]["ours_over_this"] == 2 and rows[1]["range"] == [1, 3] and rows[1]["n"] == 3
    assert rows[1]["tokens_per_cpu_s"] == 50


def test_levers_go_on_where_an_earlier_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_cpu = load("train_cpu", monkeypatch)
    earlier = tmp_path / "levers.json"
    rows = [
        {"way": "ours", "ours_over_this": 1.0},
        {"way": "padded", "ours_over_this": 2.0},
        {"way": "huge pages", "failed": True},
    ]
    earlier.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    found = train_cpu.measured_before(earlier)
    assert (
        found == rows
        and train_cpu.measured_before(tmp_path / "none.json")
        == train_cpu.measured_before(None)
        == []
    )
    names = ["padded", "huge pages", *(f"lever {number}" for number in range(4))]
    assert train_cpu.groups_of(names, found) == [
        ["huge pages", "lever 0", "lever 1", "lever 2"],
        ["lever 3"],
    ]


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_adapter_of_the_whole_one(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    done = start(
        "resume_overhead.py",
        str(tiny_recipe),
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "resume.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    record = json.loads((tmp_path / "resume.json").read_text(encoding="utf-8"))
    assert record["rounds"][0]["same_adapter"] and record["rounds"][0]["checkpoint_mib"] > 0


@pytest.mark.slow
def test_ways_of_training_take_turns(tmp_path: Path) -> None:
    if not (PROJECT / ".cache" / "models").is_dir():
        pytest.skip("the packaged model is not here yet: make quickstart")
    done = start(
        "train_cpu.py",
        "--steps",
        "1",
        "--ways",
        "ours,bare-our-loss",
        "--json",
        str(tmp_path / "train.json"),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))["rows"]
    assert [row["failed"] for row in rows] == [False, False] and all(
        row["tokens_per_cpu_s"] > 0 for row in rows
    )


def test_a_verb_that_refuses_is_a_cell_with_its_code_and_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = load("family_matrix", monkeypatch)
    (tmp_path / "bad.yaml").write_text("model: {name_or_path: x}\ndata: {sauce: y}\n")
    cell = matrix.said(["check", tmp_path / "bad.yaml"], tmp_path)
    assert cell.startswith("exit 2: bad.yaml:2: unknown key 'data.sauce'")


@pytest.mark.slow
def test_a_family_goes_through_every_verb_and_a_second_start_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = load("family_matrix", monkeypatch)
    words = ["--families", "llama", "--methods", "lora", "--csv", str(tmp_path / "table.csv")]
    for _ in range(2):
        matrix.main(words)
        assert capsys.readouterr().out.endswith("1 rows: 13 pass\n")
    head, row = (tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()
    assert head.startswith(
        "family,method,check,plan,train,resume,verify,merge,chat,eval lm_eval,eval checks"
    )
    assert row == ",".join(["llama", "lora", *["pass"] * 13])
