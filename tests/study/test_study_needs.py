"""What a study's evaluations need is looked for before the first training: each need names its line
and what to do, and rows that hold questions of an eval are refused.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.evals.faulty_server import FaultyServer
from tests.study.study_files import TOO_LONG, leak_questions

from recipes_lib.study.run import StudyRunner

Recipes = Callable[..., tuple[int, str, str]]


@pytest.fixture
def leaking(study_folder: Path) -> Path:
    """The tiny study, five questions of which stand in lines 3 to 7 of the rows."""
    leak_questions(study_folder)
    return study_folder / "tiny.yaml"


def test_no_verb_of_a_study_accepts_rows_that_hold_its_questions(
    leaking: Path, recipes: Recipes, tmp_path: Path
) -> None:
    for verb in ("study plan", "study run", "check", "plan"):
        code, out, err = recipes(*verb.split(), leaking)
        assert code == 2, (verb, out, err)
        assert "rows of r4, r8: 5 of 8 questions of study--alpaca_eval" in out + err
        assert "rows.jsonl:3: question " in err and TOO_LONG[:20] in err
    assert not list((tmp_path / "runs").glob("tiny--*"))


def test_held_out_loss_without_rows_held_out_is_refused_before_the_training(
    study_folder: Path, recipes: Recipes, tmp_path: Path
) -> None:
    """Issue: a study with held-out loss and no test split passed check and plan, and trained."""
    study = study_folder / "tiny.yaml"
    (study_folder / "heldout.yaml").write_text(
        "# yaml-language-server: $schema=eval.schema.json\n"
        "suite: {name: heldout_loss}\ndata: {questions: test}\n"
    )
    study.write_text(study.read_text().partition("evals:")[0] + "evals: [heldout.yaml]\n")
    for verb in ("study plan", "study run", "check"):
        code, out, err = recipes(*verb.split(), study)
        assert code == 2 and "tiny.yaml:9" in out + err, (verb, out, err)
        assert "no test rows are held out in r4, r8" in out + err
    assert not list((tmp_path / "runs").glob("tiny--*"))


def test_what_a_study_needs_and_is_not_there_is_refused_before_the_training(
    study_folder: Path, recipes: Recipes, tmp_path: Path
) -> None:
    alpaca, judge = study_folder / "alpaca_eval.yaml", study_folder / "judge.yaml"
    recipe = study_folder / "r4.yaml"
    cases = [
        (alpaca, "judge.yaml", "nowhere.yaml", "alpaca_eval.yaml:", 2),
        (alpaca, "questions.json", "nowhere.json", "alpaca_eval.yaml:", 2),
        (judge, "helpfulness.txt", "nowhere.txt", "nowhere.txt", 2),
        (recipe, "rows.jsonl", "nowhere.jsonl", "r4.yaml:3", 4),
        (recipe, "logging_steps: 1", "report_to: swanlab", "is not installed", 5),
    ]
    wrong = []
    for file, old, new, place, expected in cases:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        for verb in ("study plan", "study run", *["check"] * (expected != 5)):
            code, out, err = recipes(*verb.split(), study_folder / "tiny.yaml")
            if code != expected or new not in err or place not in err:
                wrong.append((verb, new, code, out, err))
        file.write_text(text)
    assert not wrong and not list((tmp_path / "runs").glob("tiny--*"))


def test_a_judge_that_does_not_answer_is_one_warning_of_run_and_not_of_plan(
    study_folder: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StudyRunner, "_steps", lambda self: None)
    study, file = study_folder / "tiny.yaml", study_folder / "judge.yaml"
    text = file.read_text().replace("logits", "generate")
    text = text.replace("  dtype: float32\n", "").replace("max_context_tokens: 1024", "{}")
    with FaultyServer() as server:
        for url, expected in ((server.url, 0), ("http://127.0.0.1:9/v1", 1)):
            file.write_text(text.format(f"engine: openai\n  base_url: {url}"))
            code, _, err = recipes("study", "run", study)
            assert code == 0 and err.count("does not answer") == expected, err
    assert "judge.yaml: http://127.0.0.1:9/v1" in err
    assert "does not answer" not in recipes("study", "plan", study)[2]


def test_a_study_edited_while_its_job_waits_is_refused_in_words(
    study_folder: Path, recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StudyRunner, "_steps", lambda self: None)
    file = study_folder / "tiny.yaml"
    assert recipes("launch", file, "--profile", "local-sandbox", "--prepare")[0] == 0
    script = (tmp_path / "runs/tiny/slurm/eval.sbatch").read_text()
    (line,) = (line for line in script.splitlines() if "RECIPES_LAUNCHED_STUDY" in line)
    monkeypatch.setenv("RECIPES_LAUNCHED_STUDY", shlex.split(line)[1].partition("=")[2])
    edits = {
        "evals.study--mt_bench changed": (
            "mt_bench.yaml",
            "max_new_tokens: 12",
            "max_new_tokens: 9",
        ),
        "evals.study--lm_eval removed": ("tiny.yaml", ", lm_eval.yaml", ""),
        "margins.alpaca_eval/win_rate added": (
            "tiny.yaml",
            "seeds:",
            "margins: {alpaca_eval/win_rate: 2 points}\nseeds:",
        ),
        "primary changed": ("tiny.yaml", "seeds:", "primary: mt_bench/grade\nseeds:"),
        "factors.rank changed": ("tiny.yaml", "[lora.r, ", "[lora.r, lora.lora_dropout, "),
    }
    wrong = []
    for what, (name, old, new) in edits.items():
        edited = study_folder / name
        text = edited.read_text()
        edited.write_text(text.replace(old, new))
        code, _, err = recipes("study", "run", file, "--no-train")
        if code != 2 or "edited after it was launched" not in err or what not in err:
            wrong.append((what, code, err))
        edited.write_text(text)
    assert not wrong
    assert recipes("study", "run", file, "--no-train")[0] == 0
