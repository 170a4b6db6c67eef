"""`recipes study plan` and `status`: short, counted, and without touching or importing anything."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes_lib.core.errors import ExitCode
from recipes_lib.core.run_directory import RunDirectory

Recipes = Callable[..., tuple[int, str, str]]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_plan_and_status_touch_nothing_and_status_imports_nothing_heavy(
    study_folder: Path, tmp_path: Path
) -> None:
    before = tree(tmp_path)
    program = (
        "import sys; from recipes_lib.cli import main\n"
        "main(['study', 'status', sys.argv[1]])\n"
        "heavy = [name for name in ('torch', 'transformers', 'scipy') if name in sys.modules]\n"
        "main(['study', 'plan', sys.argv[1]])\n"
        "print(heavy)"
    )
    command = [sys.executable, "-c", program, str(study_folder / "tiny.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert tree(tmp_path) == before


def test_the_plan_counts_trainings_answers_and_judge_requests_in_fifteen_lines(
    study_folder: Path, recipes: Recipes
) -> None:
    code, out, err = recipes("study", "plan", study_folder / "tiny.yaml")
    assert code == ExitCode.DONE and len(out.splitlines()) <= 15, out + err
    _, out, _ = recipes("study", "plan", study_folder / "tiny.yaml", "--json")
    plan = json.loads(out)
    # 3 models; 8 alpaca questions and 4 of mt_bench with two turns each
    assert (plan["trainings"], plan["answers"]) == (2, 3 * (8 + 8))
    # against the reference (3 x 8 x 2 orders), with the base (2 x 8 x 2), grades of 3 x 8 turns
    assert plan["judge_requests"] == 48 + 32 + 24
    _, out, _ = recipes("study", "plan", study_folder / "tiny.yaml", "pairs=all", "--json")
    assert json.loads(out)["judge_requests"] == 48 + 48 + 24


def test_a_plan_counts_the_questions_of_known_sets_before_they_are_fetched(
    tmp_path: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path))
    plan = json.loads(recipes("study", "plan", "lora-rank", "--json")[1])
    assert plan["answers"] == 7 * (805 + 160)  # two arms of three seeds, and the base
    # against the reference, with the base, and MT-Bench's grades
    assert plan["judge_requests"] == 7 * 805 * 2 + 6 * 805 * 2 + 7 * 160


def test_the_status_shows_what_is_not_done_and_why(study_folder: Path, recipes: Recipes) -> None:
    stopped, failed = RunDirectory("tiny--r4"), RunDirectory("tiny--r8")
    stopped.write_state("preempted")
    stopped.metrics.write_text('{"step": 7, "loss": 2.5}\n')
    failed.write_state("failed", exit_code=3, error="loss is nan")
    _, out, _ = recipes("study", "status", study_folder / "tiny.yaml", "--json")
    rows = {row["name"]: (row["state"], row["detail"]) for row in json.loads(out)["rows"]}
    assert rows["tiny--r4"] == ("stopped", "step 7, loss 2.500")
    assert rows["tiny--r8"] == ("failed", "loss is nan")
    assert rows["study--mt_bench of tiny--r8"] == ("missing", "")


def test_a_plan_promises_no_difference_above_100_points(study_folder, recipes) -> None:
    (study_folder / "q.jsonl").write_text('{"prompt": "Hi", "check": "exact", "expected": "a"}\n')
    (study_folder / "q.yaml").write_text("suite: {name: checks}\ndata: {questions: q.jsonl}\n")
    file = study_folder / "tiny.yaml"
    file.write_text(file.read_text().replace("evals: [", "primary: q/pass_rate\nevals: [q.yaml, "))
    assert "not even 100 points (1 question" in recipes("study", "plan", file)[1]
