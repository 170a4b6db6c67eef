"""`recipes data` on a tiny model: what it prints, and that no control character of the data reaches the terminal."""

from __future__ import annotations

import argparse
import io
import json
import sys

import pytest

from recipes_lib.commands import data as command
from recipes_lib.errors import DataError


@pytest.fixture
def recipe_file(tmp_path, tiny_model_dir):
    rows = [{"instruction": f"What is {i}?", "context": "", "response": f"It is \x1b[31m{i} ünd."} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = tmp_path / "try.yaml"
    path.write_text(f"model:\n  name_or_path: {tiny_model_dir}\ndata:\n  source: rows.jsonl\ntrain:\n  max_length: 128\n")
    return path


def run(path, *overrides, show=3) -> int:
    return command.run(argparse.Namespace(recipe=str(path), overrides=list(overrides), show=show))


def test_it_prints_counts_lengths_and_the_next_command(recipe_file, capsys):
    assert run(recipe_file, "data.max_examples=20") == 0
    out = capsys.readouterr().out
    assert "30 rows read, 20 used" in out
    assert "0 truncated at max_length 128, 0 without supervised tokens" in out
    assert "p50" in out and "with loss" in out
    assert out.rstrip().endswith(f"next: recipes train {recipe_file} data.max_examples=20")


def test_examples_mark_the_text_with_loss_and_its_end(recipe_file, capsys):
    run(recipe_file, show=1)
    out = capsys.readouterr().out
    assert "### Response:\n[[It is " in out and "]]<EOS </s>>" in out and out.count("-- ") == 1
    assert "\x1b" not in out and "\\x1b[31m" in out


def test_colours_are_for_a_terminal_only(recipe_file, capsys, monkeypatch):
    monkeypatch.setattr(command, "use_color", lambda: True)
    run(recipe_file, show=1)
    out = capsys.readouterr().out
    assert f"{command.GREEN}It is " in out and f"{command.REVERSE}</s>{command.RESET}" in out and "[[" not in out
    assert "\x1b[31m" not in out


def test_it_prints_on_an_ascii_terminal(recipe_file, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    run(recipe_file, show=1)
    stream.seek(0)
    assert "\\xfcnd." in stream.read()


def test_refused_data_prints_its_numbers_first(recipe_file, capsys):
    with pytest.raises(DataError, match="30/30 rows have no supervised token at max_length=8") as caught:
        run(recipe_file, "train.max_length=8")
    assert "30 truncated at max_length 8" in capsys.readouterr().out
    assert caught.value.exit_code == 4


def test_a_line_without_loss_is_named_at_the_recipe_s_line(recipe_file):
    recipe_file.write_text(recipe_file.read_text().replace("max_length: 128", "max_length: 8"))
    with pytest.raises(DataError) as caught:
        run(recipe_file)
    assert (str(caught.value.file), caught.value.line) == (str(recipe_file), 6)


@pytest.mark.parametrize("text", ["-1", "many", "1.5"])
def test_a_number_of_rows_that_is_none_is_refused_by_its_name(text, capsys):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["a.yaml", f"--show={text}"])
    assert "expected a number of rows" in capsys.readouterr().err


def test_text_cut_by_max_length_shows_no_end_token(recipe_file, capsys):
    rows = [{"instruction": f"What is {i}?", "response": f"It is {i}. " * 100} for i in range(30)]
    (recipe_file.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(recipe_file, show=1)
    out = capsys.readouterr().out
    assert "30 truncated at max_length 128" in out and "30 lose their end token" in out and "[[It is" in out and "<EOS" not in out
