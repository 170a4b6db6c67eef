"""How much of the machine others used, and the times of steps beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from recipes_lib.training import load
from recipes_lib.training.metrics import MetricsCallback


def clock(monkeypatch: pytest.MonkeyPatch, *readings: tuple[float, float, float] | None) -> None:
    """Let the meter read these: time, busy seconds of two processors, own seconds."""
    told = iter(readings)
    monkeypatch.setattr(load, "_processor_seconds", lambda: next(told))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


def test_what_others_took_is_a_share_of_our_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, (0.0, 100.0, 50.0), (10.0, 115.0, 59.0), (20.0, 125.0, 69.0))
    meter = load.LoadMeter()
    assert meter.others() == pytest.approx((15 - 9) / 20)
    assert meter.others() == pytest.approx(0.0)


def test_the_other_processes_of_a_training_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    clock(monkeypatch, (0.0, 0.0, 0.0), (10.0, 20.0, 9.0))
    assert load.LoadMeter().others() == pytest.approx(0.1)


def test_a_system_that_does_not_tell_leaves_the_load_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(load, "_STATISTICS", tmp_path / "none")
    assert load.LoadMeter().others() is None


def test_busy_time_is_that_of_our_processors_without_idle_and_waiting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    statistics = tmp_path / "stat"
    statistics.write_text(
        "cpu 9 9 9 9 9 9 9 9 9 9\n"
        "cpu0 100 20 30 7777 8888 1 2 3 50 0\n"
        "cpu1 200 0 0 7777 8888 0 0 0 0 0\n"
        "cpu10 5000 0 0 0 0 0 0 0 0 0\n"
        "intr 1 2\n"
    )
    monkeypatch.setattr(load, "_STATISTICS", statistics)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    read = load._processor_seconds()
    assert read is not None and read[1] == pytest.approx(356 / os.sysconf("SC_CLK_TCK"))


def test_data_workers_are_our_own_while_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load._processor_seconds()
    if before is None:
        pytest.skip("this system has no /proc/stat")
    works = "import time\nwhile time.process_time() < 1: pass\nprint(flush=True)\ninput()"
    words, pipe = [sys.executable, "-c", works], subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        workers = [SimpleNamespace(pid=child.pid)]
        monkeypatch.setattr(load.multiprocessing, "active_children", lambda: workers)
        after = load._processor_seconds()
        child.kill()
    assert after is not None and after[2] - before[2] > 0.9


def test_processes_of_others_on_our_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load.other_gpu_processes() is None or torch.cuda.is_available()
    listed = "GPU-aa, 11\nGPU-aa, 12\nGPU-bb, 13\nGPU-cc, 14\n"
    monkeypatch.setattr(load.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    gpus = [SimpleNamespace(uuid=name) for name in ("aa", "bb", "dd", "ee")]
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(load.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=listed))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert load.other_gpu_processes() == 1

    def failing(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr(load.subprocess, "run", failing)
    assert load.other_gpu_processes() is None


def test_a_step_after_a_validation_or_a_save_and_the_first_have_no_time(tmp_path: Path) -> None:
    tokens: list[int] = []
    logged = MetricsCallback(tmp_path / "metrics.jsonl", quiet=True, step_tokens=tokens)
    state = TrainerState(max_steps=100)

    def steps(*happened: str) -> None:
        for what in happened:
            state.global_step += 1
            logged.on_step_end(None, state, None)
            tokens.append(10)
            if what == "validation":
                logged.on_evaluate(None, state, None, metrics={})
            if what == "save":
                logged.on_save(None, state, None)

    logged.on_train_begin(None, state, None)
    steps("", "", "validation", "", "save")
    logged.on_log(None, state, None, logs={"loss": 1.0, "learning_rate": 0.1, "num_tokens": 50})
    steps("", "")
    tokens.clear()
    logged.on_log(None, state, None, logs={"loss": 1.0, "learning_rate": 0.1, "num_tokens": 70})
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [one is None for one in first["step_seconds"]] == [True, False, False, True, False]
    assert first["step_tokens"] == [10] * 5
    assert [one is None for one in second["step_seconds"]] == [True, False]
    assert "step_tokens" not in second  # not those of its steps
