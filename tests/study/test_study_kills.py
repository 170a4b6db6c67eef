"""A study killed with SIGKILL at random moments ends with the answers, judgments and numbers of one
that was left alone; nothing is done twice.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.study.study_files import write_tiny_study

KILLS = 10
SEED = 20
LIMIT_S = 600


def start(study: Path, root: Path) -> subprocess.Popen[str]:
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GIT_DIR": os.devnull}
    environment = {**os.environ, "RECIPES_RUNS_ROOT": str(root), **quiet}
    command = [sys.executable, "-m", "recipes_lib.cli", "study", "run", str(study)]
    log = (root.parent / "study.log").open("a")
    return subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
    )


def run_to_the_end(study: Path, root: Path) -> float:
    started = time.monotonic()
    process = start(study, root)
    try:
        log = root.parent / "study.log"
        assert process.wait(timeout=LIMIT_S) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    return time.monotonic() - started


def without_rounding(value: Any) -> Any:
    """A value whose numbers have six digits: what a batch holds moves probabilities by the last
    ones.
    """
    if isinstance(value, dict):
        return {key: without_rounding(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_rounding(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


def stores(root: Path) -> dict[str, dict[str, Any]]:
    """Every stored answer and judgment, by file and key."""
    found = {}
    for kind in ("generations", "judgments"):
        for file in sorted(root.glob(f"*/evals/*/{kind}*.jsonl")):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            by_key = {row["key"]: without_rounding(row) for row in rows}
            assert len(rows) == len(by_key), f"{file} holds an item twice"
            found[str(file.relative_to(root))] = by_key
    return found


def findings(root: Path) -> dict[str, Any]:
    """What a study found: its weights, its answers and judgments, every number and sentence."""
    comparison = json.loads((root / "tiny" / "comparison.json").read_text())
    return {
        "weights": {
            str(f.relative_to(root)): f.read_bytes() for f in root.glob("*/adapter/*.saf*")
        },
        "stores": stores(root),
        "scores": without_rounding(comparison["scores"]),
        "rows": without_rounding(comparison["rows"]),
        "answer": comparison["answer"],
    }


def weights(root: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in root.glob("*/adapter/*.safetensors")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_study_killed_at_ten_moments_ends_like_one_left_alone(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    study = write_tiny_study(tmp_path / "study", tiny_model_dir)
    root = tmp_path / "runs"
    seconds = run_to_the_end(study, root)
    expected = findings(root)
    moments, killed, ended = random.Random(SEED), 0, 0
    while killed < KILLS:
        root.rename(tmp_path / f"runs-{ended}")
        while killed < KILLS:
            process, started = start(study, root), time.monotonic()
            try:
                process.wait(timeout=moments.uniform(0.05, 0.6) * seconds)
                assert process.returncode == 0
                seconds = min(seconds, time.monotonic() - started + 1)  # faster now: kill sooner
                break
            except subprocess.TimeoutExpired:
                killed += 1
                # Alone, so that its children have to notice; or with the whole group, which leaves
                # a training behind.
                process.kill() if killed % 2 else os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        done = weights(root)
        run_to_the_end(study, root)
        assert done.items() <= weights(root).items(), "a finished run was trained again"
        ended += 1
        found = findings(root)
        for what, value in expected.items():
            assert found[what] == value, f"{what} differs"
    assert ended
    # a changed question asks for its answers and their judgments alone
    done, before, questions = weights(root), stores(root), study.with_name("questions.json")
    rows = json.loads(questions.read_text())
    rows[0]["instruction"] += " Please."
    questions.write_text(json.dumps(rows))
    run_to_the_end(study, root)
    assert weights(root) == done
    grown = {name: len(rows) - len(before[name]) for name, rows in stores(root).items()}
    answered = {name: more for name, more in grown.items() if "generations" in name and more}
    assert set(answered.values()) == {1} and len(answered) == 3, grown
    assert all("study--alpaca_eval" in name for name, more in grown.items() if more), grown
