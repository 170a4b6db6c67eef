"""Files that a crash damaged: the end is left out with one warning, all else is named; nothing is
read twice or held in memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes_lib.core.errors import DataError
from recipes_lib.core.files import read_object, read_rows, rows_from_the_end

LINES = [json.dumps({"step": step, "text": "é" * step}).encode() + b"\n" for step in range(1, 6)]


def write(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


def steps(path: Path, **options: bool) -> list[int]:
    return [row["step"] for row in read_rows(path, **options)]


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 6, "te',
        b"\0" * 9000,
        b'{"step": 6, "t\0\0\0\0',
        b"\xff\xfe\n",
        b'{"step": "\xff"}\n',
        b'{"st\n\0\0\n{"step"',
        b"[" * 5000,
    ],
    ids=["cut", "zeros", "cut and zeros", "no UTF-8", "no UTF-8 in JSON", "three lines", "deep"],
)
def test_damaged_last_lines_are_left_out_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tail: bytes
) -> None:
    path = write(tmp_path / "log.jsonl", *LINES, tail)
    assert steps(path) == steps(path) == [1, 2, 3, 4, 5]
    said = capsys.readouterr()
    assert (
        said.out == ""
        and said.err.count("\n") == 1
        and f"warning: {path}:6: the end of the file is damaged" in said.err
    )
    assert [row["step"] for _, row in rows_from_the_end(path)] == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("damage", [b"nonsense\n", b"\xff\n", b"\0\0\0\n", b'{"step": 3, "te\n'])
def test_damage_before_the_end_is_named_by_its_line_or_left_out_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: bytes
) -> None:
    path = write(tmp_path / "log.jsonl", *LINES[:2], damage, *LINES[3:])
    with pytest.raises(DataError, match="this line is damaged") as caught:
        steps(path)
    assert (caught.value.file, caught.value.line) == (path, 3)
    assert steps(path, skip_damaged=True) == [1, 2, 4, 5]
    assert f"{path}:3: this line is damaged and left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"some\nother\nfile\n", b'[1]\n{"step": 1}\n', b'{"step": 1}\n3\n']
)
def test_a_file_of_something_else_does_not_crash_the_reader(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError):
        steps(write(tmp_path / "log.jsonl", content))


def test_an_absent_file_has_no_rows(tmp_path: Path) -> None:
    assert steps(tmp_path / "no.jsonl") == [] == list(rows_from_the_end(tmp_path / "no.jsonl"))


@pytest.mark.parametrize("torn", [False, True])
def test_reading_from_the_end_gives_the_lines_in_reverse_with_their_ends(
    tmp_path: Path, torn: bool
) -> None:
    path = write(tmp_path / "log.jsonl", *LINES, b'{"torn' if torn else b"")
    ends = [sum(map(len, LINES[: number + 1])) for number in range(len(LINES))]
    found = [(end, row["step"]) for end, row in rows_from_the_end(path)]
    assert found == list(zip(reversed(ends), [5, 4, 3, 2, 1], strict=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "is empty"), ("{", "is damaged, not JSON"), ("\0" * 40, "is damaged"), ("[1]", "list")],
)
def test_a_damaged_object_is_one_line_with_its_file(
    tmp_path: Path, content: str, words: str
) -> None:
    path = tmp_path / "one.json"
    path.write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        read_object(path)
    assert str(caught.value).startswith(f"{path}: ")
