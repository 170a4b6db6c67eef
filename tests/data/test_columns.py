from __future__ import annotations

import pytest

from recipes_lib.data.examples import BadRows, SettingError
from recipes_lib.data.rows import read_rows
from recipes_lib.errors import DataError
from recipes_lib.recipe.sections import DataSection


def named_rows(path, prompt_format="dolly", columns=None, **keys):
    """The rows of a file, or the error for those that cannot be used."""
    bad = BadRows()
    rows = read_rows(DataSection(source=str(path), prompt_format=prompt_format, columns=columns or {}, **keys), [], bad)
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
    return lambda *args, **keys: list(named(*args, **keys).examples())


@pytest.mark.parametrize(
    ("row", "prompt_format", "found", "suggestion"),
    [
        ({"instruction": "", "context": "", "response": "", "category": ""}, "raw", "instruction, context, response, category", "dolly"),
        ({"instruction": "", "input": "", "output": ""}, "raw", "instruction, input, output", "alpaca"),
        ({"messages": []}, "dolly", "messages", "chat"),
        ({"conversations": []}, "alpaca", "conversations", "chat"),
        ({"prompt": "", "completion": ""}, "dolly", "prompt, completion", "raw"),
    ],
)
def test_case_36_columns_of_another_format_name_the_format_to_try(read, row, prompt_format, found, suggestion):
    with pytest.raises(SettingError) as caught:
        read([row], prompt_format)
    assert caught.value.key == "data.prompt_format"
    assert caught.value.what.startswith(f"columns are {found}; expected ")
    assert f"`data.prompt_format: {suggestion}`" in caught.value.hints[0]


def test_unknown_columns_are_told_how_to_be_named(read):
    with pytest.raises(SettingError) as caught:
        read([{"question": "a", "answer": "b"}])
    assert "expected instruction+response" in caught.value.what and "data.columns" in caught.value.hints[0]


def test_columns_are_mapped(read):
    [example] = read(
        [{"question": "a", "answer": "b", "passage": "c", "kind": "d"}],
        columns={"instruction": "question", "response": "answer", "context": "passage", "category": "kind"},
    )
    assert example.fields == {"instruction": "a", "response": "b", "context": "c"}
    assert example.category == "d"


def test_alpaca_names_need_no_mapping(read):
    [example] = read([{"instruction": "a", "input": "b", "output": "c"}], "alpaca")
    assert example.fields == {"instruction": "a", "response": "c", "context": "b"}


@pytest.mark.parametrize(
    ("columns", "words"), [({"respons": "answer"}, "unknown name 'respons'"), ({"response": "answr"}, "no column 'answr'")]
)
def test_a_wrong_mapping_names_the_nearest(read, columns, words):
    with pytest.raises(SettingError, match=words) as caught:
        read([{"instruction": "a", "answer": "b"}], columns=columns)
    assert caught.value.hints[0].startswith("did you mean ") and caught.value.key == "data.columns"


def test_case_37_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(SettingError, match=r"^0 rows in "):
        named_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("value", "type_name"), [(None, "None"), (3, "int"), (float("nan"), "float nan"), (["a"], "list"), ({"a": 1}, "dict")]
)
@pytest.mark.parametrize(("prompt_format", "column"), [("dolly", "response"), ("chat", "response"), ("raw", "text")])
def test_case_42_a_value_that_is_no_text_names_line_column_and_type(write_jsonl, value, type_name, prompt_format, column):
    good = {"instruction": "a", "response": "b", "text": "c"}
    path = write_jsonl([good, good | {column: value}, good, good | {column: value}])
    with pytest.raises(DataError) as caught:
        named_rows(path, prompt_format)
    error = caught.value
    assert error.line == 2 and error.file.endswith("rows.jsonl")
    assert f"column '{column}': expected text, found {type_name}" in error.what
    assert "1 more" in error.hints[0] and "rows.jsonl:4" in error.hints[0]


def test_messages_as_prompt_and_completion_need_chat(read):
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    assert read([row], "chat")[0].fields == row
    with pytest.raises(DataError, match="column 'prompt': expected text, found list"):
        read([row], "raw")
    with pytest.raises(DataError, match="one is text, the other a list"):
        read([row | {"completion": "b"}], "chat")


def test_a_column_missing_in_one_row_is_said_so(read):
    with pytest.raises(DataError, match="missing in this row"):
        read([{"instruction": "a", "response": "b"}, {"instruction": "a"}])


def test_a_missing_context_is_an_empty_one(named):
    rows = named([{"instruction": "a", "context": None, "response": "b"}, {"instruction": "a", "context": "", "response": "b"}])
    assert next(rows.examples()).fields["context"] == "" and rows.content(0) == rows.content(1)


def test_case_43_a_lone_surrogate_names_line_and_position(write_jsonl):
    path = write_jsonl([{"instruction": "a", "response": "b"}, {"instruction": "a", "response": "x\ud83dy"}])
    with pytest.raises(DataError, match=r"column 'response': lone surrogate '\\ud83d' at character 1") as caught:
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
def test_case_51_ids_must_be_there_unique_and_of_one_type(read, ids, words):
    with pytest.raises(DataError, match=words) as caught:
        read([{"id": id, "instruction": f"{i}", "response": "b"} for i, id in enumerate(ids)])
    assert "data.columns.id to ''" in " ".join(caught.value.hints)


def test_an_id_column_can_be_left_alone(read):
    examples = read([{"id": "a", "instruction": f"{i}", "response": "b"} for i in range(2)], columns={"id": ""})
    assert len({example.id for example in examples}) == 2


def test_ids_do_not_depend_on_order_format_or_extra_columns(read):
    rows = [{"instruction": f"{i}", "context": "", "response": "b"} for i in range(5)]
    ids = [example.id for example in read(rows)]
    assert [example.id for example in read(rows[::-1])][::-1] == ids
    assert [example.id for example in read([row | {"category": "x"} for row in rows], "alpaca")] == ids
    assert [example.id for example in read(rows, "chat")] == ids


def test_exact_duplicates_share_content_but_not_the_id(named):
    rows = named([{"instruction": "a ", "response": "b\r\nc"}, {"instruction": "a", "response": "b\nc"}])
    assert rows.content(0) == rows.content(1) and rows.ids[1] == f"{rows.ids[0]}#2"
