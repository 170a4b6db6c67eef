"""`recipes data` on a tiny model: what it prints, and that no control character of the data reaches
the terminal.
"""

from __future__ import annotations

import io
import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from recipes_lib.cli import main
from recipes_lib.commands import data as command
from recipes_lib.core.errors import DataError


@pytest.fixture
def recipe_file(tmp_path, tiny_model_dir):
    rows = [
        {"instruction": f"What is {i}?", "context": "", "response": f"It is \x1b[31m{i} ünd."}
        for i in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    path = tmp_path / "try.yaml"
    path.write_text(
        f"model:\n  name_or_path: {tiny_model_dir}\ndata:\n  source: rows.jsonl\ntrain:\n "
        " max_length: 128\n"
    )
    return path


def run(path, *overrides, show=3) -> int:
    return command.run(str(path), overrides, show=show)


def test_it_prints_counts_lengths_and_the_next_command(recipe_file, capsys):
    assert run(recipe_file, "data.max_examples=20") == 0
    out = capsys.readouterr().out
    assert "30 rows read, 20 used" in out
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
    assert (
        f"{command.GREEN}It is " in out
        and f"{command.REVERSE}</s>{command.RESET}" in out
        and "[[" not in out
    )
    assert "\x1b[31m" not in out


def test_it_prints_on_an_ascii_terminal(recipe_file, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["data", str(recipe_file), "--show", "1"]) == 0
    stream.seek(0)
    assert "\\xfcnd." in stream.read()


def test_refused_data_prints_its_numbers_first(recipe_file, capsys):
    with pytest.raises(
        DataError, match="30/30 rows have no supervised token at max_length=8"
    ) as caught:
        run(recipe_file, "train.max_length=8")
    assert "30 rows cut at max_length=8" in capsys.readouterr().out
    assert caught.value.exit_code == 4


def test_a_line_without_loss_is_named_at_the_recipe_s_line(recipe_file):
    recipe_file.write_text(recipe_file.read_text().replace("max_length: 128", "max_length: 8"))
    with pytest.raises(DataError) as caught:
        run(recipe_file)
    assert (str(caught.value.file), caught.value.line) == (str(recipe_file), 6)


def test_a_number_of_rows_that_is_none_is_refused_by_its_name(recipe_file, capsys):
    for text in ("-1", "many", "1.5"):
        assert main(["data", str(recipe_file), f"--show={text}"]) == 2
        assert "--show: expected a whole number" in capsys.readouterr().err


def test_text_cut_by_max_length_shows_no_end_token(recipe_file, capsys):
    rows = [{"instruction": f"What is {i}?", "response": f"It is {i}. " * 100} for i in range(30)]
    (recipe_file.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(recipe_file, show=1)
    out = capsys.readouterr().out
    assert (
        "30 rows cut at max_length=128, 30 lose their end" in out
        and "[[It is" in out
        and "<EOS" not in out
    )


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{city"}]},
    {"role": "tool", "content": "3"},
    TURNS[1],
]


@pytest.mark.parametrize(
    "bad",
    [{"messages": CALL}, {"messages": TURNS, "tools": {"name": "f"}}, {"messages": TURNS[:1]}],
)
def test_new_check_and_data_agree_about_rows_that_cannot_be_used(
    bad, recipe_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    recipe_file.write_text(
        recipe_file.read_text().replace("rows.jsonl", "mine.jsonl\n  prompt_format: chat")
    )
    rows = [{"messages": TURNS}] * 1500 + [bad, {"messages": TURNS}, bad]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    new = [
        "new",
        "mine",
        "--from",
        str(recipe_file),
        "--data",
        "mine.jsonl",
        "--output",
        "new.yaml",
    ]
    for argv in (new, ["check", "try.yaml"], ["data", "try.yaml"]):
        assert main(argv) == 4
        said.append(
            [
                line
                for line in capsys.readouterr().err.splitlines()
                if "1501" in line or "1503" in line or "on_bad_row" in line
            ]
        )
    assert said[0] == said[1] == said[2] and len(said[0]) == 3
    recipe_file.write_text(recipe_file.read_text().replace("chat\n", "chat\n  on_bad_row: skip\n"))
    for argv in (["check", "try.yaml"], ["check", "--full", "try.yaml"], ["data", "try.yaml"]):
        assert main(argv) == 0
    assert "2 of 1503 rows cannot be used and are left out" in capsys.readouterr().out


def test_check_reads_the_first_rows_and_all_of_them_when_asked(recipe_file, monkeypatch, capsys):
    monkeypatch.setattr("recipes_lib.data.splits.NUM_CHECKED", 30)
    assert main(["check", str(recipe_file)]) == 0
    assert "note" not in capsys.readouterr().out
    with (recipe_file.parent / "rows.jsonl").open("a") as file:
        file.write('{"instruction": "a", "response": "b"}\n{"instruction": "a"}\n')
    assert main(["check", str(recipe_file)]) == 0
    assert "only the first 30 rows of" in capsys.readouterr().err
    assert main(["check", "--full", str(recipe_file)]) == 4
    assert "rows.jsonl:32: column 'response'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source", ["gone.jsonl", "gone/", "[{source: rows.jsonl}, {source: gone.csv}]", "empty"]
)
@pytest.mark.parametrize("argv", [["check"], ["check", "--full"], ["plan"], ["data"]])
def test_data_that_is_not_there_is_refused_by_every_verb(source, argv, recipe_file, capsys):
    (recipe_file.parent / "empty").mkdir()
    recipe_file.write_text(recipe_file.read_text().replace("rows.jsonl", source))
    assert main([*argv, str(recipe_file)]) in (2, 4)
    said = capsys.readouterr()
    assert "try.yaml:4: " in said.err or "no data file in this folder" in said.err
    assert ("gone" in said.err or "empty" in said.err) and "13,510" not in said.out


def test_a_large_file_is_planned_with_its_own_rows(recipe_file, monkeypatch, capsys):
    monkeypatch.setattr("recipes_lib.plan.steps.LARGEST_FILE", 1000)
    monkeypatch.setattr("recipes_lib.plan.steps.SAMPLE", 10)
    assert main(["plan", str(recipe_file)]) == 0
    said = capsys.readouterr().out
    assert "of 10 of about 30 rows" in said and "not on this machine" not in said


CALLING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def shapes(folder):
    """Own rows as people have them, 30 of each; the third as CSV with a BOM and as latin-1."""
    called = {"role": "assistant", "content": None, "tool_calls": None}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    sharegpt, openai, pairs, alpaca = [], [], [], []
    for i in range(30):
        said = [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": f"{i}."}]
        system = [{"from": "system", "value": "Be brief."}] * (i % 2)
        sharegpt.append({"conversations": system + said})
        openai.append(
            {
                "messages": [
                    {"role": "user", "content": f"{i}?"},
                    {**called, "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "c1", "content": "1"},
                    {"role": "assistant", "content": f"{i}."},
                ],
                "tools": [{"type": "function", "function": {"name": "f"}}],
            }
        )
        pairs.append(f"Où est {i} ?;Là, à {i}.\n")
        alpaca.append({"instruction": f"Add {i}.", "input": "", "output": f"{i}"})
    (folder / "sharegpt.json").write_text(json.dumps(sharegpt))
    (folder / "openai.jsonl").write_text("".join(json.dumps(row) + "\n" for row in openai))
    text = "question;answer\n" + "".join(pairs)
    (folder / "bom.csv").write_text(text, encoding="utf-8-sig")
    (folder / "latin.csv").write_text(text, encoding="latin-1")
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    parquet.write_table(pyarrow.Table.from_pylist(openai), folder / "nested.parquet")


def test_own_rows_of_every_shape_go_from_new_to_what_the_loss_sees(
    recipe_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shapes(tmp_path)
    recipe_file.with_name("mine.jinja").write_text(CALLING)
    recipe_file.write_text(
        recipe_file.read_text().replace(
            "rows.jsonl", "rows.jsonl\n  prompt_format: chat\n  chat_template: mine.jinja"
        )
    )
    seen = {
        "sharegpt.json": "[[0.]]<EOS </s>>",
        "openai.jsonl": '[[{"name": "f", "arguments": {"a": 1}}]]<EOS </s>>',
        "bom.csv": "Où est 0 ?</s><|assistant|>[[Là, à 0.]]",
        "latin.csv": "Où est 0 ?</s><|assistant|>[[Là, à 0.]]",
        "alpaca.json": "Add 0.</s><|assistant|>[[0]]",
        "nested.parquet": '[[{"name": "f", "arguments": {"a": 1}}]]<EOS </s>>',
    }
    for file, text in seen.items():
        new = ["new", "own", "--from", str(recipe_file), "--data", file]
        assert main([*new, "--output", f"{file}.yaml"]) == 0
        assert main(["check", f"{file}.yaml"]) == 0
        assert main(["data", f"{file}.yaml", "data.split.method=none", "--show", "30"]) == 0
        out = capsys.readouterr().out
        assert "30 rows read, 30 used" in out and text in out, file
