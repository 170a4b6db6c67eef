"""The end of a study: its design is locked before its first result; the gate goes by verdicts."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from tests.analysis import made_up

from recipes_lib.analysis.aims import Aims, Margin
from recipes_lib.analysis.claims import conclude
from recipes_lib.analysis.readers.ours import load_arms
from recipes_lib.analysis.runs import Arms
from recipes_lib.cli import main
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.files import utc_now, write_json, write_text
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.study import report as reporting
from recipes_lib.study.config import Arm, Study, load_study
from recipes_lib.study.lock import lock_design, read_lock
from recipes_lib.study.progress import evaluations
from recipes_lib.study.report import gate_study, report_study, without_duels
from recipes_lib.study.trainings import study_folder as folder_of
from recipes_lib.study.trainings import study_trainings


@pytest.fixture
def file(study_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a study whose arms are measured: r8 is better than r4, two seeds each."""
    folders: dict[str, list[Path]] = {"r4": [], "r8": []}
    for name, rank, right in (("r4", 4, 0.4), ("r8", 8, 0.8)):
        for seed in (42, 43):
            folder = made_up.write_run(tmp_path / "made", f"{name}{seed}", seed=seed, rank=rank)
            values = [float((n + seed) % 10 < 10 * right) for n in range(90)]
            made_up.write_values(folder, values, name="study--alpaca_eval", metric="win_rate")
            folders[name].append(folder)
    measured = load_arms(folders)
    monkeypatch.setattr(reporting, "measured_arms", lambda study: measured)
    monkeypatch.setattr(reporting.progress, "missing_of", lambda study: [])
    return study_folder / "tiny.yaml"


def train(study: Study) -> None:
    """Leave what trainings leave: finished runs with weights."""
    for training in study_trainings(study):
        run = RunDirectory(training.run)
        run.write_state("finished")
        weights = run.weights(full_finetuning=False) / "adapter_model.safetensors"
        write_text(weights, "weights")


def evaluate(study: Study) -> None:
    """Leave a result in every run, as an evaluation does."""
    for training in study_trainings(study):
        result = RunDirectory(training.run).path / "evals" / "own" / "result.json"
        write_json(result, {"written": utc_now()})


def measure(file: Path) -> Study:
    """Train, lock and evaluate a study, as `recipes study run` does."""
    study = load_study(file)
    train(study)
    lock_design(study)
    evaluate(study)
    return study


def test_before_the_design_is_whole_a_report_compares_no_arms(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(file, ["seeds=[42, 43]"])
    folder = folder_of(study)
    with monkeypatch.context() as early:
        early.setattr(reporting.progress, "missing_of", lambda study: ["training tiny--r8"])
        report, missing = report_study(study)
        assert main(["study", "report", str(file), "--json"]) == ExitCode.DONE
    said = json.loads(capsys.readouterr().out)
    written = json.loads((folder / "comparison.json").read_text())
    for content in (said, written):
        assert content["rows"] == [] and content["scores"]
        assert content["answer"][0].startswith("Interim: 1 training or result still missing")
        assert "recipes study run" in content["cannot_say"][0]
    assert missing and not report.claims and not report.table.rows
    assert "comparison" not in (folder / "report" / "numbers.csv").read_text()
    page = (folder / "report" / "report.html").read_text()
    assert "Interim: 1 training" in page and "0 tests" not in page
    first, _ = report_study(study)
    assert not first.descriptive and "r8 is better than r4" in first.answer[0]
    assert main(["study", "report", str(file), "seeds=[43, 42]"]) == ExitCode.DONE
    text = capsys.readouterr().out
    assert first.answer[0] in text
    assert text.splitlines()[-1].startswith("next: recipes export tiny--r4--seed43 --to ")


def test_a_win_rate_between_two_arms_is_no_value_of_one_arm(tmp_path: Path) -> None:
    folders = {name: [made_up.write_run(tmp_path, name)] for name in ("one", "two")}
    made_up.write_values(folders["one"][0], [1.0] * 20, against="two")
    made_up.write_values(folders["two"][0], [1.0] * 20)
    arms = load_arms(folders)
    assert [log.against for _, log in arms.logs] == ["two", None]
    assert [name for name, _ in without_duels(arms).logs] == ["two"]


def test_a_design_is_locked_anew_until_the_first_result_and_never_after(file: Path) -> None:
    study = load_study(file)
    train(study)
    lock_design(study)
    hashes = [read_lock(study)["hash"]]
    text = file.read_text()
    file.write_text(text.replace("beat rank 4", "beat rank four"))
    lock_design(load_study(file))
    hashes.append(read_lock(study)["hash"])
    assert hashes[0] != hashes[1]
    for training in study_trainings(study):
        assert training.state["design_locks"] == {"tiny": hashes[1]}
    evaluate(study)
    file.write_text(text)
    lock_design(load_study(file))
    assert read_lock(study)["hash"] == hashes[1]
    assert "question changed" in report_study(load_study(file))[0].descriptive


@pytest.mark.parametrize("damage", ["emptied", "halved", "zeros", "a list", "a key gone", "gone"])
def test_a_lock_that_is_lost_or_damaged_beside_results_sets_no_study_free(file, damage) -> None:
    study = measure(file)
    assert not report_study(study)[0].descriptive
    lock = folder_of(study) / "design.json"
    whole = lock.read_text()
    content = json.loads(whole)
    del content["primary"]
    damaged = {
        "emptied": "",
        "halved": whole[: len(whole) // 2],
        "zeros": "\0" * len(whole),
        "a list": "[1]",
        "a key gone": json.dumps(content),
    }
    if damage == "gone":
        lock.unlink()
    else:
        lock.write_text(damaged[damage])
    file.write_text(f"{file.read_text()}primary: mt_bench/grade\n")
    for _ in range(2):  # nor does a second report
        report, _ = report_study(load_study(file))
        assert report.descriptive.startswith("Exploratory") and "design.json" in report.descriptive
    lock.write_text(whole)
    assert "primary changed since" in report_study(load_study(file))[0].descriptive


def test_results_of_another_lock_of_another_study_or_of_before_the_lock_are_seen(file) -> None:
    study = measure(file)
    state = RunDirectory("tiny--r4").state_file
    whole = json.loads(state.read_text())
    result = state.parent / "evals" / "own" / "result.json"
    cases = {
        "tiny--r4 was evaluated under another design.json": {"tiny": "0" * 64},
        "tiny--r4 was evaluated in the study other": {"other": "0" * 64},
        "tiny--r4 was evaluated before the design was locked": {},
    }
    write_json(result, {"written": "2026-01-01T00:00:00+00:00"})
    for words, copies in cases.items():
        write_json(state, {**whole, "design_locks": copies})
        assert words in report_study(study)[0].descriptive
    write_json(result, {"written": "2999-01-01T00:00:00+00:00"})  # by hand, after the lock
    assert not report_study(study)[0].descriptive
    # trained again since
    replaced = state.parents[1] / ".replaced" / "tiny--r4--1764680000000000000"
    shutil.copytree(state.parent, replaced)
    write_json(replaced / "run.json", {**whole, "design_locks": {"tiny": "0" * 64}})
    assert "tiny--r4 was evaluated under another" in report_study(study)[0].descriptive
    write_json(replaced / "run.json", {**whole, "design_locks": [1]})
    assert "tiny--r4 is damaged: design_locks" in report_study(study)[0].descriptive
    # a run of another study, whose name begins alike
    replaced.rename(replaced.with_name("tiny--r4--else--1764680000000000000"))
    assert not report_study(study)[0].descriptive


def test_a_study_of_an_earlier_version_says_why_it_has_no_verdict(file: Path) -> None:
    study = load_study(file)
    train(study)
    evaluate(study)
    report, _ = report_study(study)
    assert "tiny--r4 has results and the study has no design.json" in report.descriptive
    write_json(folder_of(study) / "design.json", {"written": utc_now(), "primary": "win_rate"})
    report, _ = report_study(study)
    assert "written by an earlier version" in report.descriptive


def test_a_design_changed_after_the_verdicts_leaves_none(file: Path, monkeypatch) -> None:
    text = file.read_text().replace("seeds: [42]", "seeds: [42, 43]")
    file.write_text(text)
    measure(file)
    changes_of = {
        "question changed": ("beat rank 4", "win against rank 4"),
        "factors.rank changed": ("[lora.r, lora.lora_alpha]", "[lora]"),
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
    rows = file.with_name("rows.jsonl")
    before = rows.read_text()
    rows.write_text(before.replace("the", "The"))
    report, _ = report_study(load_study(file))
    rows.write_text(before)
    if "data.r4.data 1 rows.jsonl changed" not in report.descriptive:
        wrong.append(("rows", report.descriptive))
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
    code, lines = gate_study(gated(file, "r4"))
    assert code == ExitCode.DONE and lines == ["passed: no arm is shown to be worse than r4"]
    for metric, passes in (("win_rate", True), ("pass_rate", False)):  # it holds to its margin
        aims = Aims(margins={metric: Margin(0.1)})
        held = dataclasses.replace(gated(file, "r4"), aims=aims)
        assert (gate_study(held)[0] == ExitCode.DONE) is passes
    study = gated(file, "r8")
    code, lines = gate_study(study)
    assert code == ExitCode.FAILED and "r4" in lines[0]
    monkeypatch.setattr(reporting.progress, "missing_of", lambda study: ["training tiny--r8"])
    code, lines = gate_study(study)
    assert code == ExitCode.EVALUATION_INCOMPLETE and "next: recipes study run" in lines[-1]
    monkeypatch.setattr(reporting.progress, "missing_of", lambda study: [])
    for arm in reporting.measured_arms(study):  # also where a finding stops the sentence
        for log in arm.logs:
            log.answers.__dict__["fingerprint"] = "the same"
    assert reporting.conclude_study(study)[2].claims[0].verdict == "no verdict"
    assert gate_study(study)[0] == ExitCode.FAILED
    # everything is measured and nothing can be compared: no command would help
    monkeypatch.setattr(reporting, "measured_arms", lambda study: Arms({}))
    code, lines = gate_study(study)
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
