from __future__ import annotations

import json

import pytest

from recipes_lib.errors import DataError
from recipes_lib.recipe.new_recipe import first_row, new_recipe
from recipes_lib.recipe.recipe import load_recipe


@pytest.mark.parametrize(
    ("row", "formats", "columns"),
    [
        ({"instruction": "a", "response": "b"}, "dolly", {}),
        ({"question": "a", "answer": "b"}, "dolly", {"instruction": "question", "response": "answer"}),
        ({"instruction": "a", "input": "c", "output": "b"}, "dolly", {"context": "input", "response": "output"}),
        ({"messages": []}, "chat", {}),
        ({"conversations": []}, "chat", {"messages": "conversations"}),
        ({"prompt": "a", "completion": "b"}, "raw", {}),
        ({"text": "a"}, "raw", {}),
    ],
)
def test_columns_are_guessed_from_the_first_row(row, formats, columns, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row) + "\nthis line is never read\n")
    found = first_row(path)
    assert found.prompt_formats[0] == formats
    assert found.columns == columns


def test_json_and_csv_are_read_too(tmp_path):
    (tmp_path / "rows.json").write_text('[{"text": "a"}]')
    (tmp_path / "rows.csv").write_text("question,answer\na,b\n")
    assert first_row(tmp_path / "rows.json").prompt_formats == ("raw",)
    assert first_row(tmp_path / "rows.csv").columns == {"instruction": "question", "response": "answer"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"x": 1, "y": 2}', "columns x, y are not understood"),
        ("a.jsonl", "", "no row"),
        ("a.jsonl", "{", "cannot be read"),
        ("a.json", '{"x": 1}', "no row"),
        ("a.csv", "x\n", "no row"),
        ("a.jsonl", None, "no such file"),
        ("a.parquet", None, "no such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        first_row(tmp_path / name)


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
