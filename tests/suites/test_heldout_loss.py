"""The held-out loss is the training's own validation loss, row by row, and its mean is per
token.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from recipes_lib.core.errors import RecipeError
from recipes_lib.eval_files import read_evals
from recipes_lib.eval_recipe import load_eval
from recipes_lib.statistics.intervals import mean_interval
from recipes_lib.suites.heldout_loss import HeldoutLoss, row_losses
from recipes_lib.train import main as train

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def eval_file(tmp_path: Path) -> Path:
    """An eval recipe of the suite on the validation rows."""
    path = tmp_path / "held.yaml"
    path.write_text("suite: {name: heldout_loss}\ndata: {questions: validation}\n")
    return path


def test_row_losses_are_those_of_each_row_alone_in_float64(tiny_model_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = [[5, 9, 7, 11], [3, 4], list(range(20, 60))]
    labels = [[-100, 9, -100, 11], [-100, 4], [-100] * 30 + list(range(50, 60))]
    wanted = []
    for row, told in zip(ids, labels, strict=True):
        logits = model.double()(torch.tensor([row])).logits[0, :-1]
        targets = torch.tensor(told[1:])
        wanted.append(float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum")))
    assert row_losses(model.float(), ids, labels) == pytest.approx(wanted, rel=1e-5)


def test_it_is_the_validation_loss_of_the_training_and_reads_runs_and_their_base(
    tiny_recipe: Path, tmp_path: Path, eval_file: Path, recipes
) -> None:
    words = ["train.max_steps=3", "train.bf16=false", "model.dtype=float32"]
    assert train([str(tiny_recipe), "run.name=one", *words]) == 0
    assert train([str(tiny_recipe), "run.name=two", "train.seed=7", *words]) == 0
    metrics = (tmp_path / "runs/one/metrics.jsonl").read_text().splitlines()
    trained = [json.loads(line) for line in metrics if "eval_loss" in line][-1]["eval_loss"]
    code, out, err = recipes("eval", eval_file, "one", "two", "base")
    assert code == 0, err
    assert "loss per token" in out and "not comparable" not in out
    (log,), _ = read_evals(tmp_path / "runs/one")
    assert log.numbers["loss"]["estimate"] == pytest.approx(trained, rel=1e-5)
    measure, per_byte = log.measures
    values = [one.value for one in measure.samples]
    assert sum(values) / len(values) == pytest.approx(trained, rel=1e-5)
    bits = [one.value for one in per_byte.samples]
    assert sum(bits) / len(bits) == pytest.approx(log.numbers["bits_per_byte"], rel=1e-9)
    assert log.numbers["perplexity"] == pytest.approx(math.exp(trained), rel=1e-5)
    assert measure.higher_is_better is False
    code, out, err = recipes("compare", "one", "two", "base")
    assert code == 0, err
    assert out.count("loss per token on validation rows") and "bits per byte" not in out


def test_models_with_other_tokens_are_compared_in_bits_per_byte(
    tiny_recipe: Path, other_tiny_model_dir: Path, tmp_path: Path, eval_file: Path, recipes
) -> None:
    words = ["train.max_steps=1", "train.max_length=400"]
    assert train([str(tiny_recipe), "run.name=one", *words]) == 0
    words.append(f"model.name_or_path={other_tiny_model_dir}")
    assert train([str(tiny_recipe), "run.name=two", *words]) == 0
    code, out, err = recipes("eval", eval_file, "one", "two")
    assert code == 0 and "losses per token are not comparable" in out, err
    logs = {name: read_evals(tmp_path / "runs" / name)[0][0] for name in ("one", "two")}
    assert logs["one"].numbers["rows"]["tokens"] < logs["two"].numbers["rows"]["tokens"]
    rows = (PROJECT / "recipes/quickstart/data/instructions.jsonl").read_text().splitlines()
    sizes = {f"{len(row['response'].strip().encode())} bytes" for row in map(json.loads, rows)}
    told = [[row.verdicts[0] for row in log.measures[1].samples] for log in logs.values()]
    assert told[0] == told[1] and set(told[0]) <= sizes and len(told[0]) > 20
    code, out, err = recipes("compare", "one", "two")
    assert code == 0, err
    tested = [line for line in out.splitlines() if "one" in line and "two" in line]
    assert any("bits per byte on validation rows" in line for line in tested), out
    assert not any("loss per token" in line for line in tested), out


def test_rows_of_a_file_are_read_as_the_recipe_reads_its_own(
    tiny_recipe: Path, tiny_model_dir: Path, tmp_path: Path, eval_file: Path, recipes
) -> None:
    assert train([str(tiny_recipe), "run.name=one", "train.max_steps=1"]) == 0
    rows = (PROJECT / "recipes/quickstart/data/instructions.jsonl").read_text().splitlines()[:7]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows) + "\n")
    eval_file.write_text("suite: {name: heldout_loss}\ndata: {questions: mine.jsonl}\n")
    code, out, err = recipes("eval", eval_file, "one")
    assert code == 0, err
    (log,), _ = read_evals(tmp_path / "runs/one")
    assert log.numbers["rows"]["n"] == 7
    code, out, err = recipes("eval", eval_file, "one", "data.max_questions=3")
    assert code == 0 and "one    3 " in out, err
    code, out, err = recipes("eval", eval_file, tiny_model_dir)  # a model without a run
    assert code == 0 and "7 " in out, err


def test_rows_of_a_file_that_the_training_learned_from_allow_no_claim(
    tiny_recipe: Path, tmp_path: Path, eval_file: Path, recipes
) -> None:
    assert train([str(tiny_recipe), "run.name=one", "train.max_steps=8"]) == 0
    rows = (PROJECT / "recipes/quickstart/data/instructions.jsonl").read_text().splitlines()[:40]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows) + "\n")
    eval_file.write_text("suite: {name: heldout_loss}\ndata: {questions: mine.jsonl}\n")
    code, out, err = recipes("eval", eval_file, "one", "base")
    assert code == 0, err
    logs, _ = read_evals(tmp_path / "runs/one")
    leaks = logs[0].leaks
    assert leaks and leaks.is_error and leaks.questions == 40 and leaks.leaked_questions > 30
    assert logs[0].banners[0] == leaks.summary(logs[0].eval)
    code, out, err = recipes("compare", "one", "base", "--json")
    made = json.loads(out)
    (finding,) = [one for one in made["findings"] if one["code"] == "leaked-questions"]
    assert finding["severity"] == "error" and "instructions.jsonl:1: answer" in str(finding)
    _, out, _ = recipes("compare", "one", "base")
    assert "is better than" not in out and "than base on loss" not in out
    code, _, err = recipes("data", tiny_recipe, "--against", eval_file)
    assert code == 2 and "40 of 40 questions of" in err and "(or their answers) are in" in err


def test_other_rows_of_a_file_are_searched_and_leave_the_claim_as_it_is(
    tiny_recipe: Path, tmp_path: Path, eval_file: Path, recipes
) -> None:
    assert train([str(tiny_recipe), "run.name=one", "train.max_steps=8"]) == 0
    rows = [
        {"instruction": f"Summarize this text. {n}", "context": "", "response": f"So {n} it is."}
        for n in range(20)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    eval_file.write_text("suite: {name: heldout_loss}\ndata: {questions: mine.jsonl}\n")
    assert recipes("eval", eval_file, "one", "base")[0] == 0
    (log,), _ = read_evals(tmp_path / "runs/one")
    assert log.leaks and not log.leaks.found and not log.leaks.why
    _, out, _ = recipes("compare", "one", "base", "--json")
    assert not [one for one in json.loads(out)["findings"] if "leak" in one["code"]]


def test_rows_that_repeat_are_one_observation_and_the_report_says_so(
    tiny_recipe: Path, tiny_model_dir: Path, tmp_path: Path, eval_file: Path, recipes
) -> None:
    rows = (PROJECT / "recipes/quickstart/data/instructions.jsonl").read_text().splitlines()[:8]
    (tmp_path / "mine.jsonl").write_text("\n".join([*rows, *rows[:2] * 12]) + "\n")
    eval_file.write_text("suite: {name: heldout_loss}\ndata: {questions: mine.jsonl}\n")
    assert train([str(tiny_recipe), "run.name=one", "train.max_steps=1"]) == 0
    code, out, err = recipes("eval", eval_file, "one", "base")
    assert code == 0 and "24 rows repeat the text of another: every text is one" in out, err
    (log,), _ = read_evals(tmp_path / "runs/one")
    samples = log.measures[0].samples
    assert (log.numbers["rows"]["n"], log.numbers["rows"]["repeated"]) == (32, 24)
    assert {one.same_as for one in samples} == {"", samples[0].id, samples[1].id}
    once = mean_interval([one.value for one in samples])
    told = log.numbers["loss"]
    assert told["high"] - told["low"] > 1.5 * (once.high - once.low)
    code, out, err = recipes("compare", "one", "base", "--json")
    assert code == 0, err
    made = json.loads(out)
    (row,) = [row for row in made["rows"] if row["metric"].endswith("/loss")]
    assert (row["tested"]["n"], row["tested"]["questions"]) == (32, 8)
    (finding,) = [one for one in made["findings"] if one["code"] == "repeated-questions"]
    assert "8 of 32 are different" in finding["title"]


def test_what_has_no_such_rows_is_refused_before_or_as_it_is_asked(
    tiny_recipe: Path, tiny_model_dir: Path, eval_file: Path, recipes
) -> None:
    with pytest.raises(RecipeError, match="has no recipe, so no validation split"):
        HeldoutLoss(load_eval(eval_file), [str(tiny_model_dir)])
    server = load_eval(
        eval_file, ["generation.engine=openai", "generation.base_url=http://127.0.0.1:1/v1"]
    )
    with pytest.raises(RecipeError, match="needs the weights in this process"):
        HeldoutLoss(server, [])
    words = ["train.max_steps=1", "data.split.validation=0", "train.eval_strategy='no'"]
    assert train([str(tiny_recipe), "run.name=one", *words]) == 0
    code, _, err = recipes("eval", eval_file, "one")
    assert code == 2 and "the recipe of one holds no validation rows out" in err
