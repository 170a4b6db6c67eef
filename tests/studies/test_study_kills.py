"""A study killed with SIGKILL at ten random moments ends with the report of one that was left alone; nothing is done twice."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from study_files import write_tiny_study

KILLS = 10
SEED = 20
LIMIT_S = 600
# Sections and columns of the report that say when, how fast and by which code, not what was found.
ASIDE = ("Cost", "Reproduce", "Provenance")
MEASURED_NOW = re.compile(r"seconds|tokens_per_second|peak_memory|device_hours|hours|cost")


def start(study: Path, root: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "RECIPES_RUNS_ROOT": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "recipes_lib.cli", "study", "run", str(study)]
    log = (root.parent / "study.log").open("a", encoding="utf-8")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)


def run_to_the_end(study: Path, root: Path) -> float:
    started = time.monotonic()
    process = start(study, root)
    try:
        assert process.wait(timeout=LIMIT_S) == 0, (root.parent / "study.log").read_text(encoding="utf-8")[-3000:]
    finally:
        process.kill()
    return time.monotonic() - started


def findings_of(root: Path) -> dict[str, Any]:
    """What a study found: the report without times and provenance, every step's result, and every stored answer and judgment."""
    report = root / "tiny" / "report"
    numbers = json.loads((report / "numbers.json").read_text(encoding="utf-8"))
    numbers["numbers"] = [row for row in numbers["numbers"] if not MEASURED_NOW.search(json.dumps(row))]
    sections = re.split(r"^## ", (report / "report.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = [section for section in sections if not section.startswith((*ASIDE, "Training"))]
    steps = {
        file.parent.name: json.loads(file.read_text(encoding="utf-8"))["output"] for file in sorted(root.glob("tiny/steps/*/done.json"))
    }
    stores = {}
    for file in sorted([*root.glob("*/evals/*/generations.jsonl"), *root.glob("*/evals/*/judgments*.jsonl")]):
        keys = [json.loads(line)["key"] for line in file.read_text(encoding="utf-8").splitlines()]
        assert len(keys) == len(set(keys)), f"{file} holds an item twice"
        stores[str(file.relative_to(root))] = sorted(keys)
    figures = {file.name for file in (report / "figures").iterdir()}
    return {"numbers": numbers, "text": text, "steps": steps, "stores": stores, "figures": figures}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_study_killed_at_ten_moments_ends_like_one_left_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    study = write_tiny_study(tmp_path / "study", tiny_model_dir)
    root = tmp_path / "runs"
    seconds = run_to_the_end(study, root)
    expected = findings_of(root)
    assert len(expected["steps"]) == 24
    moments, killed, ended = random.Random(SEED), 0, 0
    while killed < KILLS:
        root.rename(tmp_path / f"runs-{ended}")
        while killed < KILLS:
            process, started = start(study, root), time.monotonic()
            try:
                process.wait(timeout=moments.uniform(0.05, 0.6) * seconds)
                assert process.returncode == 0
                seconds = min(seconds, time.monotonic() - started + 1)  # the machine became faster: kill sooner
                break
            except subprocess.TimeoutExpired:
                killed += 1
                # Alone, so that its children have to notice; or with the whole group, which leaves a training behind.
                process.kill() if killed % 2 else os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        run_to_the_end(study, root)
        ended += 1
        assert findings_of(root) == expected
    assert ended


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_run_finds_everything_fresh_and_a_changed_question_asks_only_for_the_answers(tiny_model_dir: Path, tmp_path: Path) -> None:
    study = write_tiny_study(tmp_path / "study", tiny_model_dir)
    root = tmp_path / "runs"
    run_to_the_end(study, root)
    weights = {file: file.stat().st_mtime_ns for file in root.glob("*/adapter/*.safetensors")}
    before = {path: path.read_bytes() for path in root.rglob("*.jsonl")}
    assert run_to_the_end(study, root) < 5
    assert {path: path.read_bytes() for path in root.rglob("*.jsonl")} == before
    questions = tmp_path / "study" / "questions.json"
    rows = json.loads(questions.read_text(encoding="utf-8"))
    rows[0]["instruction"] += " Please."
    questions.write_text(json.dumps(rows), encoding="utf-8")
    run_to_the_end(study, root)
    assert {file: file.stat().st_mtime_ns for file in root.glob("*/adapter/*.safetensors")} == weights
    grown = {path.parent.name for path, text in before.items() if path.name == "generations.jsonl" and path.read_bytes() != text}
    assert grown == {"study--alpaca_eval"}
    log = (tmp_path / "study.log").read_text(encoding="utf-8")
    assert "answers.study--alpaca_eval.r4 is done again: questions changed" in log
