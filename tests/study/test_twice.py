"""A study that trains one recipe twice, from the command to the report: no sentence of it names a
cause.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.study.study_files import write_tiny_study

from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.design import load_study
from recipes_lib.compare.measurements import ArmMeasurements, Measurements, read_measurements
from recipes_lib.compare.validity import check_validity
from recipes_lib.study.runs import run_names

QUESTIONS = 60


def all_right(arm: ArmMeasurements, right: bool) -> ArmMeasurements:
    """The arm as it would be if lm-eval had asked it more questions, and it had got all of them
    right, or none.
    """
    runs = []
    for run in arm.runs:
        (one,) = (result for result in run.evals if result.suite == "lm_eval")
        items = tuple(
            dataclasses.replace(one.measures[0].samples[0], id=str(n), value=float(right))
            for n in range(QUESTIONS)
        )
        measures = tuple(dataclasses.replace(measure, samples=items) for measure in one.measures)
        runs.append(dataclasses.replace(run, evals=(dataclasses.replace(one, measures=measures),)))
    return dataclasses.replace(arm, runs=tuple(runs))


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
    report = (root / "twice/report/report.md").read_text(encoding="utf-8")
    assert (
        "this is its effect" not in report
        and "this is their joint effect" not in report
        and "an A/A pair" in report
    )

    study = load_study(file)
    measured = read_measurements(
        {arm: [root / name for name in names] for arm, names in run_names(study).items()}
    )
    apart = {
        name: all_right(arm, name == "r4-again")
        for name, arm in measured.arms.items()
        if name != "base"
    }
    comparison = compare_arms(found := Measurements(apart), check_validity(study, found), study)
    rows = [row for row in comparison.rows if row.of_results and not row.aside]
    assert {row.verdict for row in rows} == {"better"}
    said = [row.sentence for row in rows]
    assert all(
        "both are trainings of one recipe" in sentence and "its effect" not in sentence
        for sentence in said
    ), said
    answer = " ".join(comparison.answer)
    assert "better" not in answer and "worse" not in answer and "its effect" not in answer, answer
