from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recipes_lib.config.new_recipe import new_recipe
from recipes_lib.config.recipe import load_recipe
from recipes_lib.config.sections import OwnRows

MINE = Path("mine.jsonl")


def test_a_recipe_with_two_levels_above_it_is_copied_and_not_extended(write):
    write("model: {name_or_path: a}\n", "_a.yaml")
    write("extends: _a.yaml\ndata: {source: rows.jsonl}\n", "_b.yaml")
    write("rows\n", "rows.jsonl")
    write("extends: _b.yaml\nlora: {r: 4}\ntrain: {seed: 9}\n", "r.yaml")
    target = write("", "sub/new.yaml")
    target.write_text(new_recipe("new", target, load_recipe("r.yaml"), None))
    copied = load_recipe(target)
    assert "extends" not in target.read_text()
    assert (copied.model.name_or_path, copied.lora["r"], copied.train["seed"]) == ("a", 4, 9)
    assert copied.as_written["source"] == "../rows.jsonl"


@pytest.mark.parametrize(
    ("rows", "data", "completion_only"),
    [
        (
            OwnRows(MINE, ("chat",), {"messages": "conversations"}),
            {"columns": {"messages": "conversations"}},
            True,
        ),
        (OwnRows(MINE, ("dolly", "alpaca", "chat")), {}, True),
        (OwnRows(MINE, ("raw",), whole_text=True), {"prompt_format": "raw"}, None),
    ],
    ids=["conversations", "instructions", "one text"],
)
def test_a_recipe_for_own_rows_says_what_differs_from_its_origin(
    rows, data, completion_only, write
):
    write(
        "model: {name_or_path: a}\ndata: {source: rows.jsonl, prompt_format: chat}\ntrain:"
        " {completion_only_loss: true}\n",
        "origin.yaml",
    )
    target = write("", "new.yaml")
    target.write_text(new_recipe("new", target, load_recipe("origin.yaml"), rows))
    recipe = load_recipe(target)
    assert (
        recipe.written_values()["data"] == {"source": "mine.jsonl", "prompt_format": "chat"} | data
    )
    assert recipe.train["completion_only_loss"] is completion_only


@pytest.mark.parametrize(
    ("train", "written"),
    [
        (
            "eval_strategy: steps, eval_steps: 12, max_length: 256",
            {"eval_steps": 0.2, "save_steps": 0.05, "max_length": 960},
        ),
        ("max_length: 2048", {"save_steps": 0.05, "max_length": 2048}),
        ("max_length: null, save_strategy: epoch", {"max_length": None}),
        ("max_steps: 60", {"save_steps": 0.05, "max_length": 1024, "max_steps": -1}),
        (
            "eval_strategy: steps, eval_steps: 12, save_steps: 12, load_best_model_at_end: true",
            {"eval_steps": 0.2, "save_steps": 0.2, "max_length": 1024},
        ),
    ],
)
def test_what_was_chosen_for_the_rows_of_the_origin_is_chosen_anew_for_own_rows(
    train, written, write
):
    write(
        f"model: {{name_or_path: a}}\ndata: {{source: rows.jsonl}}\ntrain: {{{train}}}\n",
        "origin.yaml",
    )
    target = write("", "new.yaml")
    target.write_text(
        new_recipe(
            "new", target, load_recipe("origin.yaml"), OwnRows(MINE, ("dolly",), max_length=960)
        )
    )
    text = yaml.safe_load(target.read_text())["train"]
    assert {
        key: text[key] for key in text if key not in ("learning_rate", "num_train_epochs")
    } == written
    load_recipe(target)


def test_without_own_rows_the_origins_choices_are_written_out(write):
    write(
        "model: {name_or_path: a}\ndata: {source: rows.jsonl}\ntrain: {eval_strategy: steps,"
        " eval_steps: 12, max_steps: 9}\n",
        "origin.yaml",
    )
    target = write("", "new.yaml")
    target.write_text(new_recipe("new", target, load_recipe("origin.yaml"), None))
    train = load_recipe(target).train
    assert (train["eval_steps"], train["save_steps"], train["max_length"], train["max_steps"]) == (
        12,
        500,
        1024,
        9,
    )
