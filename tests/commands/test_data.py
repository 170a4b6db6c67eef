"""`recipes data` on a tiny model: what it prints, and that no control character of the data reaches
the terminal; and that every verb that reads rows agrees about them.
"""

from __future__ import annotations

import json

import pyarrow
import pytest
from pyarrow import parquet

from recipes_lib.cli import main


@pytest.fixture
def recipe_file(tmp_path, tiny_model_dir, monkeypatch):
    """A recipe whose 30 answers hold an escape sequence; run from its folder."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"instruction": f"What is {i}?", "context": "", "response": f"It is \x1b[31m{i} ünd."}
        for i in range(30)
    ]
    write(tmp_path / "rows.jsonl", rows)
    path = tmp_path / "try.yaml"
    path.write_text(
        f"model:\n  name_or_path: {tiny_model_dir}\ndata:\n  source: rows.jsonl\ntrain:\n "
        " max_length: 128\n"
    )
    return path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def replace(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def run(capsys, *words, code=0) -> str:
    """Run a verb and return what it printed on stdout, and on stderr if it must fail."""
    assert main(list(words)) == code
    out, err = capsys.readouterr()
    return out + err if code else out


def test_it_prints_counts_lengths_marked_rows_and_the_next_command(recipe_file, capsys):
    out = run(capsys, "data", "try.yaml", "data.max_examples=20", "--show", "1")
    assert "30 rows read, 20 used" in out and "p50" in out and "with loss" in out
    assert "### Response:\n[[It is " in out and "]]<EOS </s>>" in out and out.count("-- ") == 1
    assert "\x1b" not in out and "\\x1b[31m" in out
    assert out.rstrip().endswith("next: recipes train try.yaml data.max_examples=20")


def test_an_eval_that_is_none_is_refused_before_rows_are_read(recipe_file, capsys):
    said = run(capsys, "data", "try.yaml", "--against", "nonsense", code=2)
    assert "'nonsense' is not an eval recipe" in said and "rows read" not in said


def test_refused_data_prints_its_numbers_first_and_names_the_line_of_the_recipe(
    recipe_file, capsys
):
    replace(recipe_file, "max_length: 128", "max_length: 8")
    said = run(capsys, "data", "try.yaml", code=4)
    assert "30 rows cut at max_length=8" in said
    assert "try.yaml:6: 30/30 rows have no supervised token at max_length=8" in said


def test_text_cut_by_max_length_shows_no_end_token(recipe_file, capsys):
    rows = [{"instruction": f"What is {i}?", "response": f"It is {i}. " * 100} for i in range(30)]
    write(recipe_file.with_name("rows.jsonl"), rows)
    out = run(capsys, "data", "try.yaml", "--show", "1")
    assert "30 rows cut at max_length=128, 30 lose their end" in out
    assert "[[It is" in out and "<EOS" not in out


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{city"}]}
BAD_ROWS = (
    {"messages": [TURNS[0], CALL, {"role": "tool", "content": "3"}, TURNS[1]]},
    {"messages": TURNS, "tools": {"name": "f"}},
    {"messages": TURNS[:1]},
)


def test_new_check_and_data_agree_about_rows_that_cannot_be_used(recipe_file, tmp_path, capsys):
    replace(recipe_file, "rows.jsonl", "mine.jsonl\n  prompt_format: chat")
    for number, bad in enumerate(BAD_ROWS):
        rows = [{"messages": TURNS}] * 1500
        write(tmp_path / "mine.jsonl", [*rows, bad, {"messages": TURNS}, bad])
        new = ["new", "mine", "--from", "try.yaml", "--data", "mine.jsonl"]
        said = []
        for words in (
            [*new, "--output", f"{number}.yaml"],
            ["check", "try.yaml"],
            ["data", "try.yaml"],
        ):
            lines = run(capsys, *words, code=4).splitlines()
            named = ("1501", "1503", "on_bad_row")
            said.append([line for line in lines if any(word in line for word in named)])
        assert said[0] == said[1] == said[2] and len(said[0]) == 3, said
    replace(recipe_file, "chat\n", "chat\n  on_bad_row: skip\n")
    run(capsys, "check", "--full", "try.yaml")
    assert "2 of 1503 rows cannot be used and are left out" in run(capsys, "data", "try.yaml")


def test_check_reads_the_first_rows_and_all_of_them_when_asked(recipe_file, monkeypatch, capsys):
    monkeypatch.setattr("recipes_lib.data.splits.NUM_CHECKED", 30)
    assert "note" not in run(capsys, "check", "try.yaml")
    with recipe_file.with_name("rows.jsonl").open("a") as file:
        file.write('{"instruction": "a", "response": "b"}\n{"instruction": "a"}\n')
    assert main(["check", "try.yaml"]) == 0
    assert "only the first 30 rows of" in capsys.readouterr().err
    assert "rows.jsonl:32: column 'response'" in run(capsys, "check", "--full", "try.yaml", code=4)


def test_data_that_is_not_there_is_refused_by_every_verb(recipe_file, capsys):
    (recipe_file.parent / "empty").mkdir()
    text, wrong = recipe_file.read_text(), []
    for source in ("gone.jsonl", "gone/", "[{source: rows.jsonl}, {source: gone.csv}]", "empty"):
        recipe_file.write_text(text.replace("rows.jsonl", source))
        for words in (["check"], ["check", "--full"], ["plan"], ["data"]):
            code, said = main([*words, "try.yaml"]), capsys.readouterr().err
            named = "try.yaml:4: " in said or "no data file in this folder" in said
            if code not in (2, 4) or not named or not ("gone" in said or "empty" in said):
                wrong.append((source, words, code, said))
    assert not wrong


def test_a_large_file_is_planned_with_its_own_rows(recipe_file, monkeypatch, capsys):
    monkeypatch.setattr("recipes_lib.plan.steps.LARGEST_FILE", 1000)
    monkeypatch.setattr("recipes_lib.plan.steps.SAMPLE", 10)
    said = run(capsys, "plan", "try.yaml")
    assert "of 10 of about 30 rows" in said and "not on this machine" not in said


CALLING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def shapes(folder):
    """Own rows as people have them, 30 of each; the third as CSV with a BOM."""
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
        pairs.append(f'Où est {i} ?,"Là, à {i}."\n')
        alpaca.append({"instruction": f"Add {i}.", "input": "", "output": f"{i}"})
    (folder / "sharegpt.json").write_text(json.dumps(sharegpt))
    write(folder / "openai.jsonl", openai)
    text = "question,answer\n" + "".join(pairs)
    (folder / "bom.csv").write_text(text, encoding="utf-8-sig")
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    parquet.write_table(pyarrow.Table.from_pylist(openai), folder / "nested.parquet")


def test_own_rows_of_every_shape_go_from_new_to_what_the_loss_sees(recipe_file, tmp_path, capsys):
    shapes(tmp_path)
    recipe_file.with_name("mine.jinja").write_text(CALLING)
    chat = "rows.jsonl\n  prompt_format: chat\n  chat_template: mine.jinja"
    replace(recipe_file, "rows.jsonl", chat)
    seen = {
        "sharegpt.json": "[[0.]]<EOS </s>>",
        "openai.jsonl": '[[{"name": "f", "arguments": {"a": 1}}]]<EOS </s>>',
        "bom.csv": "Où est 0 ?</s><|assistant|>[[Là, à 0.]]",
        "alpaca.json": "Add 0.</s><|assistant|>[[0]]",
        "nested.parquet": '[[{"name": "f", "arguments": {"a": 1}}]]<EOS </s>>',
    }
    for file, text in seen.items():
        new = ("new", "own", "--from", "try.yaml", "--data", file)
        run(capsys, *new, "--output", f"{file}.yaml")
        run(capsys, "check", f"{file}.yaml")
        out = run(capsys, "data", f"{file}.yaml", "data.split.method=none", "--show", "30")
        assert "30 rows read, 30 used" in out and text in out, file
