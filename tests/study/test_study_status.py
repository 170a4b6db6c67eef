"""`recipes study plan` and `status`: short, counted, and without touching or importing anything."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.study.study_files import TOO_LONG, leak_questions

from recipes_lib.core.errors import ExitCode
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.stats import SPREADS, compare, planned_effect
from recipes_lib.study.config import load_study
from recipes_lib.study.progress import base_recipe, base_run

Recipes = Callable[..., tuple[int, str, str]]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_plan_counts_trainings_answers_and_judge_requests_in_fifteen_lines(
    study_folder: Path, recipes: Recipes
) -> None:
    before = tree(study_folder.parent)
    code, out, err = recipes("study", "plan", study_folder / "tiny.yaml")
    assert recipes("study", "status", study_folder / "tiny.yaml")[0] == ExitCode.DONE
    assert tree(study_folder.parent) == before  # nothing is touched
    assert code == ExitCode.DONE and len(out.splitlines()) <= 15, out + err
    # 3 models; 8 alpaca questions and 4 of mt_bench with two turns each
    assert "trainings: 2 of 2 to do" in out and f"answers: {3 * (8 + 8)}\n" in out
    # against the reference (3 x 8 x 2 orders), with the base (2 x 8 x 2), grades of 3 x 8 turns
    assert f"judge requests: {48 + 32 + 24} and up to 8 of the judge's audit\n" in out
    # the base meets every seed head to head, 0 too
    out = recipes("study", "plan", study_folder / "tiny.yaml", "seeds=[0, 1]")[1]
    assert f"judge requests: {5 * 16 + 4 * 16 + 5 * 8} and up to 8 of" in out
    # questions of known sets before they are fetched: two arms of three seeds, and the base
    out = recipes("study", "plan", "lora-rank")[1]
    assert f"answers: {7 * (805 + 160):,}\n" in out
    assert f"judge requests: {7 * 805 * 2 + 6 * 805 * 2 + 7 * 160:,} and up to 200 of" in out
    assert "find 13.0 points of alpaca_eval/win_rate" in out
    # no difference above 100 points is promised
    (study_folder / "q.jsonl").write_text('{"prompt": "Hi", "check": "exact", "expected": "a"}\n')
    (study_folder / "q.yaml").write_text("suite: {name: checks}\ndata: {questions: q.jsonl}\n")
    file = study_folder / "tiny.yaml"
    file.write_text(file.read_text().replace("evals: [", "primary: q/pass_rate\nevals: [q.yaml, "))
    assert "no difference, however large, of study--q" in recipes("study", "plan", file)[1]


def test_the_status_shows_what_is_not_done_and_why(study_folder: Path, recipes: Recipes) -> None:
    stopped, failed = RunDirectory("tiny--r4"), RunDirectory("tiny--r8")
    stopped.write_state("stopped")
    failed.write_state("failed", exit_code=3, error="loss is nan")
    _, out, _ = recipes("study", "status", study_folder / "tiny.yaml", "--json")
    states = json.loads(out)["states"]
    assert states["training tiny--r4"] == "stopped"
    assert states["training tiny--r8"] == "failed: loss is nan"
    assert states["study--mt_bench of tiny--r8"] == "missing"


def test_a_base_is_known_by_its_weights_precision_and_format(study_folder: Path) -> None:
    """Issue: one that was first asked with another attention was looked for in vain, for ever."""
    study = load_study(study_folder / "tiny.yaml")
    sections, base = base_recipe(study).to_dict(), RunDirectory("base--tiny--1")
    state = {name: sections[name] for name in ("model", "data", "quantization")}
    cases = {
        ("model", "attn_implementation", "eager"): base.name,
        ("model", "dtype", "bfloat16"): "base",
        ("model", "name_or_path", "other"): "base",
        ("data", "prompt_format", "dolly"): "base",
        ("data", "system_prompt", "Be brief."): "base",
    }
    found = {}
    for section, key, value in cases:
        stand_in = {**state, section: {**state[section], key: value}}
        base.write_state("finished", stand_in=stand_in)
        found[section, key, value] = base_run(study)
    assert found == cases


def test_no_verb_of_a_study_accepts_rows_that_hold_its_questions(study_folder, recipes, tmp_path):
    leak_questions(study_folder)
    for verb in ("study plan", "study run", "check"):
        code, out, err = recipes(*verb.split(), study_folder / "tiny.yaml")
        assert code == 2, (verb, out, err)
        assert "5 of 8 questions of study--alpaca_eval" in out + err
        assert "rows.jsonl:3: question " in err and TOO_LONG[:20] in err
    assert not list((tmp_path / "runs").glob("tiny--*"))


def test_what_a_study_needs_and_is_not_there_is_refused_before_the_training(
    study_folder: Path, recipes: Recipes, tmp_path: Path
) -> None:
    heldout = "suite: {name: heldout_loss}\ndata: {questions: test}\n"
    (study_folder / "heldout.yaml").write_text(heldout)
    (study_folder / "bare.json").write_text('[{"instruction": "Why?"}]')
    cases = [
        ("alpaca_eval", "judge.yaml", "nowhere.yaml", r"alpaca_eval.yaml:\d+: .*nowhere.yaml", 2),
        ("alpaca_eval", "questions.json", "nowhere.json", r"alpaca_eval.yaml:.*nowhere.json", 2),
        ("judge", "helpfulness.txt", "nowhere.txt", "nowhere.txt", 2),
        (
            "alpaca_eval",
            "questions.json",
            "question.jsonl",
            "question.jsonl:1: a question needs",
            4,
        ),
        ("r4", "rows.jsonl", "nowhere.jsonl", r"r4.yaml:3: .*nowhere.jsonl", 4),
        ("tiny", "lm_eval.yaml", "heldout.yaml", "tiny.yaml:9: .*no test rows are held out", 2),
        ("alpaca_eval", "questions.json", "bare.json", "no reference output: 0", 2),
        ("alpaca_eval", "pairs: 1", "pairs: 1, against: a/b", r"eval.yaml:6: .* no run 'a/b'", 2),
    ]
    wrong = []
    for name, old, new, words, expected in cases:
        file = study_folder / f"{name}.yaml"
        text = file.read_text()
        file.write_text(text.replace(old, new))
        for verb in ("study plan", "study run", "check"):
            code, out, err = recipes(*verb.split(), study_folder / "tiny.yaml")
            if code != expected or not re.search(words, out + err):
                wrong.append((verb, new, code, out, err))
        file.write_text(text)
    text = "suite: {name: lm_eval, tasks: [arc_easy]}\ndata: {include_path: .}\n"
    own = f"{text}generation: {{trust_remote_code: true}}\n"  # and nobody allowed it
    (study_folder / "lm_eval.yaml").write_text(own)
    assert "task files are code" in recipes("study", "run", study_folder / "tiny.yaml")[2]
    assert not wrong and not list((tmp_path / "runs").glob("tiny--*"))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_difference_of_a_plan_is_found_in_four_of_five_studies(seeds: int) -> None:
    (variance, spread), rng = SPREADS["win_rate"], np.random.default_rng(0)
    effect, hits, studies = planned_effect("win_rate", 400, seeds), 0, 400
    for _ in range(studies):
        own = rng.normal(0, np.sqrt(variance / 2), 400)
        new = rng.normal(0, np.sqrt(variance / 2), (seeds, 400))
        moved = rng.normal(0, spread * np.sqrt(2) * (seeds > 1), (seeds, 1))
        result = compare(effect + own + new + moved, np.zeros((1, 400)), range(400), None)
        hits += result.p <= 0.05
    assert 0.7 <= hits / studies <= 0.9
