"""The suite preference is 1 where the chosen answer is the more probable one, of each pair alone,
and pairs of one prompt are one observation.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.pairs import write_pair_recipe, write_pairs
from transformers import AutoModelForCausalLM

from recipes_lib.config.recipe import load_recipe
from recipes_lib.data.prepare import prepare_data
from recipes_lib.evals.log import read_eval_logs
from recipes_lib.evals.questions import QuestionSet
from recipes_lib.evals.suites import preference
from recipes_lib.train import main as train

SHORT = ["train.max_steps=2", "model.dtype=float32"]


@pytest.fixture
def pair_recipe(tiny_recipe: Path, tiny_model_dir, tiny_recipe_text) -> Path:
    """A recipe that trains the tiny model on pairs; its runs go to <tmp_path>/runs."""
    return write_pair_recipe(tiny_recipe.with_name("pairs.yaml"), tiny_recipe_text(tiny_model_dir))


@pytest.fixture
def eval_file(tmp_path: Path) -> Path:
    """An eval recipe of the suite on the validation pairs."""
    path = tmp_path / "prefer.yaml"
    path.write_text("suite: {name: preference}\ndata: {questions: validation}\n")
    return path


def log_probabilities(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Return those of the tokens of an answer, from the whole logits."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = model(ids).logits[0].double()
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)  # each tells the next token
    return torch.log_softmax(logits, -1)[places, answer].tolist()


@pytest.mark.slow
def test_values_are_those_of_each_pair_alone_and_the_base_stands_beside(
    pair_recipe, tiny_model_dir, tiny_tokenizer, tmp_path, eval_file, recipes
):
    words = [*SHORT, "data.split.validation=0.3"]
    assert train([str(pair_recipe), *words, "lora=null", "run.name=full"]) == 0
    recipe = load_recipe(pair_recipe, words)
    pairs = prepare_data(recipe, tiny_tokenizer).validation
    assert pairs is not None
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/full/model", dtype=torch.float32)
    by_score = []
    for score in ("per_token", "sum"):
        words = ["full", "base", f"suite.log_probability={score}"]
        code, out, err = recipes("eval", eval_file, *words)
        assert code == 0 and "prefers the chosen answer" in out, err
        for model, folder in ((full, "full"), (base, "base--*")):
            (run,) = (tmp_path / "runs").glob(folder)
            (log,), _ = read_eval_logs(run)
            (accuracy,) = log.metrics
            wanted = []
            for pair in pairs:
                sides = []
                for answer in ("chosen_ids", "rejected_ids"):
                    tokens = log_probabilities(model, pair["prompt_ids"], pair[answer])
                    sides.append(sum(tokens) / (len(tokens) if score == "per_token" else 1))
                wanted.append(float(sides[0] > sides[1]))
            assert [sample.value for sample in accuracy.samples] == wanted
            assert [sample.id for sample in accuracy.samples] == pairs["example_id"]
            assert accuracy.n == len(wanted) > 15
            assert accuracy.value == pytest.approx(sum(wanted) / len(wanted))
            assert "is the shorter one" in log.notes[0]
        by_score.append(wanted)
    assert by_score[0] != by_score[1]  # the key acts
    code, out, err = recipes("compare", "full", run.name)
    assert code == 0 and "preference for the chosen answer (sum)" in out, err


def test_a_run_without_pairs_of_its_own_reads_a_file_of_them(
    tiny_recipe, tiny_model_dir, tmp_path, eval_file, recipes
):
    names = ["data.columns={instruction: instruction, response: response}"]
    words = [*SHORT, "train.completion_only_loss=false", *names]
    assert train([str(tiny_recipe), *words, "run.name=sft"]) == 0
    code, _, err = recipes("eval", eval_file, "sft")
    assert code == 2 and "have one answer each" in err and "file of pairs" in err
    rows = []
    for line in write_pairs(tmp_path / "pairs.jsonl", 30).read_text().splitlines():
        row = json.loads(line)
        rows.append({"instruction": row.pop("prompt"), **row})
    again = [row | {"rejected": f"No. {row['rejected']}"} for row in rows[:5]]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows + again))
    file = f"data.questions={pairs}"
    code, _, err = recipes("eval", eval_file, "sft", str(tiny_model_dir), file)
    assert code == 0, err
    (log,), _ = read_eval_logs(tmp_path / "runs/sft")
    samples = log.metrics[0].samples
    assert [sample.same_as for sample in samples[30:]] == [sample.id for sample in samples[:5]]
    assert len(samples) == 35 and not any(sample.same_as for sample in samples[:30])
    assert log.leaks and log.leaks.leaked_questions > 10  # of the chosen answers, which it learnt
    code, out, err = recipes("eval", eval_file, "sft", file, "data.max_questions=4")
    assert code == 0 and "subset, 4 rows" in out, err
    pairs.write_text(json.dumps(rows[0] | {"rejected": rows[0]["chosen"]}) + "\n")
    code, _, err = recipes("eval", eval_file, "sft", file)
    assert code != 0 and "pairs.jsonl:1" in err and "the same" in err


def test_equal_answers_are_half_and_what_is_not_finite_has_no_verdict(monkeypatch):
    pairs = {
        "prompt_ids": [[1], [2], [3], [3]],
        "chosen_ids": [[5], [5], [5], [5, 6]],
        "rejected_ids": [[6], [6], [6], [7]],
        "example_id": ["a", "b", "c", "d"],
    }
    losses = iter([[1.0, 1.0, math.nan, 4.0], [1.0, 0.5, 2.0, 3.0]])
    monkeypatch.setattr(preference, "row_losses", lambda *_: next(losses))
    section = SimpleNamespace(name="preference", log_probability="per_token")
    data = SimpleNamespace(questions="test", max_questions=None)
    recipe: Any = SimpleNamespace(suite=section, data=data, name="p")
    suite = preference.Preference(recipe, QuestionSet((), 0))
    suite.split = "test"
    monkeypatch.setattr(suite, "rows_of", lambda _: pairs)
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: [str(row) for row in rows])
    model: Any = SimpleNamespace(trained=None, name="m", tokenizer=tokenizer)
    log = suite.measure(model, None)
    (accuracy,) = log.metrics
    # of the last, 4 nats over two tokens are less than 3 over one
    assert [sample.value for sample in accuracy.samples] == [0.5, 0.0, None, 1.0]
    assert [sample.same_as for sample in accuracy.samples] == ["", "", "", "c"]
    assert accuracy.n == 3 and accuracy.value == 0.5


def test_the_key_is_of_this_suite_alone(tmp_path, recipes):
    path = tmp_path / "held.yaml"
    path.write_text("suite: {name: heldout_loss, log_probability: sum}\ndata: {questions: test}\n")
    code, _, err = recipes("check", path)
    assert code == 2 and "suite.log_probability is a key of preference, not of heldout_loss" in err
