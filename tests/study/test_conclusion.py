"""The end of a study: its design is locked with the first verdicts; the gate goes by them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.analysis import made_up

from recipes_lib.analysis.aims import Aims, Margin
from recipes_lib.analysis.claims import Claim, conclude
from recipes_lib.analysis.runs import Arms, load_arms
from recipes_lib.core.errors import ExitCode
from recipes_lib.study import conclusion
from recipes_lib.study.arms import study_folder as folder_of
from recipes_lib.study.conclusion import changes, report_study
from recipes_lib.study.config import Study, load_study
from recipes_lib.study.gate import judge_claims


@pytest.fixture
def measured(tmp_path: Path) -> Arms:
    """Arm r8 is better than r4, two seeds each."""
    folders: dict[str, list[Path]] = {"r4": [], "r8": []}
    for name, rank, right in (("r4", 4, 0.4), ("r8", 8, 0.8)):
        for seed in (42, 43):
            folder = made_up.write_run(tmp_path / "made", f"{name}{seed}", seed=seed, rank=rank)
            made_up.write_values(folder, [float((n + seed) % 10 < 10 * right) for n in range(90)])
            folders[name].append(folder)
    return load_arms(folders)


@pytest.fixture
def file(study_folder: Path, measured: Arms, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a study whose arms are those; `MISSING` says what is not there."""
    monkeypatch.setattr(conclusion, "measured_arms", lambda study: measured)
    monkeypatch.setattr(conclusion, "missing_of", lambda study: [])
    return study_folder / "tiny.yaml"


def locked(study: Study) -> Path:
    return folder_of(study) / "design.json"


def test_the_first_verdicts_lock_the_design(file: Path) -> None:
    study = load_study(file, ["seeds=[42, 43]"])
    first = report_study(study)
    assert not first.conclusion.descriptive and locked(study).is_file()
    assert "r8 is better than r4" in first.conclusion.answer[0]
    again = report_study(study)
    assert again.conclusion.answer == first.conclusion.answer and not list(changes(study))
    assert (first.folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("seeds: [42]", "seeds: [42, 43, 44]", "seeds of r4"),
        ("seeds: [42]", "seeds: [42, 43]\nmargins: {win_rate: 2 points}", "margins"),
        ("seeds: [42]", "seeds: [42, 43]\nprimary: mt_bench/grade", "primary"),
        ("seeds: [42]", "seeds: [42, 43]\noverrides: [train.learning_rate=0.5]", "changed"),
        ("  r8: r8.yaml", "  r8: r8.yaml\n  more: r8.yaml", "added"),
    ],
)
def test_a_design_changed_after_the_verdicts_leaves_none(
    file: Path, old: str, new: str, what: str
) -> None:
    report_study(load_study(file, ["seeds=[42, 43]"]))
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(old, new), encoding="utf-8")
    words = [] if "seeds" in old else ["seeds=[42, 43]"]
    report = report_study(load_study(file, words)).conclusion
    assert report.descriptive.startswith("Exploratory") and what in report.descriptive
    assert all(one.startswith("Exploratory") for one in report.answer)


def test_an_interim_look_has_no_verdict_and_locks_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conclusion, "missing_of", lambda study: ["training tiny--r8"])
    study = load_study(file, ["seeds=[42, 43]"])
    report = report_study(study)
    assert report.missing and report.conclusion.answer[0].startswith("Interim")
    assert not locked(study).exists()
    written = json.loads((folder_of(study) / "comparison.json").read_text())
    assert "recipes study run" in written["cannot_say"][0]


def test_where_a_job_runs_is_no_other_design(file: Path) -> None:
    report_study(load_study(file, ["seeds=[42, 43]"]))
    assert not list(changes(load_study(file, ["seeds=[43, 42]"])))


# ---- The gate ----


def claims(measured: Arms, margin: float | None = None) -> tuple[Claim, ...]:
    margins = {"pass_rate": Margin(margin)} if margin else {}
    return conclude(measured, Aims(margins=margins)).claims


def gated(file: Path, baseline: str, *words: str) -> Study:
    text = file.read_text(encoding="utf-8").partition("evals:")[0].partition("include_base")[0]
    file.write_text(f"{text}include_base: false\nbaseline: {baseline}\n", encoding="utf-8")
    return load_study(file, words)


def test_the_gate_fails_for_a_worse_arm_and_passes_for_a_better_one(
    file: Path, measured: Arms
) -> None:
    found = judge_claims(gated(file, "r8"), claims(measured), [])
    assert found.code == ExitCode.FAILED and [one.arm for one in found.worse] == ["r4"]
    found = judge_claims(gated(file, "r4"), claims(measured), [])
    assert found.code == ExitCode.DONE and found.comparisons == 1


def test_the_gate_is_not_decided_while_results_are_missing(file: Path, measured: Arms) -> None:
    study = gated(file, "r4")
    found = judge_claims(study, claims(measured), ["training tiny--r8"])
    assert found.code == ExitCode.EVALUATION_INCOMPLETE
    assert judge_claims(study, (), []).code == ExitCode.EVALUATION_INCOMPLETE


def test_an_arm_that_is_worse_fails_also_where_a_finding_stops_the_sentence(
    file: Path, measured: Arms
) -> None:
    for arm in measured:
        for log in arm.logs:
            log.answers.__dict__["fingerprint"] = "the same"
    stopped = claims(measured)
    assert stopped[0].verdict == "no verdict"
    found = judge_claims(gated(file, "r8"), stopped, [])
    assert found.code == ExitCode.FAILED
