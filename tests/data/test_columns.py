from __future__ import annotations

import json

import pyarrow
import pytest
from pyarrow import parquet

from recipes_lib.config.sections import DataSection
from recipes_lib.core.errors import DataError
from recipes_lib.data.conversations import conversation_of, template_values
from recipes_lib.data.examples import BadRows, SettingError, message_texts
from recipes_lib.data.rows import read_data


def named_rows(path, prompt_format="dolly", columns=None, **keys):
    """The rows of a file, or the error for those that cannot be used."""
    bad = BadRows()
    rows = read_data(
        DataSection(source=str(path), prompt_format=prompt_format, columns=columns or {}, **keys),
        bad,
    )
    if bad.found:
        raise bad.error(rows.num_read)
    return rows


@pytest.fixture
def named(write_jsonl):
    """Write rows and name them."""
    return lambda rows, *args, **keys: named_rows(write_jsonl(rows), *args, **keys)


@pytest.fixture
def read(named):
    """Write rows and read them as examples."""
    return lambda *args, **keys: list(named(*args, **keys).with_texts())


@pytest.mark.parametrize(
    ("row", "prompt_format", "found", "suggestion"),
    [
        (
            {"instruction": "", "context": "", "response": "", "category": ""},
            "raw",
            "instruction, context, response, category",
            "dolly",
        ),
        (
            {"instruction": "", "input": "", "output": ""},
            "raw",
            "instruction, input, output",
            "alpaca",
        ),
        ({"messages": []}, "dolly", "messages", "chat"),
        ({"conversations": []}, "alpaca", "conversations", "chat"),
        ({"prompt": "", "completion": ""}, "dolly", "prompt, completion", "raw"),
    ],
)
def test_columns_of_another_format_name_the_format_to_try(
    read, row, prompt_format, found, suggestion
):
    with pytest.raises(SettingError) as caught:
        read([row], prompt_format)
    assert caught.value.key == "data.prompt_format"
    assert caught.value.what.startswith(f"columns are {found}; expected ")
    assert f"`data.prompt_format: {suggestion}`" in caught.value.hints[0]


def test_unknown_columns_are_told_how_to_be_named(read):
    with pytest.raises(SettingError) as caught:
        read([{"question": "a", "answer": "b"}])
    assert (
        "expected instruction+response" in caught.value.what
        and "data.columns" in caught.value.hints[0]
    )


def test_columns_are_mapped(read):
    [example] = read(
        [{"question": "a", "answer": "b", "passage": "c", "kind": "d"}],
        columns={
            "instruction": "question",
            "response": "answer",
            "context": "passage",
            "category": "kind",
        },
    )
    assert example.fields == {"instruction": "a", "response": "b", "context": "c"}
    assert example.category == "d"


def test_alpaca_names_need_no_mapping(read):
    [example] = read([{"instruction": "a", "input": "b", "output": "c"}], "alpaca")
    assert example.fields == {"instruction": "a", "response": "c", "context": "b"}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"respons": "answer"}, "unknown name 'respons'"),
        ({"response": "answr"}, "no column 'answr'"),
    ],
)
def test_a_wrong_mapping_names_the_nearest(read, columns, words):
    with pytest.raises(SettingError, match=words) as caught:
        read([{"instruction": "a", "answer": "b"}], columns=columns)
    assert caught.value.hints[0].startswith("did you mean ") and caught.value.key == "data.columns"


def test_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(SettingError, match=r"^0 rows in "):
        named_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("value", "type_name"),
    [(None, "None"), (3, "int"), (float("nan"), "float nan"), (["a"], "list"), ({"a": 1}, "dict")],
)
@pytest.mark.parametrize(
    ("prompt_format", "column"), [("dolly", "response"), ("chat", "response"), ("raw", "text")]
)
def test_a_value_that_is_not_text_names_line_column_and_type(
    write_jsonl, value, type_name, prompt_format, column
):
    good = {"instruction": "a", "response": "b", "text": "c"}
    path = write_jsonl([good, good | {column: value}, good, good | {column: value}])
    with pytest.raises(DataError) as caught:
        named_rows(path, prompt_format)
    error = caught.value
    assert error.line == 2 and error.file.endswith("rows.jsonl")
    assert f"column '{column}': expected text, found {type_name}" in error.what
    assert "1 more" in error.hints[0] and "rows.jsonl:4" in error.hints[0]


def test_messages_as_prompt_and_completion_need_chat(read):
    row = {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    assert read([row], "chat")[0].fields == row
    with pytest.raises(DataError, match="column 'prompt': expected text, found list"):
        read([row], "raw")
    with pytest.raises(DataError, match="one is text, the other a list"):
        read([row | {"completion": "b"}], "chat")


def test_a_column_missing_in_one_row_is_said_so(read):
    with pytest.raises(DataError, match="missing in this row"):
        read([{"instruction": "a", "response": "b"}, {"instruction": "a"}])


def test_a_missing_context_is_an_empty_one(named):
    rows = named(
        [
            {"instruction": "a", "context": None, "response": "b"},
            {"instruction": "a", "context": "", "response": "b"},
        ]
    )
    assert next(rows.with_texts()).fields["context"] == "" and rows[0].content == rows[1].content


def test_a_lone_surrogate_names_line_and_position(write_jsonl):
    path = write_jsonl(
        [{"instruction": "a", "response": "b"}, {"instruction": "a", "response": "x\ud83dy"}]
    )
    with pytest.raises(
        DataError, match=r"column 'response': lone surrogate '\\ud83d' at character 1"
    ) as caught:
        named_rows(path)
    assert caught.value.line == 2
    assert str(caught.value).encode()  # the message itself must be printable


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["a", "b", "a"], "id 'a' appears again"),
        (["a", None, "b"], "no usable id, found None"),
        (["a", "", "b"], "no usable id, found empty text"),
        (["a", 1, 2], "ids of mixed types: int here, str"),
        ([1.5, 2.5, 3.5], "no usable id, found float"),
    ],
)
def test_ids_must_be_there_unique_and_of_one_type(read, ids, words):
    with pytest.raises(DataError, match=words) as caught:
        read([{"id": id, "instruction": f"{i}", "response": "b"} for i, id in enumerate(ids)])
    assert "data.columns.id to ''" in " ".join(caught.value.hints)


def test_an_id_column_can_be_left_alone(read):
    examples = read(
        [{"id": "a", "instruction": f"{i}", "response": "b"} for i in range(2)], columns={"id": ""}
    )
    assert len({example.id for example in examples}) == 2


def test_ids_do_not_depend_on_order_format_or_extra_columns(read):
    rows = [{"instruction": f"{i}", "context": "", "response": "b"} for i in range(5)]
    ids = [example.id for example in read(rows)]
    assert [example.id for example in read(rows[::-1])][::-1] == ids
    assert [
        example.id for example in read([row | {"category": "x"} for row in rows], "alpaca")
    ] == ids
    assert [example.id for example in read(rows, "chat")] == ids


def test_exact_duplicates_share_content_but_not_the_id(named):
    rows = named(
        [{"instruction": "a ", "response": "b\r\nc"}, {"instruction": "a", "response": "b\nc"}]
    )
    assert rows[0].content == rows[1].content and rows[1].id == f"{rows[0].id}#2"


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TASK = {"instruction": "a", "response": "b"}


@pytest.mark.parametrize(
    ("row", "prompt_format", "name"),
    [
        ({**TASK, "history": [["earlier", "turn"]]}, "dolly", "history"),
        ({**TASK, "system": "Be brief."}, "alpaca", "system"),
        ({"text": "a", "tools": [{"name": "f"}]}, "raw", "tools"),
        ({**TASK, "chat_template_kwargs": {"a": 1}}, "dolly", "chat_template_kwargs"),
        ({"messages": TURNS, "documents": [{"title": "t"}]}, "chat", "documents"),
        ({"messages": [TURNS[0], {**TURNS[1], "name": "Ann"}]}, "chat", "messages.name"),
        (
            {"messages": [{**TURNS[0], "tool_calls": [{}, 1]}, TURNS[1]]},
            "chat",
            "messages.tool_calls",
        ),
        (
            {"prompt": TURNS[:1], "completion": [{**TURNS[1], "audio": "x"}]},
            "chat",
            "messages.audio",
        ),
    ],
)
def test_a_column_or_key_that_changes_what_a_row_says_is_refused_by_name_until_the_recipe_drops_it(
    read, row, prompt_format, name
):
    with pytest.raises(DataError) as caught:
        read([row], prompt_format)
    assert caught.value.line == 1 and caught.value.what.startswith(f"{name}: not supported")
    assert f"to train without it: data.drop_columns: [{name}]" in caught.value.hints
    if "content" in str(row.get("messages", "content")[-1]):
        assert len(read([row], prompt_format, drop_columns=[name])) == 1


@pytest.mark.parametrize(
    "value", [None, "", [], {}, [None], {"name": None}, "[]", "{}", "null", " "]
)
def test_a_column_that_says_nothing_changes_nothing(read, value):
    assert len(read([{"messages": TURNS, "tools": value, "history": value}], "chat")) == 1


def test_a_system_column_is_the_system_message(read):
    [alone] = read([{"messages": TURNS, "system": "Be brief."}], "chat")
    [task] = read([{**TASK, "system": "Be brief."}], "chat")
    [other_name] = read([{**TASK, "system_prompt": "Be brief."}], "chat")
    [empty] = read([{**TASK, "system": None}], "chat")
    for example in (alone, task, other_name):
        assert conversation_of(example, "the recipe's")[0] == {
            "role": "system",
            "content": "Be brief.",
        }
    assert conversation_of(empty, "the recipe's")[0] == {
        "role": "system",
        "content": "the recipe's",
    }
    with pytest.raises(DataError, match="a system message and another text in column 'system'"):
        read(
            [
                {
                    "messages": [{"role": "system", "content": "Be long."}, *TURNS],
                    "system": "Be brief.",
                }
            ],
            "chat",
        )


def test_rows_that_differ_in_the_system_column_or_a_weight_are_not_duplicates(named):
    silent = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS]
    rows = [
        {"messages": TURNS * 2},
        {"messages": TURNS * 2, "system": "Be brief."},
        {"messages": silent},
    ]
    assert len({example.content for example in named(rows, "chat").examples}) == 3


def test_columns_that_nothing_reads_are_listed(named):
    rows = [
        {"messages": TURNS, "source": "web", "category": "a"},
        {"messages": TURNS, "source": "web", "score": 3},
    ]
    [(file, columns)] = named(rows, "chat").unused_columns().items()
    assert file.endswith("rows.jsonl") and columns == ["source", "score"]


def test_a_message_key_that_says_what_is_learned_cannot_be_dropped(read):
    with pytest.raises(SettingError, match="weight cannot be left out"):
        read([{"messages": TURNS}], "chat", drop_columns=["messages.weight"])


def test_all_bad_rows_are_named_at_once_and_counted_by_what_is_wrong(named):
    good = {"messages": TURNS}
    rows = [
        good,
        {"messages": TURNS[:1]},
        {"messages": TURNS, "history": [["a", "b"]]},
        {"messages": None},
    ]
    rows += [
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": TURNS[:1]},
        {**good, "messages": TURNS[:1]},
    ]
    with pytest.raises(DataError) as caught:
        named(rows, "chat")
    said = str(caught.value)
    assert (
        caught.value.line == 2 and "rows.jsonl:2: no assistant turn" in said and "2 more: " in said
    )
    for words in (
        "rows.jsonl:3: history: not supported",
        "rows.jsonl:4: column 'messages'",
        "rows.jsonl:5: column",
        "(6 of 7): data.on_bad_row: skip",
    ):
        assert words in said


def test_ids_of_another_type_than_the_first_are_each_named_and_skipped(write_jsonl):
    bad = BadRows()
    path = write_jsonl([{"id": id, **TASK} for id in (1, "a", 2, "b")])
    rows = read_data(DataSection(source=str(path)), bad)
    assert (
        [example.id for example in rows.examples] == ["1", "2"]
        and [example.line for example, _ in bad.found] == [2, 4]
        and rows.num_read == 4
    )


WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {}}}


def test_tools_and_template_arguments_have_columns_of_their_own(read):
    wrapped = [{"type": "function", "function": WEATHER}]
    rows = [
        {"messages": TURNS, "tools": tools, "chat_template_kwargs": kwargs}
        for tools, kwargs in (
            ([WEATHER], {"enable_thinking": False, "python_tools": None}),
            (json.dumps(wrapped), '{"enable_thinking": false}'),
        )
    ]
    rows.append({"messages": TURNS, "tools": "[]", "chat_template_kwargs": {"a": None}})
    first, second, bare = read(rows, "chat")
    given = {"enable_thinking": True, "reasoning_effort": "low"}
    assert (
        template_values(first, given)
        == template_values(second, given)
        == {
            "enable_thinking": False,
            "reasoning_effort": "low",
            "tools": wrapped,
        }
    )
    assert template_values(bare, given) == given
    [mapped] = read([{"messages": TURNS, "mine": [WEATHER]}], "chat", columns={"tools": "mine"})
    assert template_values(mapped, {}) == {"tools": wrapped}
    assert second.id == f"{first.id}#2" and bare.id != first.id


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tools": WEATHER}, "column 'tools': expected a list of tools, found dict"),
        ({"tools": "weather"}, "column 'tools': not JSON (Expecting value): 'weather'"),
        ({"tools": ["weather"]}, "column 'tools', tool 0: no function with a name in it"),
        ({"functions": WEATHER}, "column 'functions': expected a list of tools, found dict"),
        ({"chat_template_kwargs": [1]}, "column 'chat_template_kwargs': expected an object, found"),
        ({"chat_template_kwargs": {"tools": "f"}}, "tools is no template argument"),
        ({"conversations": TURNS}, "columns 'messages' and 'conversations' both hold a conversati"),
    ],
)
def test_bad_tools_template_arguments_and_two_conversations_in_one_row_are_described(
    read, row, words
):
    with pytest.raises(DataError) as caught:
        read([{"messages": TURNS}, {"messages": TURNS, **row}], "chat")
    assert caught.value.line == 2 and words in caught.value.what and caught.value.hints


def test_one_of_two_conversations_is_read_where_the_recipe_says_which(read):
    both = {"messages": TURNS, "conversations": TURNS[:1]}
    for keys in ({"columns": {"messages": "messages"}}, {"drop_columns": ["conversations"]}):
        assert read([both], "chat", **keys)[0].fields["messages"] == TURNS


def test_what_arrow_fills_in_with_null_is_not_there(tmp_path):
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "f", "arguments": {"a": 1}}],
    }
    other = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "g", "arguments": {"b": 2}}],
    }
    rows = [
        {"messages": [TURNS[0], one], "chat_template_kwargs": kwargs}
        for one, kwargs in ((call, {"x": 1}), (other, {"y": 2}), (TURNS[1], None))
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = list(named_rows(tmp_path / "rows.parquet", "chat").with_texts())
    assert [message_texts(example.fields["messages"][1])[1:] for example in found] == [
        ['{"name": "f", "arguments": {"a": 1}}'],
        ['{"name": "g", "arguments": {"b": 2}}'],
        [],
    ]
    assert [template_values(example, {}) for example in found] == [{"x": 1}, {"y": 2}, {}]
