"""Tuning: each arm tries its grid, the lowest validation loss decides, and the arm's seeds are
trained anew. Trainings are stand-ins here.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest
from tests.analysis import made_up
from tests.study.stand_in import COMMAND

from recipes_lib.analysis.claims import Conclusion, conclude
from recipes_lib.analysis.runs import load_arms
from recipes_lib.cli import main
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.study import report
from recipes_lib.study import run as running
from recipes_lib.study.config import Study, load_study
from recipes_lib.study.report import design_of
from recipes_lib.study.run import StudyRunner
from recipes_lib.study.runs import validation_loss, with_choices

RATES = {"0.001": 2.5, "0.01": 2.0, "0.1": 2.2}
GRID = "tune: {train.learning_rate: [0.001, 0.01, 0.1]}"


@pytest.fixture
def tuned(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a study whose two arms try three learning rates; `LOSSES` decides."""
    monkeypatch.setenv("LOSSES", json.dumps(RATES))
    monkeypatch.setattr(running, "train_command", lambda words: [*COMMAND, *words])
    monkeypatch.setattr(report, "report_study", lambda study: None)
    file = study_folder / "tiny.yaml"
    text = file.read_text().partition("evals:")[0]
    file.write_text(f"{text}include_base: false\n{GRID}\n")
    return file


def run(file: Path, code: int = ExitCode.DONE) -> tuple[list[str], str]:
    """Run the study; return the trainings in order, each with its learning rate, and what was
    said.
    """
    said: list[str] = []
    assert StudyRunner(load_study(file), said.append).run() == code, said
    files = [Path(shlex.split(line)[-1]) for line in said if "$ recipes train" in line]
    recipes = [load_recipe(path) for path in files]
    return [f"{each.name} {each.train['learning_rate']}" for each in recipes], "\n".join(said)


def test_each_arm_tries_its_grid_and_is_trained_anew_at_the_best_value(tuned: Path) -> None:
    wanted = [
        f"tiny--{arm}--tune-{rate}--seed1042 {rate}" for arm in ("r4", "r8") for rate in RATES
    ]
    trained, said = run(tuned)
    assert trained == [*wanted, "tiny--r4 0.01", "tiny--r8 0.01"]
    losses = "validation loss of 0.001: 2.5000, 0.01: 2.0000, 0.1: 2.2000"
    assert f"r8: train.learning_rate 0.01 ({losses})" in said
    study = with_choices(load_study(tuned))
    assert {arm.recipe.train["learning_rate"] for arm in study.arms} == {0.01}
    assert run(tuned)[0] == []


def test_a_wider_grid_tries_what_is_new_and_an_arm_of_another_value_is_trained_again(
    tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tuned.read_text().replace("  r8: r8.yaml\n", "")
    tuned.write_text(text)
    run(tuned)
    tuned.write_text(text.replace("0.1]", "0.1, 1.0]"))
    assert run(tuned)[0] == ["tiny--r4--tune-1.0--seed1042 1.0"]  # 1.0 is worse
    monkeypatch.setenv("LOSSES", json.dumps({"2.0": 1.0}))
    tuned.write_text(text.replace("0.1]", "0.1, 2.0]"))
    trained, said = run(tuned)
    assert trained == ["tiny--r4--tune-2.0--seed1042 2.0", "tiny--r4 2.0"]
    assert "train.learning_rate 0.01 -> 2.0): moved to" in said


def test_of_equal_losses_the_first_value_wins_and_one_that_diverged_cannot(
    tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned.write_text(tuned.read_text().replace("  r8: r8.yaml\n", ""))
    monkeypatch.setenv("LOSSES", json.dumps({"0.001": 2.0, "0.01": 2.0, "0.1": None}))
    trained, said = run(tuned)
    assert trained[-1] == "tiny--r4 0.001" and "0.1: diverged" in said
    assert run(tuned)[0] == []
    shutil.rmtree(RunDirectory("tiny").root)
    monkeypatch.setenv("LOSSES", json.dumps(dict.fromkeys(RATES)))
    trained, said = run(tuned, ExitCode.FAILED)
    assert len(trained) == 3 and "failed: r4 (exit code 3): train.learning_rate diverged" in said


def test_a_try_that_failed_or_was_stopped_holds_its_arm_back_until_it_is_done(
    tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "r4--tune-0.1--seed1042")
    trained, _ = run(tuned, ExitCode.FAILED)
    assert trained[-1] == "tiny--r8 0.01" and "tiny--r4 0.01" not in trained
    monkeypatch.setenv("CODE", "75")
    run(tuned, ExitCode.PREEMPTED)
    monkeypatch.delenv("FAIL")
    assert run(tuned)[0] == ["tiny--r4--tune-0.1--seed1042 0.1", "tiny--r4 0.01"]


def test_the_loss_that_counts_is_that_of_the_weights_that_were_kept(tmp_path: Path) -> None:
    kept = RunDirectory("kept", tmp_path)
    kept.path.mkdir()
    lines = ({"step": step, "eval_loss": loss} for step, loss in ((1, 2.5), (2, 1.5), (3, 2.0)))
    kept.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    last = {"last_validation_loss": 2.0}
    for summary, loss in ((last, 2.0), ({**last, "best_step": 2}, 1.5), ({}, None)):
        kept.write_state("finished", summary=summary)
        assert validation_loss(kept) == loss


def test_a_tuned_study_is_not_launched_as_arrays(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", str(tuned), "--profile", "example", "--dry-run"]) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "study 'tiny' tunes its arms" in said and f"recipes study run {tuned}" in said


def concluded(study: Study, root: Path, **chosen: float) -> Conclusion:
    """Arm r8 is better than r4 over two seeds, with these values chosen."""
    arms = [
        arm.tuned(chosen[arm.name], (2.5, 2.0, None)) if arm.name in chosen else arm
        for arm in study.arms
    ]
    study, folders = dataclasses.replace(study, arms=tuple(arms)), {}
    for name, right in (("r4", 0.4), ("r8", 0.8)):
        folders[name] = [
            made_up.write_run(root, f"{name}--seed{seed}", seed=seed) for seed in (42, 43)
        ]
        for seed, folder in enumerate(folders[name]):
            made_up.write_values(folder, [float((n + seed) % 10 < 10 * right) for n in range(90)])
    return conclude(load_arms(folders), study.aims, design_of(study))


def test_arms_tuned_alike_are_compared_each_at_its_best(tuned: Path, tmp_path: Path) -> None:
    (claim,) = concluded(load_study(tuned), tmp_path, r4=0.01, r8=0.01).claims
    assert claim.verdict == "better" and "Only lora.r (8 against 4)" in claim.sentence
    (claim,) = concluded(load_study(tuned), tmp_path, r4=0.01, r8=0.001).claims
    assert "No cause is named" in claim.sentence and "smallest" in claim.sentence


def test_arms_tuned_unequally_have_no_named_cause(tuned: Path, tmp_path: Path) -> None:
    text = tuned.read_text()
    for number, grid in enumerate(("{train.learning_rate: [0.01, 0.1]}", "{}")):
        own = f"r4: {{recipe: r4.yaml, tune: {grid}}}"
        tuned.write_text(text.replace("r4: r4.yaml", own))
        conclusion = concluded(load_study(tuned), tmp_path / str(number), r8=0.01)
        assert "tuned-differently" in {finding.code for finding in conclusion.findings}
        assert "were not tuned over the same values" in conclusion.claims[0].sentence
