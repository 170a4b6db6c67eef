from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes_lib.config.sections import data_format
from recipes_lib.core.errors import DataError, ExitCode
from recipes_lib.data.files import count_rows, read_file

ROWS = [{"instruction": "a", "response": 'é, "b"\nc'}, {"instruction": "d", "response": "e"}]


def lines_of(path: Path) -> list[int | None]:
    return [line for line, _ in read_file(path).numbered_rows]


def failure(path) -> DataError:
    with pytest.raises(DataError) as caught:
        _ = read_file(path).rows
    assert caught.value.exit_code == ExitCode.DATA
    assert str(path.name) in str(caught.value.file)
    return caught.value


def test_every_text_format_gives_the_same_rows(tmp_path):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps({"data": ROWS}), encoding="utf-8")
    (tmp_path / "d.csv").write_text(
        'instruction,response\na,"é, ""b""\nc"\nd,e\n', encoding="utf-8"
    )
    (tmp_path / "e.tsv").write_text(
        'instruction\tresponse\na\t"é, ""b""\nc"\nd\te\n', encoding="utf-8"
    )
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for path in sorted(tmp_path.iterdir()):
        table = read_file(path)
        assert table.rows == ROWS, path.name
        assert table.columns == ["instruction", "response"]


def test_parquet_and_both_arrow_forms_are_read(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as sink:
        sink.write_table(table)
    with pa.ipc.new_stream(tmp_path / "c.arrow", table.schema) as sink:
        sink.write_table(table)
    for path in sorted(tmp_path.iterdir()):
        assert read_file(path).rows == ROWS, path.name


def test_lines_are_those_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": "1"}\n\n{"x": "2"}\n')
    (tmp_path / "b.json").write_text('[\n {"x": "1"},\n\n {"x": "2"}\n]')
    (tmp_path / "c.csv").write_text('x,y\n"1\n1",2\n3,4\n')
    assert lines_of(tmp_path / "a.jsonl") == [1, 3]
    assert lines_of(tmp_path / "b.json") == [2, 4]
    assert lines_of(tmp_path / "c.csv") == [2, 4]


def test_a_byte_order_mark_and_windows_newlines_are_accepted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"x": "1"}\r\n{"x": "2"}\r\n')
    assert read_file(tmp_path / "a.jsonl").rows == [{"x": "1"}, {"x": "2"}]


def test_latin1_bytes_are_named_with_line_and_offset(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"x": "1"}\n{"x": "caf\xe9"}\n')
    error = failure(path)
    assert error.line == 2 and "byte 21 (0xe9) is not UTF-8" in error.what


def test_a_corrupt_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": "1"}\n{"x": "2"\n')
    assert failure(path).line == 2


def test_a_line_that_is_not_an_object_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": "1"}\n[1]\n')
    error = failure(path)
    assert error.line == 2 and "list" in error.what


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"x": "1"},\n{"x" "2"}]', 3),
        ('[\n{"x": "1"}\n', 3),
        ('{"a":\n', 2),
        ('{"a": 1,\n "b": 2}', 1),
    ],
)
def test_damaged_json_is_named_with_its_line(tmp_path, text, line):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert failure(path).line == line


def test_a_truncated_gzip_says_how_far_it_goes(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(
        gzip.compress(b"".join(b'{"x": "%d"}\n' % (i * 7919) for i in range(5000)))[:-2000]
    )
    error = failure(path)
    assert "truncated" in error.what and error.line > 1


def test_a_changed_byte_anywhere_in_a_gzip_is_the_files_fault(tmp_path):
    whole, path = (
        gzip.compress(b"".join(b'{"x": "%d"}\n' % (i * 7919) for i in range(2000))),
        tmp_path / "a.jsonl.gz",
    )
    kinds = set()
    for place in range(12, len(whole), len(whole) // 100):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        kinds.add(failure(path).what.partition(":")[0])
    assert "not a gzip file, or damaged" in kinds


def test_a_file_that_is_not_gzip_is_reported_as_such(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_text('{"x": "1"}\n')
    assert "gzip" in failure(path).what


def test_csv_with_nul_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"x,y\n1,2\n3,\x004\n")
    error = failure(path)
    assert error.line == 3 and "NUL" in error.what


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [("x,y\n1,2\n3\n", 3, "1 fields"), ("x,x\n1,2\n", 1, "twice"), ('x,y\n"1,2\n', 2, "CSV")],
)
def test_damaged_csv_is_named(tmp_path, text, line, word):
    path = tmp_path / "a.csv"
    path.write_text(text)
    error = failure(path)
    assert error.line == line and word in error.what


def test_a_damaged_parquet_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nonsense")
    assert "parquet" in failure(path).what


def test_formats_are_known_by_their_ending(tmp_path):
    assert data_format(tmp_path / "a.jsonl.gz") == ".jsonl"
    assert data_format(tmp_path / "README.md") is None
    assert data_format(tmp_path / "a.parquet.gz") is None
    assert "known endings" in failure_of_unknown(tmp_path).what


def failure_of_unknown(folder) -> DataError:
    path = folder / "a.txt"
    path.write_text("x")
    return failure(path)


def test_another_delimiter_is_an_option_and_its_lack_is_one_line(tmp_path):
    (tmp_path / "a.csv").write_text('instruction;response\n"a;b";c\n')
    error = failure(tmp_path / "a.csv")
    assert (
        error.line == 1
        and "separated by ';'" in error.what
        and 'data.delimiter: ";"' in error.hints[0]
    )
    assert read_file(tmp_path / "a.csv", delimiter=";").rows == [
        {"instruction": "a;b", "response": "c"}
    ]


@pytest.mark.parametrize(
    "encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32", "shift_jis"]
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_another_encoding_is_an_option(encoding, name, tmp_path):
    row = {"x": "あ" if encoding == "shift_jis" else "é"}
    texts = {
        "a.jsonl": json.dumps(row, ensure_ascii=False),
        "a.json": json.dumps([row], ensure_ascii=False),
        "a.csv": f"x\n{row['x']}",
    }
    (tmp_path / name).write_bytes((texts[name] + "\n").encode(encoding))
    assert read_file(tmp_path / name, encoding=encoding).rows == [row]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_file_that_is_not_in_its_encoding_is_one_line(name, tmp_path):
    (tmp_path / name).write_bytes(b'{"x": "caf\xe9"}\n')
    for encoding in ("utf-8", "ascii", "utf-16"):
        with pytest.raises(DataError, match="encoding may say") as caught:
            _ = read_file(tmp_path / name, encoding=encoding).rows
        assert caught.value.line == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json"])
def test_a_key_that_stands_twice_in_an_object_is_refused_and_not_halved(name, tmp_path):
    text = '{"response": "a", "response": "b"}'
    (tmp_path / name).write_text(f"[{text}]" if name == "b.json" else text)
    assert "the key 'response' appears twice" in failure(tmp_path / name).what


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, f'[{{"a": {"9" * 5000}}}]'])
def test_json_beyond_what_python_reads_is_one_line(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    assert failure(tmp_path / "a.json").line == 1


def test_what_stands_beside_the_list_of_rows_is_not_ignored(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps({"data": ROWS, "system": "Be brief.", "test": []}, indent=1)
    )
    error = failure(tmp_path / "a.json")
    assert (
        error.what == "beside the list 'data' there is system, which would be ignored"
        and "jq .data" in error.hints[0]
    )
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS, "test": []}, indent=1))
    assert read_file(tmp_path / "a.json").rows == ROWS


def test_columns_of_one_name_are_refused_in_every_format(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["x", "x"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as sink:
        sink.write_table(table)
    with pa.ipc.new_stream(tmp_path / "c.arrow", table.schema) as sink:
        sink.write_table(table)
    (tmp_path / "d.csv").write_text("x,x\na,b\n")
    for path in sorted(tmp_path.iterdir()):
        assert failure(path).what == "column names appear twice: x"


def test_rows_are_counted_without_reading_them(tmp_path):
    rows = [{"x": str(number)} for number in range(25_000)]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode() + b"\n"))
    (tmp_path / "c.csv").write_text("x\n" + "\n".join(row["x"] for row in rows) + "\n")
    (tmp_path / "d.json").write_text(json.dumps(rows))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "e.parquet")
    with pa.ipc.new_file(tmp_path / "f.arrow", table.schema) as sink:
        sink.write_table(table)
    assert {path.name: count_rows(path) for path in tmp_path.iterdir()} == dict.fromkeys(
        ("a.jsonl", "b.jsonl.gz", "c.csv", "d.json", "e.parquet", "f.arrow"), 25_000
    )
    (tmp_path / "empty.jsonl").touch()
    assert count_rows(tmp_path / "empty.jsonl") == 0


def test_a_path_from_home_is_read_and_what_is_wrong_with_its_name_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    endings = "; known endings: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, text formats"
    assert failure(Path("~/labels")).what.startswith("no such file" + endings)
    (tmp_path / "labels").write_text('{"x": "1"}')
    assert failure(Path("~/labels")).what.startswith("not a data file" + endings)
    (tmp_path / "labels.jsonl").write_text('{"x": "1"}')
    assert read_file(Path("~/labels.jsonl")).rows == [{"x": "1"}]
