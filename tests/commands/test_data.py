"""`recipes data`: what it prints; and that every verb that reads rows agrees about them."""

import json

import pytest


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
    model = f"model:\n  name_or_path: {tiny_model_dir}\n"
    path.write_text(f"{model}data:\n  source: rows.jsonl\ntrain:\n  max_length: 128\n")
    return path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def replace(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def test_it_prints_counts_lengths_marked_rows_and_the_next_command(recipe_file, said):
    out = said("data", "try.yaml", "data.max_examples=20", "--show", "1")
    assert "30 rows read, 20 used" in out and "median" in out and "with loss" in out
    assert "### Response:\n[[It is " in out and "</s>]]" in out and out.count("-- ") == 1
    assert "\x1b" not in out and "\\x1b[31m" in out
    assert out.rstrip().endswith("next: recipes train try.yaml data.max_examples=20")


def test_refused_data_names_the_line_of_the_recipe(recipe_file, said):
    replace(recipe_file, "max_length: 128", "max_length: 8")
    shown = said("data", "try.yaml", code=4)
    assert "try.yaml:6: 30/30 rows: no supervised token at max_length=8" in shown


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{city"}]}
BAD_ROWS = (
    {"messages": [TURNS[0], CALL, {"role": "tool", "content": "3"}, TURNS[1]]},
    {"messages": TURNS, "tools": {"name": "f"}},
    {"messages": TURNS[:1]},
)


def test_new_check_and_data_agree_about_rows_that_cannot_be_used(recipe_file, tmp_path, said):
    replace(recipe_file, "rows.jsonl", "mine.jsonl\n  prompt_format: chat")
    for number, bad in enumerate(BAD_ROWS):
        rows = [{"messages": TURNS}] * 1500
        write(tmp_path / "mine.jsonl", [*rows, bad, {"messages": TURNS}, bad])
        new = ["new", "mine", "--from", "try.yaml", "--data", "mine.jsonl"]
        shown = []
        to = ["--output", f"{number}.yaml"]
        for words in ([*new, *to], ["check", "try.yaml"], ["data", "try.yaml"]):
            lines = said(*words, code=4).splitlines()
            named = ("1501", "1503", "on_bad_row")
            shown.append([line for line in lines if any(word in line for word in named)])
        assert shown[0] == shown[1] == shown[2] and len(shown[0]) == 3, shown
    replace(recipe_file, "chat\n", "chat\n  on_bad_row: skip\n")
    said("check", "--full", "try.yaml")
    assert "2 of 1503 rows cannot be used and are left out" in said("data", "try.yaml")


def test_data_that_is_not_there_is_refused_by_every_verb(recipe_file, recipes):
    (recipe_file.parent / "empty").mkdir()
    text, wrong = recipe_file.read_text(), []
    for source in ("gone.jsonl", "gone/", "[{source: rows.jsonl}, {source: gone.csv}]", "empty"):
        recipe_file.write_text(text.replace("rows.jsonl", source))
        for words in (["check"], ["check", "--full"], ["plan"], ["data"]):
            code, _, err = recipes(*words, "try.yaml")
            named = "try.yaml:4: " in err or "no data file of the split" in err
            if code not in (2, 4) or not named or not ("gone" in err or "empty" in err):
                wrong.append((source, words, code, err))
    assert not wrong


CALLING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_own_rows_of_every_shape_go_from_new_to_what_the_loss_sees(recipe_file, tmp_path, said):
    recipe_file.with_name("mine.jinja").write_text(CALLING)
    chat = "rows.jsonl\n  prompt_format: chat\n  chat_template: mine.jinja"
    replace(recipe_file, "rows.jsonl", chat)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "assistant", "content": "b."},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    shown = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b."}]
    call_shown = '[[{"name": "f", "arguments": {"a": 1}}</s>]]'
    for name, row, text in (
        ("sharegpt", {"conversations": shown}, "[[b.</s>]]"),
        ("openai", {"messages": turns, "tools": tools}, call_shown),
        ("alpaca", {"instruction": "a?", "input": "", "output": "b."}, "a?</s><|assistant|>[[b."),
        ("pairs", {"question": "a?", "answer": "b."}, "a?</s><|assistant|>[[b.</s>]]"),
    ):
        write(tmp_path / f"{name}.jsonl", [row] * 30)
        new = ("new", "own", "--from", "try.yaml", "--data", f"{name}.jsonl")
        said(*new, "--output", f"{name}.yaml")
        said("check", name)
        out = said("data", name, "data.split.method=none", "--show", "1")
        assert "30 rows read, 30 used" in out and text in out, name
