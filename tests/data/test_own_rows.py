from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from recipes_lib.core.errors import DataError
from recipes_lib.data.columns import look_at
from recipes_lib.data.files import guessed_encoding


@pytest.mark.parametrize(
    ("row", "prompt_format", "columns"),
    [
        ({"instruction": "a", "response": "b"}, "dolly", {}),
        (
            {"question": "a", "answer": "b"},
            "dolly",
            {"instruction": "question", "response": "answer"},
        ),
        (
            {"instruction": "a", "input": "c", "output": "b"},
            "dolly",
            {"context": "input", "response": "output"},
        ),
        (
            {"input": "a", "output": "b"},
            "dolly",
            {"instruction": "input", "response": "output", "context": ""},
        ),
        ({"messages": []}, "chat", {}),
        ({"conversations": []}, "chat", {"messages": "conversations"}),
        ({"prompt": "a", "completion": "b"}, "raw", {}),
        ({"text": "a"}, "raw", {}),
    ],
)
def test_columns_are_guessed_from_the_first_row(row, prompt_format, columns, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row) + "\nthis line is never read\n")
    found = look_at(path)
    assert found.prompt_formats[0] == prompt_format
    assert found.columns == columns
    assert found.whole_text == ("text" in row)


def as_json(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(rows))


def as_object(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps({"data": rows}))


def as_csv(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))


def as_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def as_saved_folder(path: Path, rows: list[dict[str, str]]) -> None:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", as_json),
        ("b.json", as_object),
        ("c.csv", as_csv),
        ("d.parquet", as_parquet),
        ("folder", as_saved_folder),
    ],
)
def test_every_kind_of_file_is_looked_into(name, write, tmp_path):
    write(tmp_path / name, [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}])
    assert look_at(tmp_path / name).columns == {"instruction": "question", "response": "answer"}


@pytest.mark.parametrize(
    ("name", "content", "line", "words"),
    [
        ("a.jsonl", '{"x": 1, "y": 2}', 1, "columns x, y are not understood"),
        ("a.jsonl", "", None, "no row"),
        ("a.jsonl", '{"x": 1,\n', 1, "not a JSON object"),
        ("a.json", "[]", None, "no row"),
        ("a.csv", "instruction,response\n", None, "no row"),
        ("a.txt", "a", None, "not a data file"),
        ("a.jsonl", None, None, "no such file"),
        ("a.parquet", "this is text", None, "cannot be read as parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_place(name, content, line, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words) as refused:
        look_at(tmp_path / name)
    assert str(refused.value.file).endswith(name) and refused.value.line == line


@pytest.mark.parametrize(
    ("name", "sign"),
    [("a.csv", ";"), ("a.csv", "\t"), ("a.csv", "|"), ("a.tsv", ";"), ("a.csv.gz", ";")],
)
def test_the_sign_between_the_columns_is_found(name, sign, tmp_path):
    content = f"instruction{sign}response\na{sign}b\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert look_at(tmp_path / name).delimiter == sign
    own = "\t" if name == "a.tsv" else ","
    (tmp_path / name).write_bytes(
        (gzip.compress if name.endswith(".gz") else bytes)(
            content.replace(sign.encode(), own.encode())
        )
    )
    assert look_at(tmp_path / name).delimiter is None


@pytest.mark.parametrize(
    ("encoding", "text", "found"),
    [
        ("latin-1", "Où est le café ?", "latin-1"),
        ("cp1252", "“Où”", "cp1252"),
        ("utf-8", "Où", None),
        ("utf-8-sig", "Ou", None),
        ("utf-16", "Où", None),  # it begins with a mark of its own, and the error says so
    ],
)
def test_an_encoding_that_is_not_utf_8_is_guessed(tmp_path, encoding, text, found):
    path = tmp_path / "rows.csv"
    path.write_text(f"question,answer\n{text},b\n", encoding=encoding)
    assert guessed_encoding(path) == found
    if encoding != "utf-16":
        assert look_at(path).encoding == found
    path.write_bytes(b"question,answer\n" + "Où".encode() + b"\xe9,b\n")
    assert guessed_encoding(path) is None  # damaged UTF-8 is not read as something else


def test_a_file_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    assert look_at(Path("~/rows.jsonl")).file == tmp_path / "rows.jsonl"
