from __future__ import annotations

from pathlib import Path

import pytest

from recipes_lib.recipe.new_recipe import Rows, new_recipe
from recipes_lib.recipe.recipe import load_recipe

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
    assert copied.data.source == "../rows.jsonl"


@pytest.mark.parametrize(
    ("rows", "data", "completion_only"),
    [
        (Rows(MINE, ("chat",), {"messages": "conversations"}), {"columns": {"messages": "conversations"}}, True),
        (Rows(MINE, ("dolly", "alpaca", "chat")), {}, True),
        (Rows(MINE, ("raw",), whole_text=True), {"prompt_format": "raw"}, None),
    ],
    ids=["conversations", "instructions", "one text"],
)
def test_a_recipe_for_own_rows_says_what_differs_from_its_origin(rows, data, completion_only, write):
    write(
        "model: {name_or_path: a}\ndata: {source: rows.jsonl, prompt_format: chat}\ntrain: {completion_only_loss: true}\n",
        "origin.yaml",
    )
    target = write("", "new.yaml")
    target.write_text(new_recipe("new", target, load_recipe("origin.yaml"), rows))
    recipe = load_recipe(target)
    assert recipe.written_values()["data"] == {"source": "mine.jsonl", "prompt_format": "chat"} | data
    assert recipe.train["completion_only_loss"] is completion_only
