"""Several eval recipes in one process: each base and each judge loaded once, banners carried, code
of a model only when allowed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.generation.conftest import (
    judge_file,  # noqa: F401
    long_tiny_model_dir,  # noqa: F401
    make_run,  # noqa: F401
    runs_folder,  # noqa: F401
)  # noqa: F401, RUF100
from tests.results import results_of

from recipes_lib.cli import main
from recipes_lib.core.errors import RecipeError
from recipes_lib.eval_files import read_evals
from recipes_lib.eval_recipe import load_eval
from recipes_lib.evaluate import evaluate_all, split_words
from recipes_lib.generation.targets import find_targets

PROJECT = Path(__file__).resolve().parents[1]
QUICKSTART = PROJECT / "evals/quickstart"


@pytest.fixture
def three_suites(judge_file, tmp_path):  # noqa: F811
    """The files of three small eval recipes, judged by the tiny model."""
    judge_file()
    shared = "generation: {max_new_tokens: 6}\njudge: {file: judge.yaml}\n"
    (tmp_path / "alpaca_eval.yaml").write_text(
        f"suite: {{name: alpaca_eval}}\ndata: {{questions: {QUICKSTART}/alpaca_eval/questions.json,"
        f" max_questions: 3}}\n{shared}metrics: {{probe_pairs: 1}}\n"
    )
    (tmp_path / "mt_bench.yaml").write_text(
        f"suite: {{name: mt_bench}}\ndata: {{questions: {QUICKSTART}/mt_bench/question.jsonl, "
        f"references: {QUICKSTART}/mt_bench/reference_answer.jsonl, max_questions: 3}}\n{shared}"
    )
    rows = [
        {"question": f"Pick {n}", "choices": ["one", "two three"], "answer": n % 2}
        for n in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\ndataset_kwargs: {data_files: {test:"
        " rows.jsonl}}\noutput_type: multiple_choice\ntest_split: test\nnum_fewshot:"
        ' 0\ndoc_to_text: "{{question}}:"\ndoc_to_choice: "{{choices}}"\ndoc_to_target:'
        ' "{{answer}}"\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better:'
        " true}\nmetadata: {version: 1.0}\n"
    )
    (tmp_path / "lm_eval.yaml").write_text(
        "suite: {name: lm_eval, tasks: [tiny_choice], batch_size: 4}\ndata: {include_path: tasks,"
        " folder: .}\n"
    )
    return [str(tmp_path / f"{name}.yaml") for name in ("mt_bench", "lm_eval", "alpaca_eval")]


@pytest.fixture
def loads(monkeypatch):
    """A list that grows with each model that is loaded from disk."""
    from transformers import AutoModelForCausalLM

    found: list[str] = []
    real = AutoModelForCausalLM.from_pretrained

    def counting(path, *args, **kwargs):
        found.append(Path(path).name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    return found


def test_three_suites_on_two_runs_and_their_base_load_the_base_once_and_the_judge_once(
    three_suites,
    make_run,  # noqa: F811
    loads,  # noqa: F811, RUF100
):  # noqa: F811, RUF100
    make_run("one", 1), make_run("two", 2)
    loads.clear()
    recipes, targets = split_words([*three_suites, "one", "two", "base"])
    results = results_of(recipes, targets)
    assert loads == ["tiny-llama", "tiny-judge"]
    named = [(result["suite"], result["target"].partition("--tiny")[0]) for result in results]
    assert named == [
        (suite, name)
        for suite in ("mt_bench", "lm_eval", "alpaca_eval")
        for name in ("one", "two", "base")
    ]
    run = Path(results[0]["file"]).resolve().parents[2]
    assert (run / "evals" / results[0]["eval"] / "figures/grades.svg").is_file()
    logs, _ = read_evals(run)
    assert {log.suite for log in logs} == {"mt_bench", "lm_eval", "alpaca_eval"}
    evaluate_all(recipes, targets)
    assert loads == ["tiny-llama", "tiny-judge", "tiny-llama"], "stored judgments need no judge"


def test_a_judge_that_fails_in_one_suite_carries_its_banner_into_the_others(three_suites, make_run):  # noqa: F811
    make_run("one", 1)
    recipes, targets = split_words([three_suites[0], three_suites[2], "one"])
    grades, pairs = results_of(recipes, targets)
    assert any("failed its audit:" in line for line in pairs["banners"])
    assert any(f"failed its audit in {pairs['eval']}" in line for line in grades["banners"])
    (alone,) = results_of(recipes[:1], targets)
    assert any(f"failed its audit in {pairs['eval']}" in line for line in alone["banners"]), (
        "known from the run's earlier results"
    )
    Path(pairs["file"]).write_bytes(
        b"\0" * 400
    )  # a damaged earlier result says nothing, and stops nothing
    (alone,) = results_of(recipes[:1], targets)
    assert not any(f"failed its audit in {pairs['eval']}" in line for line in alone["banners"])


def test_the_opponent_concerns_the_suites_that_compare_and_lm_evals_flags_concern_lm_eval(
    three_suites,
    make_run,  # noqa: F811
    capsys,  # noqa: F811, RUF100
):  # noqa: F811, RUF100
    make_run("one", 1), make_run("two", 2)
    assert main(["eval", *three_suites, "two", "--against", "one", "--limit", "2", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["against"] for result in results] == ["one", None, "one"]
    assert results[1]["tasks"][0]["n"] == 2
    assert main(["eval", three_suites[1], "two", "--against", "one"]) == 2
    assert "no meaning for lm_eval" in capsys.readouterr().err


def test_two_recipes_of_one_name_and_a_recipe_of_another_kind_are_refused(three_suites, tmp_path):
    twice = [tmp_path / "evals/x.yaml", tmp_path / "again/evals/x.yaml"]
    for path in twice:
        path.parent.mkdir(parents=True)
        path.write_text("suite: {name: lm_eval, tasks: [arc_easy]}\n")
    with pytest.raises(RecipeError, match="two eval recipes are called 'x'"):
        split_words([*map(str, twice), "run"])
    with pytest.raises(RecipeError, match="not an eval recipe"):
        split_words([three_suites[0], str(PROJECT / "recipes/quickstart/lora-r8.yaml"), "run"])


def test_an_eval_recipe_is_known_by_its_name_and_may_stand_anywhere():
    (recipe,), targets = split_words(["quickstart/mt_bench", "my-run", "data.max_questions=1"])
    assert recipe.name == "quickstart--mt_bench" and targets == ["my-run"]
    (recipe,), targets = split_words(["my-run", str(QUICKSTART / "lm_eval.yaml"), "base"])
    assert recipe.suite.name == "lm_eval" and targets == ["my-run", "base"]
    with pytest.raises(RecipeError, match="is no eval recipe") as caught:
        split_words(["quickstart/mt_bnech", "my-run"])
    assert "quickstart/mt_bench" in str(caught.value.hints)


def test_base_names_the_base_of_the_runs_beside_it(make_run, tiny_model_dir):  # noqa: F811
    make_run("one", 1), make_run("two", 2)
    targets = find_targets(["base", "one", "two", str(tiny_model_dir)])
    assert [target.is_base for target in targets] == [True, False, False]
    assert targets[0].recipe.data.prompt_format == "dolly"
    with pytest.raises(RecipeError, match="none of them is an adapter"):
        find_targets(["base"])
    make_run("three", 3, prompt_format="alpaca")
    with pytest.raises(RecipeError, match=r"'base' is not one model: .*asked in several ways"):
        find_targets(["base", "one", "three"])


def test_code_of_a_model_runs_only_when_recipe_and_command_line_allow_it(
    three_suites,
    make_run,  # noqa: F811
    tiny_model_dir,
    tmp_path,
    capsys,  # noqa: F811, RUF100
):  # noqa: F811, RUF100
    run = make_run("one", 1)
    resolved = run / "resolved.yaml"
    resolved.write_text(
        resolved.read_text().replace("model:\n", "model:\n  trust_remote_code: true\n")
    )
    assert main(["eval", three_suites[1], "one"]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main(["eval", three_suites[1], "one", "--trust-remote-code", "--json"]) == 0
    assert "trust_remote_code=True" in json.loads(capsys.readouterr().out)["lm_eval_command"]
    folder = tmp_path / "own-code"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {
            "AutoModelForCausalLM": "modeling_own.Own",
            "AutoConfig": "modeling_own.OwnConfig",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["eval", three_suites[1], str(folder)]) == 2
    assert "generation.trust_remote_code=true" in capsys.readouterr().err
    assert main(["eval", three_suites[1], str(folder), "generation.trust_remote_code=true"]) == 2
    assert "pass --trust-remote-code" in capsys.readouterr().err


def test_wrong_words_are_refused_before_anything_is_loaded(three_suites, make_run, loads):  # noqa: F811
    make_run("one", 1)
    loads.clear()
    recipes, _ = split_words([*three_suites, "one"])
    with pytest.raises(RecipeError, match="oen"):
        evaluate_all(recipes, ["one", "oen"])
    with pytest.raises(RecipeError, match="no reference opponent"):
        evaluate_all([load_eval(three_suites[0])], ["one"], "reference")
    assert loads == []
