"""The GPU check runs here on a CPU with a tiny model, every row of it, so that it works on the day
a GPU is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from benchmarks import gpu_check, gpu_wheels

from recipes_lib.config.recipe import load_recipe
from recipes_lib.planning.cards import card_named

PROJECT = Path(__file__).resolve().parents[2]
GOALS = [row for row in gpu_check.ROWS if row.goal]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_check", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=400
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_row_is_measured_through_the_real_trainer_on_a_tiny_model(tmp_path: Path) -> None:
    done = start("--cpu", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert not {row["row"]: row["not_run"] for row in rows if "not_run" in row}
    assert [row["row"] for row in rows] == [row.name for row in gpu_check.ROWS]
    assert rows[0]["row"] == "shipped default"
    trained = [row for row in rows if row["setting"]["kind"] == "training"]
    for row in trained:
        assert row["tokens_per_s"] > 0 and row["n"] == 3, row
        # the plan knows what a CPU trains by itself, and padded rows
        assert row["planned_path"].endswith(("documents", "sdpa", "compiled", "fused")), row
        assert len(row["losses"]) == 5 and row["peak_gib"] > 0 and row["planned_peak_gib"] > 0
        assert (len(row["largest_kernels"]) == 5 and "sdpa_by_document" in row["path"]) or (
            row["path"] == ["sdpa"]
        )
    apart = {row["row"]: row["losses_apart"] for row in trained if "losses_apart" in row}
    [fp8] = [name for name in apart if "FP8" in name]  # another precision, with losses of its own
    assert 0 < apart.pop(fp8) < 0.02
    assert len(apart) >= 3 and max(apart.values()) < gpu_check.AS_LOSSES
    keys = {"compiled": "torch_compile", "fused": "lora_implementation", "fp8": "base_precision"}
    for word, key in keys.items():
        took = [row["row"] for row in trained if word in row["path"]]
        assert took == [row.name for row in gpu_check.ROWS if key in str(row.overrides)]
    command = next(row for row in rows if row["setting"]["kind"] == "command")
    assert command["reloaded"]["agrees"]
    assert "goal" not in done.stdout and "tokens/s" in done.stdout
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8").count("\n") > len(rows)


@pytest.mark.parametrize("row", gpu_check.ROWS, ids=lambda row: row.name)
def test_every_row_is_a_recipe_that_is_accepted_on_a_gpu(
    row: gpu_check.Row, tmp_path: Path
) -> None:
    load_recipe(row.recipe, gpu_check.overrides_of(row, gpu_check.Size(), tmp_path))


def measured(row: gpu_check.Row, *path: str, speed: float) -> dict[str, Any]:
    return {"row": row.name, "setting": asdict(row), "path": list(path), "tokens_per_s": speed}


@pytest.mark.parametrize("row", GOALS, ids=lambda row: row.name)
def test_a_goal_is_announced_for_the_path_that_was_trained_and_for_no_other(
    row: gpu_check.Row,
) -> None:
    h100, whole, speed = card_named("h100"), gpu_check.Size(), 1.0 + (row.goal or 0)

    def said(*path: str, card: Any = h100, size: gpu_check.Size = whole) -> str:
        return " ".join(gpu_check.goal_of(measured(row, *path, speed=speed), card, size))

    assert said(*row.path, "padding-free").endswith("reached") and "not" not in said(*row.path)
    for at, missing in enumerate(row.path):
        others = ["sdpa", *row.path[:at], *row.path[at + 1 :]]
        assert f"no goal, trained without {missing}" in said(*others)
    assert not said(*row.path, card=card_named("a100")) and not said(*row.path, card=None)
    assert not said(*row.path, size=gpu_check.SMALL)


def test_plans_take_speeds_of_rows_that_trained_as_they_count_and_for_long_enough() -> None:
    row = {"tokens_per_s": 9000.0, "counted_tokens_per_s": 6000.0, "n": 15}
    rows = [
        {**row, "planned_path": "LoRA, flash"},
        {**row, "planned_path": "QLoRA, sdpa", "n": 3},
        {**row, "planned_path": None},
        {"row": "full", "not_run": "out of memory"},
    ]
    [speed] = gpu_check.speeds_for_plans(rows, "h100-80gb", "2026-11-26")
    assert (speed.path, speed.stretch) == ("LoRA, flash", pytest.approx(2 / 3))


def test_a_row_that_fails_costs_itself_alone_and_rows_without_time_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(*_: Any) -> dict[str, Any]:
        raise MemoryError("too large")

    monkeypatch.setitem(gpu_check.MEASURE, "answers", answers)
    monkeypatch.setitem(gpu_check.MEASURE, "judgments", lambda *_: {"judgments_per_s": 2.0, "n": 1})
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path))
    rows = tuple(row for row in gpu_check.ROWS if row.kind in ("answers", "judgments"))
    kept: list[int] = []
    found = [
        gpu_check.run_rows(
            rows, gpu_check.SMALL, tmp_path, deadline, lambda rows: kept.append(len(rows))
        )
        for deadline in (float("inf"), 0.0)
    ]
    assert found[0][0]["not_run"] == "MemoryError: too large"
    assert found[0][1]["judgments_per_s"] == 2.0 and kept == [1, 2, 1, 2]
    assert [row["not_run"] for row in found[1]] == ["no time left"] * 2
    assert "not run: no time left" in gpu_check.table(found[1])


def test_without_a_gpu_it_says_what_can_be_done() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = start()
    assert done.returncode == 5 and "--cpu" in done.stderr and "Traceback" not in done.stderr


def test_wheels_are_carried_for_what_an_image_lacks_or_has_in_a_version_that_is_not_taken() -> None:
    needs = [
        {"name": "trl", "version": "1.16.0", "requires_dist": ["datasets>=5", "rich"]},
        {"name": "datasets", "version": "5.2.0", "requires_dist": ['dill; extra == "x"', "xxhash"]},
        {"name": "rich", "version": "15.0", "requires_dist": ["pygments"]},
        {"name": "torch", "version": "2.13.0"},
        *({"name": name, "version": "1.0"} for name in ("dill", "xxhash", "pygments")),
    ]
    image = gpu_wheels.image_of(["rich", "torch==2.8.0+cu130", "datasets==4.8", "xxhash==3.5"])
    assert gpu_wheels.to_carry(needs, image) == {"trl": "1.16.0", "datasets": "5.2.0"}


def test_the_kernels_of_a_cuda_build_keep_what_is_planned(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(PROJECT / "benchmarks/cuda_shapes.py"),
        "--layers",
        "1",
        "--json",
        str(tmp_path / "kept.json"),
    ]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=240)
    if not torch.backends.cuda.is_built():
        assert (
            done.returncode == 5
            and "built without CUDA" in done.stderr
            and "Traceback" not in done.stderr
        )
        pytest.skip("this torch is built without CUDA")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        assert row["planned_gib"] == pytest.approx(row["kept_gib"], rel=0.05), row


def test_the_recorded_figures_of_a_cuda_build_are_those_of_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    import cuda_shapes

    record = json.loads(
        (PROJECT / "benchmarks/results/cuda_shapes.json").read_text(encoding="utf-8")
    )
    config = gpu_check.LLAMA_2_7B | {"num_hidden_layers": record["layers"]}
    for row in record["rows"]:
        planned = cuda_shapes.planned_bytes(config, *cuda_shapes.CASES[row["case"]]) / 2**30
        assert planned == pytest.approx(row["kept_gib"], rel=0.01), row
