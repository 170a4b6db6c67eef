"""Files that a crash damaged: the end is left out, all else is named."""

import json
from pathlib import Path

import pytest

from recipes_lib.core import files
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import read_object, read_rows, write_json

LINES = [json.dumps({"step": step, "text": "é" * step}).encode() + b"\n" for step in range(1, 6)]
TAILS = [b'{"step": 6, "te', b"\0" * 9000, b'{"step": 6, "t\0\0\0\0', b"\xff\xfe\n"]
TAILS += [b'{"step": "\xff"}\n', b"[" * 5000]


def write(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_rows(path)]


def test_a_damaged_last_line_is_left_out(tmp_path):
    for number, tail in enumerate(TAILS):
        path = write(tmp_path / f"{number}.jsonl", *LINES, tail)
        assert steps(path) == [1, 2, 3, 4, 5]


def test_damage_before_the_end_is_named_by_its_line(tmp_path: Path) -> None:
    for number, damage in enumerate((b"nonsense\n", b"\xff\n", b"\0\0\0\n", b'{"st\n', b"[1]\n")):
        path = write(tmp_path / f"{number}.jsonl", *LINES[:2], damage, *LINES[3:])
        with pytest.raises(DataError, match="this line is damaged") as caught:
            steps(path)
        assert (caught.value.file, caught.value.line) == (path, 3)


def test_an_object_or_nothing_and_a_damaged_one_is_one_line_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    assert read_object(path) == {} and not steps(path)
    for content in ("", "{", "\0", "[1]"):
        path.write_text(content)
        with pytest.raises(DataError, match="is damaged") as caught:
            read_object(path)
        assert str(caught.value).startswith(f"{path}: ")
    write(path, b'{"text": "a\\ud800b\\u0000"}\n')  # what no tokenizer takes is replaced
    assert next(read_rows(path)) == {"text": "a\ufffdb\ufffd"}


def test_a_fingerprint_is_of_weights_and_settings_and_not_of_their_place(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    for name, modules in {"a": ["q", "v"], "b": ["v", "q"]}.items():
        settings = {"base_model_name_or_path": name, "target_modules": modules, "r": 8}
        write_json(tmp_path / name / "adapter_config.json", settings)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"weights")
    same = files.model_fingerprint(tmp_path / "a")
    assert files.model_fingerprint(tmp_path / "b") == same
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"others")
    assert files.model_fingerprint(tmp_path / "b") != same
    write_json(tmp_path / "a" / "adapter_config.json", {"target_modules": ["q", "v"], "r": 16})
    assert files.model_fingerprint(tmp_path / "a") != same
