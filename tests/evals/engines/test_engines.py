"""The door for engines: a third one is one file and one line."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import yaml
from tests.evals.engines import toy_engine

import recipes_lib
from recipes_lib.analysis.ownership import check_ownership
from recipes_lib.analysis.readers.ours import load_run
from recipes_lib.core.errors import RecipeError
from recipes_lib.evals.engines import ENGINES, Engines
from recipes_lib.evals.engines.base import Target
from recipes_lib.evals.models import known_by
from recipes_lib.evals.recipe import EvalRecipe, load_eval
from recipes_lib.evals.run import evaluate

PACKAGE = Path(recipes_lib.__file__).parent
JUDGE = {"model": "owner/judge", "engine": "toy"}


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A function that writes and loads an eval recipe, with a third engine among the others."""
    monkeypatch.setitem(ENGINES, toy_engine.ENGINE.name, toy_engine.ENGINE)
    monkeypatch.setattr(toy_engine, "LIVES", [])
    monkeypatch.setattr("recipes_lib.evals.judge.local_folder", lambda recipe: tmp_path)
    monkeypatch.setattr("recipes_lib.evals.judge.model_path", lambda section: str(tmp_path))
    monkeypatch.setattr("recipes_lib.evals.judge.load_tokenizer", lambda recipe: Letters())

    def make(suite: str, **judge: str) -> EvalRecipe:
        question = {"instruction": "Name a metal.", "output": "Gold."}
        rule = {"prompt": "Name a metal.", "check": "contains", "expected": "letters"}
        row = question if suite == "alpaca_eval" else rule
        (tmp_path / f"{suite}.jsonl").write_text(json.dumps(row) + "\n")
        values = {
            "suite": {"name": suite},
            "data": {"questions": f"{suite}.jsonl"},
            "generation": {"engine": "toy"},
        }
        if suite == "alpaca_eval":
            values |= {"judge": JUDGE | judge, "metrics": {"probe_pairs": 0}}
        path = tmp_path / f"{suite}.yaml"
        path.write_text(yaml.safe_dump(values))
        return load_eval(path)

    return make


class Letters:
    """A tokenizer of the judge."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> list[int]:
        return self.encode(messages[0]["content"])


def test_what_an_engine_holds_is_let_go_after_an_error(toy):
    section = toy("checks").generation
    target = cast(Target, SimpleNamespace(name="one"))  # a toy asks for nothing else
    with pytest.raises(RuntimeError, match="of ours"), Engines([target]) as engines:
        engines.engine(section, target)
        raise RuntimeError("of ours")
    assert toy_engine.LIVES == ["opened for one", "closed"]


def test_a_third_engine_answers_judges_and_says_what_it_is_in_the_log(toy, make_run):
    make_run("one", 1), make_run("two", 2)
    recipe = toy("checks")
    logs = evaluate([recipe, toy("alpaca_eval")], ["one", "two"])
    # once for the models of a base, and once for the judge
    names = "one, two"
    assert [f"opened for {names}", "closed", "opened for owner/judge", "closed"] == toy_engine.LIVES
    for log in logs:
        facts = log.answers
        said = (facts.engine, facts.server, facts.dtype, facts.quantized)
        assert said == ("toy", "0.1", "int8", True)
        check_ownership(load_run(log.file.parents[2]))
    checks, judged = logs[0], logs[2]
    assert checks.metrics[0].value == 1.0 and judged.metrics[0].value == 0.5
    assert judged.judge is not None
    assert (judged.judge.engine, judged.judge.server) == ("toy", "0.1")
    assert known_by("one", recipe) == checks.answers.fingerprint


def test_an_engine_is_refused_what_it_does_not_do(toy):
    for words, reason in (
        ({"mode": "json"}, "mode json needs a server"),
        ({"mode": "logits"}, "mode logits needs a judge in this process"),
        ({"engine": "toi"}, "there is no engine 'toi'; engines: transformers, openai, toy"),
    ):
        with pytest.raises(RecipeError, match=reason):
            toy("alpaca_eval", **words)
    with pytest.raises(RecipeError, match="needs the weights in this process"):
        toy("heldout_loss")


def test_nothing_outside_the_door_asks_which_engine_it_is():
    compares = re.compile(r"engine\b.{0,12}[!=]= |[!=]= .{0,12}\bengine|[\"']openai[\"']")
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name != "engines":
            code = [line.partition("#")[0] for line in file.read_text().splitlines()]
            assert not [line for line in code if compares.search(line)], file
