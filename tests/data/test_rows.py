"""Files, folders and mixtures as rows: every format is read alike, and whatever cannot be used is
named by file and line, all at once.
"""

import csv
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from recipes_lib.config.recipe import DataSection
from recipes_lib.core.errors import DataError
from recipes_lib.data.conversations import check_roles, message_texts, read_messages
from recipes_lib.data.errors import BadRow, BadRows, SettingError
from recipes_lib.data.readers import read_file
from recipes_lib.data.reading import formats_of, read_data
from recipes_lib.data.rows import conversation_of, template_values
from recipes_lib.data.sources import data_files

TASK = {"instruction": "Größe?", "response": 'Say "é",\nthen stop.'}
TASKS = [{**TASK, "instruction": f"{i}?"} for i in range(3)]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def rows_of(source, prompt_format="dolly", **keys):
    """The rows of a source, or the error for those that cannot be used."""
    bad = BadRows()
    source = source if isinstance(source, list) else str(source)
    found = read_data(DataSection(source=source, prompt_format=prompt_format, **keys), bad)
    if len(bad):
        raise bad.error(found.num_read)
    return found.rows


@pytest.fixture
def read(write_jsonl):
    """Write rows to a file and read them."""
    return lambda rows, *args, **keys: rows_of(write_jsonl(rows), *args, **keys)


def write_all(folder: Path, rows: list[dict[str, str]]) -> list[Path]:
    """Write the same rows in every format."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in (
        ("rows.jsonl", lines),
        ("rows.json", json.dumps(rows)),
        ("lines.json", lines),
        ("bom.jsonl", "\ufeff" + lines),
    ):
        (folder / name).write_text(content, encoding="utf-8")
    for name, sign in (("rows.csv", ","), ("rows.tsv", "\t")):
        with (folder / name).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, [*rows[0]], delimiter=sign)
            writer.writeheader()
            writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_rows(tmp_path):
    for file in write_all(tmp_path, TASKS):
        assert [row.fields for row in rows_of(file)] == TASKS, file
    (tmp_path / "a.csv").write_text("instruction,response\nNA,007\nnull,1e3\n")
    found = [[*row.fields.values()] for row in rows_of(tmp_path / "a.csv")]
    assert found == [["NA", "007"], ["null", "1e3"]], "nothing is converted"
    odd = '{"text": "a\u2028b"}\n{"text": "c"}\n'  # a separator inside of a text ends no line
    (tmp_path / "odd.json").write_text(odd, encoding="utf-8")
    assert [row.fields["text"] for row in read_file(tmp_path / "odd.json")] == ["a\u2028b", "c"]


def test_a_damaged_file_is_named_with_its_line(tmp_path):
    good = json.dumps(TASK)
    for name, content, line, words in (
        ("a.jsonl", f'{good}\n{{"torn"\n', 2, "not JSON (Expecting ':' delimiter"),
        ("a.jsonl", f'{good}\n{{"instruction": "\xe9"}}\n'.encode("latin-1"), 2, "'utf-8' codec"),
        ("a.json", "[\n{]", None, "cannot be read as json"),
        ("a.csv", "instruction,response\na\n", 2, "not 2 fields like the header"),
        ("a.csv", 'instruction,response\na,"b', None, "cannot be read as csv"),
        ("a.parquet", b"PAR1", None, "cannot be read as parquet"),
        ("a.jsonl.gz", "", None, "not a data file; known endings: .jsonl, .ndjson, .json, .csv"),
    ):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError) as caught:
            read_file(file)
        assert caught.value.line == line and words in caught.value.what, caught.value


def test_a_folder_is_its_files_of_the_split(tmp_path):
    for name in ("b-train.jsonl", "a-train.jsonl", "test.jsonl", "notes.md", ".hidden.jsonl"):
        (tmp_path / name).write_text(json.dumps(TASK) + "\n")
    names = [file.name for file in data_files(tmp_path, "train")]
    assert names == ["a-train.jsonl", "b-train.jsonl"] and len(rows_of(tmp_path)) == 2
    assert [file.name for file in data_files(tmp_path, "test")] == ["test.jsonl"]
    with pytest.raises(DataError, match="no data file of the split 'validation'"):
        data_files(tmp_path, "validation")


def test_a_source_that_is_nowhere_names_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps(TASK))
    with pytest.raises(SettingError, match="no such file or folder") as caught:
        rows_of(tmp_path / "row.jsonl")
    assert "rows.jsonl" in caught.value.hints[0]
    with pytest.raises(SettingError, match="'nobody/nothing' is not a file or folder"):
        rows_of("nobody/nothing")


def test_a_json_list_in_a_jsonl_file_is_one_error_about_the_file(tmp_path):
    for number, text in enumerate((json.dumps(TASKS), json.dumps(TASKS, indent=1))):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(text)
        with pytest.raises(DataError, match="a JSON list, where each line") as caught:
            read_file(file)
        assert str(caught.value.file) == str(file) and caught.value.line is None
        assert caught.value.hints == ("give the file the ending .json",)
    (tmp_path / "row.jsonl").write_text("[1]\n" + json.dumps(TASK))
    bad = BadRows()
    assert len(read_file(tmp_path / "row.jsonl", bad)) == 1
    assert "row.jsonl:1: the row: expected dict, found list" in bad.lines()[0]


def test_an_address_as_the_source_says_what_to_set_instead():
    with pytest.raises(SettingError, match="is an address, not a file") as caught:
        rows_of("https://example.org/rows.jsonl")
    assert "download the file" in caught.value.hints[0]
    with pytest.raises(SettingError) as caught:
        rows_of("https://huggingface.co/datasets/somebody/rows/tree/main")
    assert caught.value.hints == ("set data.source: somebody/rows",)


def test_other_separators_encodings_and_saved_data_sets_say_what_to_do(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("instruction;response\na;b\n")
    with pytest.raises(DataError, match="one column, 'instruction;response'") as caught:
        read_file(file)
    assert "commas as .csv" in caught.value.hints[0]
    for name, text in (("b.csv", "instruction,response\n\xe9,b\n"), ("b.jsonl", '{"a": "\xe9"}')):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match="'utf-8' codec") as caught:
            read_file(tmp_path / name)
        assert "iconv -f latin1" in caught.value.hints[0]
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text("{}")
    with pytest.raises(DataError, match="the files of datasets' save_to_disk") as caught:
        rows_of(saved)
    assert "to_parquet" in caught.value.hints[0]


def test_preference_rows_are_named_as_such(read, write_jsonl):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(SettingError) as caught:
        read([row], "chat")
    assert "stage: dpo" in caught.value.hints[-1]
    with pytest.raises(DataError) as caught:
        formats_of(write_jsonl([row]))
    assert "stage: dpo" in caught.value.hints[-1]


def test_what_cannot_be_used_is_described_with_its_lines(read):
    chat = {"messages": TURNS}
    for row, prompt_format, keys, words in (
        ({**TASK, "response": None}, "dolly", {}, "'response': expected text, found None"),
        ({**TASK, "response": TURNS}, "chat", {}, "'response': expected text, found list"),
        ({"text": ["a"]}, "raw", {}, "'text': expected text, found list"),
        ({**TASK, "response": "\ud83d"}, "dolly", {}, "surrogates not allowed"),
        ({**chat, "tools": {"name": "f"}}, "chat", {}, "expected list, found dict"),
        ({**chat, "tools": "weather"}, "chat", {}, "not JSON"),
        ({**chat, "tools": [{"type": "x"}]}, "chat", {}, "not a function with a name"),
        ({**chat, "chat_template_kwargs": [1]}, "chat", {}, "expected dict, found list"),
        (TASK, "dolly", {"system_prompt": "Be brief."}, "works only in prompt_format chat"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            read([row, row], prompt_format, **keys)
        assert bool(keys) or (caught.value.line == 1 and "rows.jsonl:2" in caught.value.hints[0])


def test_columns_are_mapped_by_name_alias_and_recipe(read):
    task = {"instruction": "a", "response": "b", "context": "c"}
    for row, columns in (
        (task, {}),
        ({"instruction": "a", "output": "b", "input": "c"}, {}),
        ({"question": "a", "answer": "b", "input": "c"}, {}),
        ({"q": "a", "a": "b", "context": "c"}, {"instruction": "q", "response": "a"}),
    ):
        assert read([row], columns=columns)[0].fields == task
    assert "context" not in read([{**task, "context": None}])[0].fields


def test_columns_of_another_format_name_the_format_to_try(read):
    for row, prompt_format, suggestion in (
        ({"instruction": "", "input": "", "output": ""}, "raw", "alpaca"),
        ({"query": "", "target": ""}, "dolly", "data.columns"),
    ):
        with pytest.raises(SettingError, match="columns are ") as caught:
            read([row], prompt_format)
        assert suggestion in caught.value.hints[0]
    with pytest.raises(SettingError, match="no column 'categry'") as caught:
        read([{**TASK, "category": ""}], columns={"response": "categry"})
    assert caught.value.hints[0].startswith("did you mean category")


def test_tools_and_template_arguments_have_columns_of_their_own(read):
    tool = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    wrapped = [{"type": "function", "function": tool}]
    row = {"messages": TURNS, "tools": [tool], "chat_template_kwargs": {"a": 1, "b": None}}
    text = {"messages": TURNS, "functions": json.dumps(wrapped), "chat_template_kwargs": '{"a": 1}'}
    for given in (row, text):
        [found] = read([given], "chat")
        assert template_values(found, {"a": 0, "c": 2}) == {"a": 1, "c": 2, "tools": wrapped}


def test_what_arrow_fills_in_with_null_is_not_there(tmp_path):
    turn = {"role": "assistant", "content": ""}
    calls = [{**turn, "tool_calls": [{"name": name, "arguments": {name: 1}}]} for name in "fg"]
    rows = [{"messages": [TURNS[0], answer]} for answer in (*calls, TURNS[1])]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = rows_of(tmp_path / "rows.parquet", "chat")
    said = [message_texts(row.fields["messages"][1])[1:] for row in found]
    assert said == [[f'{{"name": "{name}", "arguments": {{"{name}": 1}}}}'] for name in "fg"] + [[]]


def test_a_new_recipe_reads_rows_as_their_first_one_asks(write_jsonl):
    three = ("dolly", "alpaca", "chat")
    for row, formats in (
        (TASK, three),
        ({"question": "a", "answer": "b"}, three),
        ({"conversations": TURNS}, ("chat",)),
        ({"instruction": "a", "input": "", "output": "b"}, three),
        ({"prompt": "a", "completion": "b"}, ("raw", "chat")),
        ({"text": "a"}, ("raw",)),
    ):
        assert formats_of(write_jsonl([row])) == formats
    with pytest.raises(DataError, match="columns a are not understood"):
        formats_of(write_jsonl([{"a": "b"}]))
    with pytest.raises(DataError, match="the file has no rows"):
        formats_of(write_jsonl([]))


# ---- conversations ----

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
RESULT = {"role": "tool", "content": "sunny"}
ASKED = {"role": "user", "content": "And in Bonn?"}
ANSWERED = {"role": "assistant", "content": "Sunny."}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{i}"} for i, role in enumerate(roles)]


def refused(check, cases) -> list[str]:
    """The cases that `check` does not refuse in these words."""
    wrong = []
    for value, words in cases:
        with pytest.raises(BadRow) as caught:
            check(value)
        if words not in caught.value.what:
            wrong.append(f"{words}: {caught.value.what}")
    return wrong


def test_a_bad_message_is_described():
    parts = [{"type": "text", "text": "One "}, {"type": "image", "image": "a.png"}]
    cases = (
        (3, "expected dict, found int"),
        ({"role": "bot", "content": "a"}, "unknown role 'bot'"),
        ({"role": "user", "content": None}, "(user): expected text, found None"),
        ({"role": "user", "content": "\udc00"}, "surrogates not allowed"),
        ({"role": "user", "content": parts}, "only content parts {type: text"),
        ({**ANSWERED, "weight": 0.5}, "weight 0.5: "),
        ({**ANSWERED, "tool_calls": [{"name": "f", "arguments": "{city"}]}, "'f': not JSON ("),
        ({**ANSWERED, "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "dict, found list"),
        ({**ANSWERED, "tool_calls": [{"arguments": {"a": 1}}]}, "a tool call needs a name"),
    )
    assert not refused(lambda message: read_messages([message], "messages"), cases)
    with pytest.raises(BadRow, match="expected list, found None"):
        read_messages(None, "messages")


def test_roles_parts_thoughts_and_weights_of_other_spellings_are_ours():
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two."}]
    thought = {**ANSWERED, "reasoning_content": "Hm."}
    for given, expected in (
        ({"from": "human", "value": "a"}, {"role": "user", "content": "a"}),
        ({"role": "model", "content": "a"}, {"role": "assistant", "content": "a"}),
        ({"from": "observation", "value": "a"}, {"role": "tool", "content": "a"}),
        ({"from": "tool", "value": {"sky": 1}}, {"role": "tool", "content": '{"sky": 1}'}),
        ({"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
        ({"role": "user", "content": parts}, {"role": "user", "content": "One two."}),
        ({**ANSWERED, "thinking": "Hm."}, thought),
        ({**ANSWERED, "reasoning": "Hm."}, thought),
        ({**ASKED, "weight": 0}, ASKED),
        ({**ANSWERED, "weight": 1}, ANSWERED),
        ({**ANSWERED, "weight": 0}, {**ANSWERED, "weight": 0}),
    ):
        assert read_messages([given], "messages") == [expected], given


def test_tool_calls_of_every_spelling_become_one():
    arguments = '{"city": "Bonn"}'
    for call in (
        {**CALL, "id": "call_1"},
        {"name": "weather", "arguments": {"city": "Bonn"}},
        {"type": "function", "function": {"name": "weather", "arguments": arguments}},
    ):
        identity = {"id": "call_1"} if "id" in call else {}
        expected = {**CALLED, "tool_calls": [{**identity, **CALL}]}
        for message in (
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "assistant", "tool_calls": json.dumps([call])},
            {"from": "function_call", "value": json.dumps([call])},
        ):
            assert read_messages([message], "messages") == [expected], message


def test_who_speaks_when_is_checked():
    cases = (
        ((), "roles from message 0 on: ;"),
        (turns("user"), "message 0 on: user;"),
        (turns("user", "user", "assistant"), "message 0 on: user, user, assistant;"),
        (turns("user", "assistant", "system", "assistant"), "message 2 on: system"),
        (turns("user", "assistant", "user"), "message 2 on: user; expected user and assistant in"),
        ([ASKED, CALLED, RESULT, ASKED, ANSWERED], "message 2 on: tool, user"),
        ([ASKED, RESULT, ANSWERED], "message 0 on: user, tool, assistant"),
    )
    assert not refused(check_roles, cases)
    check_roles(turns("system", "user", "assistant", "user", "assistant"))
    check_roles([ASKED, CALLED, RESULT, RESULT, CALLED])
    check_roles([ASKED, ANSWERED, RESULT, ANSWERED])  # a call that is written in the text


def test_a_row_becomes_a_conversation_whose_own_system_message_wins(read):
    answer = {"role": "assistant", "content": "R"}
    [task] = read([{"instruction": "Do.", "context": "C", "response": "R"}], "chat")
    assert conversation_of(task, None) == [{"role": "user", "content": "Do.\n\nC"}, answer]
    for row, system in (
        ({"messages": TURNS, "system": "Be brief."}, "Be brief."),
        ({**TASK, "system_prompt": "Be brief."}, "Be brief."),
        ({"messages": turns("system", "user", "assistant")}, "0"),
        ({**TASK, "system": None}, "the recipe's"),
    ):
        [found] = read([row], "chat")
        assert conversation_of(found, "the recipe's")[0] == {"role": "system", "content": system}


def test_a_history_is_read_and_a_second_answer_column_is_named(write_jsonl):
    rows = [{**TASK, "history": [["Hi?", "Hello."]]}]
    [row] = rows_of(write_jsonl(rows), "chat")
    contents = [message["content"] for message in conversation_of(row, None)]
    assert contents[:2] == ["Hi?", "Hello."] and contents[-1] == TASK["response"]

    section = DataSection(source=str(write_jsonl(rows)), prompt_format="dolly")
    (note,) = read_data(section, BadRows()).notes
    assert "column 'history' is not read: it needs prompt_format chat" in note
    twice = [{**TASK, "output": "another answer"}]
    section = DataSection(source=str(write_jsonl(twice)), prompt_format="dolly")
    (note,) = read_data(section, BadRows()).notes
    assert "column 'output' is not read" in note and "data.columns.response: output" in note


def test_a_bad_history_is_described(write_jsonl):
    with pytest.raises(DataError, match="'history', turn 0: expected a question and its answer"):
        rows_of(write_jsonl([{**TASK, "history": [["alone"]]}]), "chat")
