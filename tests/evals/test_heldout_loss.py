"""The held-out loss is the training's own validation loss, row by row, and its mean is per
token.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes_lib.core.errors import RecipeError
from recipes_lib.evals.log import read_eval_logs
from recipes_lib.evals.questions import QuestionSet
from recipes_lib.evals.suites.heldout_loss import HeldoutLoss, row_losses
from recipes_lib.train import main as train

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def eval_file(tmp_path: Path) -> Path:
    """An eval recipe of the suite on the validation rows."""
    path = tmp_path / "held.yaml"
    path.write_text("suite: {name: heldout_loss}\ndata: {questions: validation}\n")
    return path


def test_it_is_the_validation_loss_of_the_training(tiny_recipe, tmp_path, eval_file, recipes):
    for name, words in (("one", ["train.max_steps=3"]), ("full", ["lora=null"])):
        words = ["train.max_steps=2", "model.dtype=float32", *words, f"run.name={name}"]
        assert train([str(tiny_recipe), *words]) == 0
    code, out, err = recipes("eval", eval_file, "one", "full", "base")
    assert code == 0 and "base--tiny-llama--" in out and "not comparable" not in out, err
    for name in ("one", "full"):
        metrics = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        trained = [json.loads(line) for line in metrics if "eval_loss" in line][-1]["eval_loss"]
        (log,), _ = read_eval_logs(tmp_path / "runs" / name)
        loss, per_byte = log.metrics
        values = [sample.value for sample in loss.samples]
        assert loss.value == pytest.approx(sum(values) / len(values))
        assert loss.value == pytest.approx(trained, rel=1e-5)
        assert loss.higher_is_better is False and per_byte.instead_of == "loss"
    rows = tmp_path / "data.jsonl"
    shutil.copy(PROJECT / "recipes/quickstart/data/instructions.jsonl", rows)
    words = ["train.max_steps=1", "model.dtype=float32", "data.split.validation=0.4"]
    words.append(f"data.source={rows}")
    assert train([str(tiny_recipe), "run.name=wide", *words]) == 0
    assert recipes("eval", eval_file, "wide", "base")[0] == 0
    folders = (tmp_path / "runs/wide", next((tmp_path / "runs").glob("base--*")))
    wide, base = (read_eval_logs(folder)[0][0] for folder in folders)
    assert wide.n == base.n > len(values)  # a base reads the rows of the run beside it
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-40]))
    assert recipes("eval", eval_file, "wide", "base")[0] == 0
    assert all(read_eval_logs(folder)[0][0].n < wide.n for folder in folders)  # of today's rows
    state = json.loads((folders[1] / "run.json").read_text())
    state["stand_in"]["model"]["gone"] = 1
    (folders[1] / "run.json").write_text(json.dumps(state))
    code, _, err = recipes("eval", eval_file, "wide", folders[1].name)
    assert code == 2 and "earlier version" in err and "remove" in err


def test_a_base_reads_the_rows_of_a_run_that_is_asked_as_it_is():
    def model(name: str, asked: str, trained: bool = True) -> Any:
        recipe = SimpleNamespace(model=SimpleNamespace(name_or_path="m"), name=name)
        return SimpleNamespace(name=name, trained=trained, prompt_hash=asked, recipe=recipe)

    recipe: Any = SimpleNamespace(data=SimpleNamespace(questions="rows.jsonl"))
    suite = HeldoutLoss(recipe, QuestionSet((), 0))
    suite.prepare([model("base", "a", False), model("one", "a"), model("two", "b")])
    assert suite.recipes["base"].name == "one"


def test_other_tokens_have_bits_per_byte_of_the_same_text(
    tiny_recipe, other_tiny_model_dir, tmp_path, eval_file, recipes
):
    words = ["train.max_steps=1", "train.max_length=400"]
    assert train([str(tiny_recipe), "run.name=one", *words]) == 0
    whole = ["run.name=whole", "train.completion_only_loss=false"]
    assert train([str(tiny_recipe), *words, *whole]) == 0
    assert "not comparable" in recipes("eval", eval_file, "one", "whole")[1]
    words.append(f"model.name_or_path={other_tiny_model_dir}")
    assert train([str(tiny_recipe), "run.name=two", *words]) == 0
    code, out, err = recipes("eval", eval_file, "one", "two")
    assert code == 0 and "losses per token are not comparable" in out, err
    logs = [read_eval_logs(tmp_path / "runs" / name)[0][0] for name in ("one", "two")]
    assert logs[0].metrics[0].key != logs[1].metrics[0].key
    assert logs[0].metrics[1].key == logs[1].metrics[1].key
    sizes = [[row.verdicts for row in log.metrics[1].samples] for log in logs]
    assert sizes[0] == sizes[1] and len(sizes[0]) > 20


def test_a_file_is_searched_for_leaks(tiny_recipe, tiny_model_dir, tmp_path, eval_file, recipes):
    words = ["train.max_steps=1", "data.split.validation=0", "train.eval_strategy='no'"]
    assert train([str(tiny_recipe), "run.name=one", *words]) == 0
    served = ["generation.engine=openai", "generation.base_url=http://127.0.0.1:1/v1"]
    for words, what in (
        (["one"], "the recipe of one holds out no validation rows"),
        ([str(tiny_model_dir)], "has no recipe, so no validation split"),
        (["any", *served], "needs the weights in this process"),
    ):
        code, _, err = recipes("eval", eval_file, *words)
        assert code == 2 and what in err
    rows = (PROJECT / "recipes/quickstart/data/instructions.jsonl").read_text().splitlines()[:40]
    (tmp_path / "mine.jsonl").write_text("\n".join([*rows, *rows[:2] * 12]) + "\n")
    eval_file.write_text("suite: {name: heldout_loss}\ndata: {questions: mine.jsonl}\n")
    code, _, err = recipes("eval", eval_file, "one", str(tiny_model_dir))
    assert code == 0, err
    (log,), _ = read_eval_logs(tmp_path / "runs/one")
    samples = log.metrics[0].samples
    assert len(samples) == 64
    assert {sample.same_as for sample in samples} == {"", samples[0].id, samples[1].id}
    assert log.leaks and log.leaks.is_error and log.leaks.leaked_questions > 30
    assert log.banners[0] == log.leaks.summary(log.eval)
    code, out, err = recipes("eval", eval_file, "one", "data.max_questions=3")
    assert code == 0 and "subset, 3 rows in the order of a hash" in out, err


def test_rows_without_a_token_with_loss_are_one_line(tiny_recipe, tmp_path, eval_file, recipes):
    words = ["train.max_steps=1", "model.dtype=float32"]
    assert train([str(tiny_recipe), "run.name=one", *words]) == 0
    row = {"instruction": "word " * 2000, "context": "", "response": "yes"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    eval_file.write_text("suite: {name: heldout_loss}\ndata: {questions: mine.jsonl}\n")
    code, _, err = recipes("eval", eval_file, "one")
    assert code in (2, 4) and "ZeroDivisionError" not in err and "internal error" not in err, err
    assert "mine.jsonl" in err or "has a token with loss" in err, err


def test_no_supervised_token_is_refused_before_the_model_is_asked(monkeypatch):
    rows = {"example_id": ["a"], "input_ids": [[1, 2]], "labels": [[-100, -100]]}

    class Rows(dict):
        def __getitem__(self, key: Any) -> Any:
            return self if isinstance(key, slice) else dict.__getitem__(self, key)

        def __len__(self) -> int:
            return len(self["labels"])

    prepared = SimpleNamespace(validation=Rows(rows))
    place = "recipes_lib.evals.suites.heldout_loss.prepare_data"
    monkeypatch.setattr(place, lambda *_: prepared)
    data = SimpleNamespace(questions="validation", max_questions=None)
    suite = HeldoutLoss(SimpleNamespace(data=data), QuestionSet((), 0))  # type: ignore[arg-type]
    suite.split = "validation"
    suite.recipes = {"one": SimpleNamespace(stage="sft")}  # type: ignore[dict-item]
    model: Any = SimpleNamespace(name="one", tokenizer=None)
    with pytest.raises(
        RecipeError, match="none of the 1 rows that one reads has a token with loss"
    ):
        suite.measure(model, None)


def test_the_logits_of_a_row_are_in_float32_part_by_part(monkeypatch):
    torch.manual_seed(0)
    logits = torch.randn(1, 1300, 50, dtype=torch.bfloat16)
    labels = torch.randint(50, (1300,)).tolist()
    labels[:700] = [-100] * 700

    class Model:
        device = torch.device("cpu")

        def __call__(self, **_: Any) -> Any:
            return SimpleNamespace(logits=logits)

    wanted = torch.tensor(labels[1:])
    whole = torch.nn.functional.cross_entropy(logits[0, :-1].float(), wanted, reduction="none")
    real = torch.nn.functional.cross_entropy
    sizes = []

    def counted(values: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        sizes.append(len(values))
        return real(values, *rest, **options)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", counted)
    assert row_losses(Model(), [list(range(1300))], [labels]) == [float(whole.double().sum())]
    assert sum(sizes) == 1299 and max(sizes) <= 512
