"""The GPU check runs here on a CPU with a tiny model, every case of it, so that it works on the day a GPU is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_check", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=240)


def test_every_case_is_measured_on_a_tiny_model(tmp_path: Path) -> None:
    done = start("--tiny", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [row["case"] for row in record["rows"] if not row.get("tokens_per_s")] == [], record["rows"]
    settings = [row["setting"] for row in record["rows"] if "setting" in row]
    assert {setting["batching"] for setting in settings} == {"padded", "padding-free", "packed"}
    assert {setting["bits"] for setting in settings} == {None, 4}
    assert {setting["attention"] for setting in settings} >= {"sdpa", "eager", "sdpa_by_document"}
    assert any(setting["fsdp"] for setting in settings) and any(setting["checkpointing"] for setting in settings)
    assert any(row["case"].startswith("generation") for row in record["rows"])
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8").count("\n") > len(record["rows"])
    assert "tokens/s" in done.stdout


def test_cases_that_the_time_does_not_allow_say_so(tmp_path: Path) -> None:
    done = start("--tiny", "--minutes", "0", "--json", str(tmp_path / "gpu.json"))
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert done.returncode == 0 and {row["not_measured"] for row in rows} == {"no time left"}


def test_without_a_gpu_it_says_what_can_be_done() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = start()
    assert done.returncode == 5 and "--tiny" in done.stderr and "Traceback" not in done.stderr
