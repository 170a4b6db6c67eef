"""Every look at a study's results is written down, and what was added after one is not tested as if
nobody had looked.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.cli import main
from recipes_lib.compare.design import load_study
from recipes_lib.compare.findings import found
from recipes_lib.core.errors import RecipesError
from recipes_lib.study import conclusion
from recipes_lib.study import ledger as ledger_module
from recipes_lib.study.arms import arm_run
from recipes_lib.study.conclusion import Conclusion, conclude
from recipes_lib.study.steps import build_graph

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import synthetic_runs

LEFT = "evals: [alpaca_eval.yaml, mt_bench.yaml, lm_eval.yaml]"


@pytest.fixture
def study(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny study with one eval and no base; its runs are made up."""
    # Copies, figures and TeX are not what these tests are about, and take seconds.
    monkeypatch.setattr(conclusion, "relabelled", lambda rows, judge: None)
    monkeypatch.setattr("recipes_lib.compare.relabelling.relabelled", lambda rows, judge: None)
    monkeypatch.setattr("recipes_lib.report.documents.draw_comparison", lambda content: [])
    monkeypatch.setenv("PATH", "")
    file = study_folder / "tiny.yaml"
    change(file, LEFT, "evals: [lm_eval.yaml]\ninclude_base: false")
    return file


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def measured(
    file: Path, *without: str, skill: Mapping[str, float] | None = None, n: int = 200
) -> None:
    """Make up the runs of a study: trained, evaluated, and recorded as done.

    Args:
        without: runs that are not there yet.
        skill: share of right answers by arm, 0.5 and 0.6 where it is not said.
    """
    study = load_study(file)
    graph = build_graph(study)
    for number, arm in enumerate(study.arms):
        for seed in arm.seeds:
            name = arm_run(study, arm, seed)
            if name in without:
                continue
            runs, rank = file.parents[1] / "runs", 4 * (number + 1)
            folder = synthetic_runs.write_run(runs, name, seed=seed, rank=rank)
            right = (skill or {}).get(arm.name, 0.5 + 0.1 * number)
            synthetic_runs.write_lm_eval(folder, n, skill=right + (seed - 42) / 50)
            ours = folder / "evals" / "study--lm_eval"
            shutil.rmtree(ours, ignore_errors=True)
            (folder / "evals" / "lm_eval").rename(ours)
            for step in graph:
                if step.run == name:
                    graph.finish(step, f"{name} {n} {right}", [])


def concluded(file: Path) -> Conclusion:
    study = load_study(file)
    return conclude(study, build_graph(study))


def entries(file: Path) -> list[dict[str, Any]]:
    lines = (file.parents[1] / "runs" / file.stem / "ledger.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_study_that_is_looked_at_once_has_its_p_and_printing_it_again_is_no_look(
    study: Path,
) -> None:
    measured(study)
    first = concluded(study)
    (row,) = first.comparison.rows
    assert row.tested and row.p_holm == row.tested.p and row.level_share == 1
    assert first.comparison.looks
    assert first.comparison.looks.sentence == "The results of this study were looked at once."
    before = {path.name: path.read_bytes() for path in first.folder.iterdir() if path.is_file()}
    again = concluded(study)
    assert again.comparison == first.comparison and len(entries(study)) == 1
    assert before == {
        path.name: path.read_bytes() for path in first.folder.iterdir() if path.is_file()
    }


def test_looks_before_all_seeds_are_there_leave_the_last_planned_one_nearly_everything(
    study: Path,
) -> None:
    change(study, "seeds: [42]", "seeds: [42, 43, 44]")
    shares, numbers = [], []
    late = [f"tiny--{arm}--seed{seed}" for seed in (44, 43) for arm in ("r8", "r4")]
    for missing in (4, 2, 0):
        measured(study, *late[:missing])
        comparison = concluded(study).comparison
        (row,) = comparison.rows
        assert row.tested and row.tested.p is not None and row.p_holm is not None
        assert row.p_holm == pytest.approx(min(1, row.tested.p / row.level_share))
        assert ("p divided by" in " ".join(row.flags)) == (row.level_share < 1)
        shares.append(row.level_share)
        numbers.append(comparison.looks.sentence if comparison.looks else "")
    assert shares == pytest.approx([0.1, 0.1 / 3, 1 - 0.1 - 0.1 / 3])
    assert (
        "looked at 3 times. After look 1: added seed 43 of r4 and r8. After look 2: added"
        in (numbers[-1])
    )


def test_what_is_added_after_the_last_planned_look_is_shown_and_not_claimed(study: Path) -> None:
    measured(study)
    assert concluded(study).comparison.rows[0].level_share == 1
    change(study, "seeds: [42]", "seeds: [42, 43]")
    measured(study)
    comparison = concluded(study).comparison
    (row,) = comparison.rows
    assert row.level_share == 0 and row.p_holm == 1 and not row.claimed
    assert row.sentence.endswith(
        "the whole 5% for r8 and r4 was used at look 1 (1 seed, 200 questions), and these are other"
        " results (2 seeds, 200 questions)."
    )
    assert comparison.looks and comparison.looks.changes == (
        "After look 1: added seed 43 of r4 and r8",
    )


def test_questions_that_are_added_count_as_seeds_do(study: Path) -> None:
    measured(study)
    concluded(study)
    measured(study, n=400)
    comparison = concluded(study).comparison
    assert comparison.rows[0].level_share == 0
    assert comparison.looks and comparison.looks.changes == (
        "After look 1: study--lm_eval has 400 questions instead of 200",
    )


def test_a_study_that_planned_two_looks_may_add_once(study: Path) -> None:
    change(study, "seeds: [42]", "seeds: [42]\nlooks: 2")
    measured(study)
    assert concluded(study).comparison.rows[0].level_share == 0.1
    change(study, "seeds: [42]\nlooks: 2", "seeds: [42, 43]\nlooks: 9")  # too late for more
    measured(study)
    assert concluded(study).comparison.rows[0].level_share == 0.9
    change(study, "seeds: [42, 43]", "seeds: [42, 43, 44]")
    measured(study)
    assert concluded(study).comparison.rows[0].level_share == 0


def test_arms_that_come_and_go_are_listed_and_leave_the_others_alone(study: Path) -> None:
    measured(study)
    concluded(study)
    third = "  r16: {recipe: r8.yaml, overrides: [lora.r=16, lora.lora_alpha=32]}\n"
    change(study, "  r8: r8.yaml\n", f"  r8: r8.yaml\n{third}")
    measured(study)
    comparison = concluded(study).comparison
    assert [row.level_share for row in comparison.rows] == [1, 1, 1]
    change(study, third, "")
    comparison = concluded(study).comparison
    assert comparison.looks and comparison.looks.number == 2
    assert comparison.looks.changes == (
        "After look 1: added arm r16",
        "After look 2: removed arm r16",
    )


def test_a_look_whose_claim_an_error_stopped_leaves_the_last_one_to_its_repair(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(study)
    with monkeypatch.context() as broken:
        error = found("self-judged", [], eval="study--lm_eval")
        broken.setattr(conclusion, "check_validity", lambda *args: [error])
        assert not concluded(study).comparison.rows[0].claimed
    assert concluded(study).comparison.rows[0].level_share == 1  # of the same results
    (study.parents[1] / "runs" / "tiny" / "ledger.jsonl").unlink()
    (study.parents[1] / "runs" / "tiny" / "steps" / "statistics" / "ledger.json").unlink()
    with monkeypatch.context() as broken:
        broken.setattr(conclusion, "check_validity", lambda *args: [error])
        concluded(study)
    measured(study, skill={"r8": 0.7})
    assert concluded(study).comparison.rows[0].level_share == 0.9


def test_status_says_how_often_results_were_looked_at(
    study: Path, recipes: Callable[..., tuple[int, str, str]]
) -> None:
    measured(study)
    assert "look" not in recipes("study", "status", str(study))[1]
    for skill, said in ((0.6, "1 look"), (0.6, "1 look"), (0.7, "2 looks")):
        measured(study, skill={"r8": skill})
        concluded(study)
        assert f"; {said} at results" in recipes("study", "status", str(study))[1]
    assert json.loads(recipes("study", "status", str(study), "--json")[1])["looks"] == 2
    (study.parents[1] / "runs" / "tiny" / "ledger.jsonl").unlink()
    assert "; the ledger was changed, so how often" in recipes("study", "status", str(study))[1]
    assert json.loads(recipes("study", "status", str(study), "--json")[1])["looks"] is None


def test_looks_are_planned_on_the_command_line_too(
    study: Path, recipes: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = recipes("study", "status", str(study), "looks=2")
    assert (code, err) == (0, "")
    assert "looks must be" in recipes("study", "status", str(study), "looks=0")[2]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda lines: [lines[0].replace('"seeds": 1', '"seeds": 2'), lines[1]], "line 2 does not"),
        (lambda lines: lines[:1], "1 of its 2 lines are there"),
        (lambda lines: lines[1:], "line 1 does not follow from the one before it"),
        (
            lambda lines: [lines[0], lines[1].replace('"at": "2', '"at": "1')],
            "line 2 is not what was",
        ),
        (lambda lines: [lines[0], "{}"], "line 2 is damaged"),
        (lambda lines: None, "0 of its 2 lines are there"),
    ],
    ids=["changed", "cut", "first line gone", "last line changed", "damaged", "deleted"],
)
def test_a_ledger_that_was_changed_stops_every_claim(study: Path, harm: Any, said: str) -> None:
    change(study, "seeds: [42]", "seeds: [42, 43]")
    measured(study, "tiny--r8--seed43")
    concluded(study)
    measured(study)
    assert concluded(study).comparison.rows[0].claimed
    file = study.parents[1] / "runs" / "tiny" / "ledger.jsonl"
    lines = harm(file.read_text().splitlines())
    file.unlink()
    if lines is not None:
        file.write_text("".join(f"{line}\n" for line in lines))
    comparison = concluded(study).comparison
    codes = [one.code for one in comparison.findings]
    assert "ledger-damaged" in codes and not any(row.claimed for row in comparison.rows)
    assert f"The ledger of the looks at this study was changed: {said}" in "".join(
        one.title for one in comparison.findings
    )
    kept = file.read_text().splitlines() if file.is_file() else None
    assert kept == lines  # what happened to it stays to be seen


def test_a_line_that_a_crash_cut_was_seen_by_nobody(study: Path) -> None:
    measured(study)
    concluded(study)
    file = study.parents[1] / "runs" / "tiny" / "ledger.jsonl"
    whole = file.read_bytes()
    change(study, "seeds: [42]", "seeds: [42, 43]")
    measured(study)
    file.write_bytes(whole + whole[: len(whole) // 2])
    comparison = concluded(study).comparison
    assert comparison.looks and comparison.looks.number == 2
    assert [entry["previous"] == "" for entry in entries(study)] == [True, False]
    assert "ledger-damaged" not in [one.code for one in comparison.findings]


def test_two_that_look_at_once_both_stand_in_the_ledger(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(study, "seeds: [42]", "seeds: [42, 43]")
    measured(study, "tiny--r8--seed43", "tiny--r4--seed43")
    weigh, other = ledger_module.Ledger.weigh, []

    def meanwhile(self: Any, rows: Any) -> Any:
        found = weigh(self, rows)
        if not other:
            other.append(True)
            assert main(["compare", "tiny--r8", "tiny--r4"]) == 0
        return found

    monkeypatch.setattr(ledger_module.Ledger, "weigh", meanwhile)
    comparison = concluded(study).comparison
    assert [entry["by"] for entry in entries(study)] == ["compare", "study report"]
    assert comparison.looks and comparison.looks.number == 1  # of the same results
    program = (
        "import sys; from recipes_lib.study.ledger import *; from pathlib import Path\n"
        "from recipes_lib.compare.measurements import Measurements\n"
        "class Fixed(Ledger):\n"
        "    def _entry(self, comparison):\n"
        "        row = {key: sys.argv[2] + key for key in ('comparison', 'results', 'plan')}\n"
        "        last = self.hashes[-1] if self.hashes else ''\n"
        "        row |= {'results': comparison, 'complete': False}\n"
        "        known = {'format_version': 1, 'previous': last, 'planned': None,"
        " 'arms': {}, 'evals': {}}\n"
        "        return {**known, 'comparisons': [row]}\n"
        "ledger = Fixed(Path(sys.argv[1]), Viewed('x', Measurements({})))\n"
        "for n in range(20):\n"
        "    while not ledger._append(ledger._entry(str(n))): ledger.read()\n"
    )
    folder = study.parents[1] / "runs" / "many"
    commands = [[sys.executable, "-c", program, str(folder), str(who)] for who in range(3)]
    running = [subprocess.Popen(command) for command in commands]
    assert [one.wait(timeout=120) for one in running] == [0, 0, 0]
    whole = ledger_module.Ledger(folder, ledger_module.Viewed("x", comparison_of_nothing()))
    assert not whole.damage and len(whole.entries) == 60


def comparison_of_nothing() -> Any:
    return ledger_module.Measurements({})


def test_a_report_that_cannot_be_recorded_prints_and_says_so(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(study)
    folder = study.parents[1] / "runs" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def refuse(*args: object, **options: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(ledger_module, "FileLock", refuse)
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert main(["study", "report", str(study)]) == 0
    said = capsys.readouterr().out
    assert "r8 against r4, 1 comparison" in said
    assert "This look could not be recorded: Read-only file system." in said
    assert "is read-only: no report was written" in said
    assert main(["study", "gate", str(study), "baseline=r4"]) == 0
    assert "this look could not be recorded: Read-only" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_runs_that_are_compared_by_name_are_looked_at_too(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(study, "seeds: [42]", "seeds: [42, 43]")
    measured(study, "tiny--r8--seed43", "tiny--r4--seed43")
    assert main(["compare", "tiny--r8", "tiny--r4"]) == 0
    said = capsys.readouterr().out
    assert "p divided by 0.1, the part of 5% that this look has" in said
    measured(study)
    assert concluded(study).comparison.rows[0].level_share == 0.9
    capsys.readouterr()
    assert main(["compare", "tiny--r8--seed43", "tiny--r4--seed43"]) == 0
    assert "and these are other results (1 seed, 200 questions)" in capsys.readouterr().out
    assert [entry["by"] for entry in entries(study)] == ["compare", "study report", "compare"]


def test_a_gate_is_a_look_and_keeps_its_level(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, right in enumerate((0.5, 0.3), 1):
        measured(study, skill={"r4": 0.5, "r8": right})
        code = main(["study", "gate", str(study), "baseline=r4"])
        assert code == number - 1, capsys.readouterr().out
        assert len(entries(study)) == number


def test_every_form_of_the_report_says_how_often_it_was_looked_at(study: Path) -> None:
    measured(study)
    concluded(study)
    change(study, "seeds: [42]", "seeds: [42, 43]")
    measured(study)
    folder = concluded(study).folder
    for name in ("report.html", "report.md", "report.tex"):
        text = (folder / name).read_text(encoding="utf-8").replace("\\", "")
        assert "looked at 2 times. After look 1: added seed 43 of r4 and r8." in text, name
    numbers = json.loads((folder / "numbers.json").read_text())
    assert numbers["looks"]["number"] == 2
    assert [one["value"] for one in numbers["numbers"] if one["kind"] == "looks"] == [2]


def test_planned_looks_are_a_whole_number(study: Path) -> None:
    change(study, "seeds: [42]", "seeds: [42]\nlooks: 0")
    with pytest.raises(RecipesError, match="looks"):
        load_study(study)
