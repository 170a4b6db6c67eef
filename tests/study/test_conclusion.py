"""The end of a study: its design is locked with the first verdicts; the gate goes by them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from tests.analysis import made_up

from recipes_lib.analysis.aims import Aims, Margin
from recipes_lib.analysis.claims import conclude
from recipes_lib.analysis.runs import Arms, load_arms
from recipes_lib.cli import main
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.study import report as reporting
from recipes_lib.study.config import Arm, Study, load_study
from recipes_lib.study.report import gate, report_study
from recipes_lib.study.run import evaluations, study_trainings
from recipes_lib.study.run import study_folder as folder_of


@pytest.fixture
def file(study_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a study whose arms are measured: r8 is better than r4, two seeds each."""
    folders: dict[str, list[Path]] = {"r4": [], "r8": []}
    for name, rank, right in (("r4", 4, 0.4), ("r8", 8, 0.8)):
        for seed in (42, 43):
            folder = made_up.write_run(tmp_path / "made", f"{name}{seed}", seed=seed, rank=rank)
            made_up.write_values(folder, [float((n + seed) % 10 < 10 * right) for n in range(90)])
            folders[name].append(folder)
    measured = load_arms(folders)
    monkeypatch.setattr(reporting, "measured_arms", lambda study: measured)
    monkeypatch.setattr(reporting.runs, "missing_of", lambda study: [])
    return study_folder / "tiny.yaml"


def test_the_first_verdicts_lock_the_design_and_an_interim_look_has_none(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(file, ["seeds=[42, 43]"])
    lock = folder_of(study) / "design.json"
    with monkeypatch.context() as early:
        early.setattr(reporting.runs, "missing_of", lambda study: ["training tiny--r8"])
        report, missing = report_study(study)
    assert missing and report.answer[0].startswith("Interim") and not lock.exists()
    written = json.loads((folder_of(study) / "comparison.json").read_text())
    assert "recipes study run" in written["cannot_say"][0]
    first, _ = report_study(study)
    assert not first.descriptive and lock.is_file()
    assert "r8 is better than r4" in first.answer[0]
    assert main(["study", "report", str(file), "seeds=[43, 42]"]) == ExitCode.DONE
    assert first.answer[0] in (said := capsys.readouterr().out)
    assert said.splitlines()[-1].startswith("next: recipes export tiny--r4--seed43 --to ")
    assert (folder_of(study) / "report" / "report.html").is_file()


def test_a_design_changed_after_the_verdicts_leaves_none(file: Path, monkeypatch) -> None:
    text = file.read_text().replace("seeds: [42]", "seeds: [42, 43]")
    file.write_text(text)
    report_study(load_study(file))
    changes_of = {
        "seeds.r4 changed": ("seeds: [42, 43]", "seeds: [42, 43, 44]"),
        "margins": ("seeds:", "margins: {win_rate: 2 points}\nseeds:"),
        "primary": ("seeds:", "primary: mt_bench/grade\nseeds:"),
        "arms.r4 changed": ("seeds:", "overrides: [train.learning_rate=0.5]\nseeds:"),
        "r4 changed since": ("seeds:", "overrides: [train.max_grad_norm=0]\nseeds:"),
        "opponents changed": ("seeds:", "baseline: r4\nseeds:"),
        "arms.more changed": ("  r8: r8.yaml", "  r8: r8.yaml\n  more: r8.yaml"),
        "evals.study--lm_eval changed": (", lm_eval.yaml", ""),
    }
    wrong = []
    eval, questions = file.with_name("alpaca_eval.yaml"), file.with_name("questions.json")
    for place, old, new in (
        (eval, "max_new_tokens: 12", "max_new_tokens: 12, temperature: 1, seed: 3"),
        (questions, '"output": "', '"output": "No. '),
        (eval, "probe_pairs: 1}", "probe_pairs: 1}\nthresholds: {unparsed_max: 1}"),
    ):
        before = place.read_text()
        place.write_text(before.replace(old, new))
        report, _ = report_study(load_study(file))
        place.write_text(before)
        if "evals.study--alpaca_eval changed" not in report.descriptive:
            wrong.append((new, report.descriptive))
    there = file.parents[1] / "elsewhere" / file.parent.name
    shutil.copytree(file.parent, there)
    assert not report_study(load_study(there / file.name))[0].descriptive
    resolved, later = Arm.resolved, {"data.later": None, "train.later": False}
    monkeypatch.setattr(Arm, "resolved", lambda arm: resolved(arm) | later)
    assert not report_study(load_study(file))[0].descriptive
    for what, (old, new) in changes_of.items():
        file.write_text(text.replace(old, new))
        report, _ = report_study(load_study(file))
        if not all(line.startswith("Exploratory") for line in (report.descriptive, *report.answer)):
            wrong.append(what)
        if what not in report.descriptive:
            wrong.append(f"{what}: {report.descriptive}")
    assert not wrong


def test_an_arm_that_was_trained_once_is_no_two_trainings_by_a_baseline_of_two(
    study_folder: Path, tmp_path: Path
) -> None:
    """Each arm meets both trainings of the baseline, whose seeds are others."""
    file = study_folder / "tiny.yaml"
    text = file.read_text().partition("factors")[0] + (
        "factors: {rank: [lora.r, lora.lora_alpha]}\nbaseline: r4\nevals: [alpaca_eval.yaml]\n"
        "arms:\n  r4: {recipe: r4.yaml, seeds: [1, 2]}\n  r8: {recipe: r8.yaml, seeds: [3]}\n"
        "  r16: {recipe: r8.yaml, overrides: [lora.r=16], seeds: [3]}\n"
    )
    file.write_text(text)
    study = load_study(file)
    folders: dict[str, list[Path]] = {}
    for training in study_trainings(study):
        rank = int(training.arm.name[1:])
        seed, arm = training.seed, training.arm.name
        folder = made_up.write_run(tmp_path / "runs", training.run, seed=seed, rank=rank)
        folders.setdefault(arm, []).append(folder)
    folders["base"] = [made_up.write_run(tmp_path / "runs", "base--model")]
    met = [result for result in evaluations(study) if result.against]
    assert sum(result.run.startswith("tiny--r8") for result in met) == 2
    rates = {"tiny--r16--seed3": 0.9, "tiny--r8--seed3": 0.4}
    for result in met:
        run = result.run if result.run.startswith("tiny") else "base--model"
        wins = [float(n % 100 < 100 * rates.get(run, 0.1)) for n in range(200)]
        values = wins if result.against.endswith("seed1") else wins[::-1]
        made_up.write_judged(tmp_path / "runs" / run, 200, against=result.against, values=values)
    claims = conclude(load_arms(folders), design=study.design).claims
    trainings = {claim.row.arms: claim.row.trainings for claim in claims}
    assert trainings["r16", "r8"] == (1, 1)
    assert trainings["r8", "base"] == (1, 0)
    (claim,) = (claim for claim in claims if claim.row.arms == ("r16", "r8"))
    assert "The r16 run scored better than the r8 run" in claim.sentence
    assert claim.row.opponent == "r4" and claim.row.difference == pytest.approx(0.5)
    assert "trainings each" not in claim.sentence and "training seed" not in claim.sentence
    scores = conclude(load_arms(folders)).table.scores
    assert {score.trainings for score in scores if score.arm == "r8"} == {1}


def test_win_rates_against_two_trainings_of_an_opponent_are_not_compared(tmp_path: Path) -> None:
    """r8 met one training of r4 and r16 the other: r4's seeds are not the arms' difference."""
    folders: dict[str, list[Path]] = {"r4": [], "r8": [], "r16": []}
    for arm, seed in (("r4", 1), ("r4", 2), ("r8", 1), ("r16", 2)):
        folders[arm].append(made_up.write_run(tmp_path, f"{arm}--{seed}", seed=seed))
    for arm, skill in (("r8", 0.2), ("r16", 0.9)):
        (folder,) = folders[arm]
        made_up.write_judged(folder, 200, against=folder.name.replace(arm, "r4"), skill=skill)
    claims = conclude(load_arms(folders)).claims
    (claim,) = (claim for claim in claims if set(claim.row.arms) == {"r8", "r16"})
    assert claim.verdict == "no verdict"
    assert "no two of their trainings met the same training of r4" in claim.sentence


def gated(file: Path, baseline: str) -> Study:
    text = file.read_text().partition("include_base")[0]
    file.write_text(f"{text}include_base: false\nbaseline: {baseline}\n")
    return load_study(file)


def test_the_gate_fails_for_a_worse_arm_and_passes_for_a_better_one(file, monkeypatch):
    code, lines = gate(gated(file, "r4"))
    assert code == ExitCode.DONE and lines == ["passed: no arm is shown to be worse than r4"]
    for metric, passes in (("pass_rate", True), ("win_rate", False)):  # it holds to its margin
        aims = Aims(margins={metric: Margin(0.1)})
        held = dataclasses.replace(gated(file, "r4"), aims=aims)
        assert (gate(held)[0] == ExitCode.DONE) is passes
    study = gated(file, "r8")
    code, lines = gate(study)
    assert code == ExitCode.FAILED and "r4" in lines[0]
    monkeypatch.setattr(reporting.runs, "missing_of", lambda study: ["training tiny--r8"])
    code, lines = gate(study)
    assert code == ExitCode.EVALUATION_INCOMPLETE and "next: recipes study run" in lines[-1]
    monkeypatch.setattr(reporting.runs, "missing_of", lambda study: [])
    for arm in reporting.measured_arms(study):  # also where a finding stops the sentence
        for log in arm.logs:
            log.answers.__dict__["fingerprint"] = "the same"
    assert reporting.conclude_study(study)[2].claims[0].verdict == "no verdict"
    assert gate(study)[0] == ExitCode.FAILED
    # everything is measured and nothing can be compared: no command would help
    monkeypatch.setattr(reporting, "measured_arms", lambda study: Arms({}))
    code, lines = gate(study)
    assert code == ExitCode.EVALUATION_INCOMPLETE and "r4 with r8 can be tested" in lines[0]
    assert not any("study run" in line for line in lines)


def test_a_training_that_was_dropped_after_a_look_is_named(file: Path) -> None:
    """Its numbers were seen, and without it there may be a verdict."""
    study, folder = load_study(file), folder_of(load_study(file)) / "recipes"
    folder.mkdir(parents=True)
    for name in ("tiny--r4", "tiny--r4--seed7", "tiny--r8--tune-0.1--seed1042"):
        (folder / f"{name}.yaml").touch()
        RunDirectory(name).write_state("finished")
    (finding,) = (f for f in report_study(study)[0].findings if f.code == "dropped-training")
    assert finding.evidence == ("tiny--r4--seed7",)
