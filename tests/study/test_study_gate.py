"""`recipes study gate`: one exit code for CI, from files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes_lib.cli import main
from recipes_lib.compare.design import load_study

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import synthetic_runs


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of two runs that were evaluated elsewhere; both are right on the same items."""
    root = tmp_path / "runs"
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(root))
    for name in ("now", "next"):
        synthetic_runs.write_lm_eval(synthetic_runs.write_run(root, name))
    file = tmp_path / "swap.yaml"
    file.write_text(
        "# yaml-language-server: $schema=study.schema.json\nquestion: May next stand in for now?\n"
        "arms: {now: {imported: now}, next: {imported: next}}\n"
    )
    return file


def skill(study: Path, value: float) -> None:
    """Let `next` answer this share of the items; what it gains or loses, it alone does."""
    synthetic_runs.write_lm_eval(study.parent / "runs" / "next", skill=value)


def test_arms_that_are_no_worse_pass(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "gate", str(study)]) == 0
    said = capsys.readouterr().out
    assert "passed: no arm is shown to be worse than now (1 comparison)" in said
    skill(study, 0.7)
    assert main(["study", "gate", str(study)]) == 0


def test_an_arm_that_is_worse_is_named(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skill(study, 0.3)
    assert main(["study", "gate", str(study)]) == 1
    said = capsys.readouterr().out
    assert "failed: 1 worse than now" in said and "arc_easy acc" in said
    assert main(["study", "gate", str(study), "baseline=next"]) == 0
    skill(study, 0.7)
    assert main(["study", "gate", str(study), "baseline=next"]) == 1  # now stands second in the row
    capsys.readouterr()
    assert main(["study", "gate", str(study), "baseline=next", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["exit_code"], found["baseline"]) == (False, 1, "next")
    assert [one["arm"] for one in found["worse"]] == ["now"]


def test_a_margin_must_be_shown(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "gate", str(study), "margins={arc_easy: 5 points}"]) == 0
    assert "and all hold arc_easy" in capsys.readouterr().out
    skill(study, 0.49)  # a few items fewer: neither worse nor shown to be not worse
    assert main(["study", "gate", str(study)]) == 0
    assert main(["study", "gate", str(study), "margins={arc_easy: 2 points}"]) == 1
    said = capsys.readouterr().out
    assert "not shown within its margin: " in said and "0 worse than now, 1 not shown" in said
    assert main(["study", "gate", str(study), "margins={gsm8k: 2 points}"]) == 1
    assert "no comparison on gsm8k, which has a margin" in capsys.readouterr().out


def test_missing_results_decide_nothing(
    study_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "gate", str(study_folder / "tiny.yaml")]) == 6
    said = capsys.readouterr().out
    assert "missing: train.r4 (missing)" in said and "not decided: " in said


def test_an_arm_without_a_tested_comparison_decides_nothing(study: Path) -> None:
    synthetic_runs.write_lm_eval(study.parent / "runs" / "next", task="gsm8k")
    assert main(["study", "gate", str(study)]) == 6


def test_the_baseline_is_the_base_model_or_the_first_arm(study: Path, study_folder: Path) -> None:
    assert load_study(study).baseline == "now"
    assert load_study(study_folder / "tiny.yaml").baseline == "base"
    assert load_study(study_folder / "tiny.yaml", ["include_base=false"]).baseline == "r4"


def test_a_baseline_that_is_no_arm_is_named(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "gate", str(study), "baseline=nwo"]) == 2
    said = capsys.readouterr().err
    assert "baseline: there is no arm 'nwo'" in said and "did you mean now?" in said


def test_the_gate_reads_files_and_imports_no_torch(study: Path) -> None:
    program = (
        "import sys\nfrom recipes_lib.cli import main\ncode = main(sys.argv[1:])\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    runs = study.parent / "runs"
    before = {path: path.stat().st_mtime_ns for path in [study, *runs.glob("n*/**/*")]}
    command = [sys.executable, "-c", program, "study", "gate", str(study)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path.name for path in [*study.parent.iterdir(), *runs.iterdir()]} == {
        *("swap.yaml", "runs", "now", "next", "swap")
    }
    written = {path.name for path in (runs / "swap").rglob("*") if path.is_file()}
    assert written == {"ledger.jsonl", "ledger.json", ".ledger.lock"}  # that it was looked at
