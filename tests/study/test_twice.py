"""A study that trains one recipe twice, from the command to the report: no sentence of it names a
cause.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.analysis import made_up
from tests.study.study_files import write_tiny_study

from recipes_lib.analysis.claims import conclude
from recipes_lib.analysis.runs import load_arms
from recipes_lib.study.config import load_study
from recipes_lib.study.report import design_of, measured_arms


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_trainings_of_one_recipe_have_no_cause_in_the_report_however_far_apart_they_come_out(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(root))
    file = write_tiny_study(tmp_path / "study", tiny_model_dir).with_name("twice.yaml")
    command = [sys.executable, "-m", "recipes_lib.cli", "study", "run", str(file)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (root / "twice/report/report.md").read_text()
    assert "effect over" not in page and "is better than" not in page
    study = load_study(file)
    apart = {}
    for name, right in (("r4", 0.2), ("r4-again", 0.9)):
        arm = next(one for one in measured_arms(study) if one.name == name)
        for run in arm.runs:
            values = [float(n % 10 < 10 * right) for n in range(60)]
            made_up.write_values(run.folder, values, name="apart")
        apart[name] = [run.folder for run in arm.runs]
    conclusion = conclude(load_arms(apart), study.aims, design_of(study))
    claim = next(one for one in conclusion.claims if one.row.eval == "apart")
    assert claim.one_recipe and "chance alone" in claim.sentence
