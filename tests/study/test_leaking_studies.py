"""Trainings on what is evaluated: refused before they start, and told by every result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes_lib.core.json_files import read_object
from recipes_lib.train import main as train

Recipes = Callable[..., tuple[int, str, str]]
TOO_LONG = (
    "My neighbour's apple tree hangs over our fence and drops its fruit on the path every autumn;"
    " may I pick what hangs on my side, and what should I say to him first?"
)


@pytest.fixture
def leaking(study_folder: Path) -> Path:
    """The tiny study, five questions of which stand in lines 3 to 7 of the rows."""
    questions = json.loads((study_folder / "questions.json").read_text())
    questions[0]["instruction"] = TOO_LONG
    (study_folder / "questions.json").write_text(json.dumps(questions))
    rows = (study_folder / "rows.jsonl").read_text().splitlines()
    for line, question in enumerate(questions[:5], 2):
        row = {"instruction": question["instruction"], "context": "", "response": "So."}
        rows[line] = json.dumps(row | {"category": "leaked"})
    (study_folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    for name in ("r4", "r8"):  # every row trains, so that all five do
        text = (study_folder / f"{name}.yaml").read_text()
        text = text.replace("split: {validation: 0.1}, max_examples: 60", "split: {method: none}")
        text = text.replace("eval_strategy: steps", "eval_strategy: 'no'")
        (study_folder / f"{name}.yaml").write_text(text)
    return study_folder / "tiny.yaml"


@pytest.mark.parametrize("verb", ["study plan", "study diff", "study run", "check", "plan"])
def test_no_verb_of_a_study_accepts_rows_that_hold_its_questions(
    leaking: Path, recipes: Recipes, tmp_path: Path, verb: str
) -> None:
    code, out, err = recipes(*verb.split(), leaking)
    assert code == 2, (out, err)
    assert "rows of r4 and r8: 5 of 8 questions of study--alpaca_eval" in out + err
    assert "rows.jsonl:3: question " in err and "rows.jsonl:7: question " in err
    assert "(100% of its 13-grams): My neighbour's apple tree" in err
    assert not list((tmp_path / "runs").glob("tiny--*"))


def test_tuning_alone_is_refused_as_training_is(
    leaking: Path, recipes: Recipes, tmp_path: Path
) -> None:
    for name in ("r4", "r8"):
        file = leaking.with_name(f"{name}.yaml")
        text = file.read_text().replace("split: {method: none}", "split: {validation: 0.1}")
        file.write_text(text.replace("eval_strategy: 'no'", "eval_strategy: steps"))
    leaking.write_text(leaking.read_text() + "tune: {train.learning_rate: [0.001, 0.01]}\n")
    code, out, err = recipes("study", "run", leaking, "--only", "tune")
    assert code == 2, (out, err)
    assert "rows of r4 and r8: " in err and "questions of study--alpaca_eval" in err
    assert not list((tmp_path / "runs").glob("tiny--*"))


def test_a_study_is_searched_without_torch(leaking: Path) -> None:
    code = (
        "import sys; from recipes_lib.cli import main; code = main(sys.argv[1:]);"
        " assert code == 2 and 'torch' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, "study", "diff", leaking], check=True)


def test_recipes_data_names_every_row_that_holds_a_question_of_an_eval(
    tiny_recipe: Path, tmp_path: Path, recipes: Recipes
) -> None:
    rows = tmp_path / "mine.jsonl"
    texts = [f"Is {number} a prime number?" for number in range(20)]
    lines = ({"instruction": text, "response": f"It is {text}"} for text in texts)
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    checks = tmp_path / "checks.jsonl"
    mine = tmp_path / "mine.yaml"
    mine.write_text("suite: {name: checks}\ndata: {questions: checks.jsonl}\n")
    words = [tiny_recipe, f"data.source={rows}", "data.split.method=none", "--against", mine]
    words += ["train.eval_strategy='no'"]
    checks.write_text(json.dumps({"prompt": "3?", "check": "exact", "expected": "a"}) + "\n")
    code, out, err = recipes("data", *words)
    name = f"{tmp_path.name}--mine"
    assert code == 0 and f"none of the 1 questions of {name} is in the 20 training" in out, err
    checks.write_text(json.dumps({"prompt": texts[4], "check": "exact", "expected": "a"}) + "\n")
    code, out, err = recipes("data", *words)
    assert code == 2 and f"1 of 1 questions of {name}" in err, err
    assert "mine.jsonl:5: question 1 (whole): Is 4 a prime number?" in err


def test_a_result_says_what_the_training_rows_hold_and_no_claim_is_made_about_that_arm(
    tiny_recipe: Path, tmp_path: Path, recipes: Recipes
) -> None:
    source = Path(__file__).resolve().parents[2] / "recipes/quickstart/data/instructions.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()[:40]]
    for name, texts in {"clean": [], "dirty": [TOO_LONG]}.items():
        more = [{"instruction": text, "context": "", "response": "So."} for text in texts]
        lines = (json.dumps(row) + "\n" for row in [*rows, *more])
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        words = [f"data.source={tmp_path}/{name}.jsonl", "data.split.method=none"]
        words += ["train.eval_strategy='no'", "train.max_steps=1", f"run.name={name}"]
        assert train([str(tiny_recipe), *words]) == 0
    prompts = [TOO_LONG, *(f"What comes after {number}?" for number in range(7))]
    checks = ({"prompt": text, "check": "min_words", "expected": 0} for text in prompts)
    (tmp_path / "checks.jsonl").write_text("".join(json.dumps(one) + "\n" for one in checks))
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "suite: {name: checks}\ndata: {questions: checks.jsonl}\ngeneration: {max_new_tokens: 4}\n"
    )
    (tmp_path / "clean.jsonl").rename(tmp_path / "gone.jsonl")
    code, out, err = recipes("eval", mine, "clean", "dirty")
    assert code == 0, err
    assert "! dirty: 1 of 8 questions of" in out
    place = f"evals/{tmp_path.name}--mine/result.json"
    told = read_object(tmp_path / "runs/dirty" / place)["leaks"]
    assert told["leaked_rows"] == 1 and told["rows"] == 41
    assert told["found"][0]["place"].endswith("dirty.jsonl:41")
    assert "no such file" in read_object(tmp_path / "runs/clean" / place)["leaks"]["why"]
    code, out, err = recipes("compare", "clean", "dirty")
    assert "error: dirty was trained on what it was asked: 1 of 8" in out, err
    assert "No claim about dirty and clean on answers that pass: dirty was trained on what" in out
    assert "warning: Whether training rows hold questions of" in out
    (tmp_path / "gone.jsonl").rename(tmp_path / "clean.jsonl")
    assert recipes("eval", mine, "clean")[0] == 0
    assert read_object(tmp_path / "runs/clean" / place)["leaks"]["rows"] == 40
    (tmp_path / "clean.jsonl").write_text((tmp_path / "dirty.jsonl").read_text())
    assert recipes("eval", mine, "clean")[0] == 0  # the same rows are there, and one more
    assert read_object(tmp_path / "runs/clean" / place)["leaks"]["rows"] == 40
