"""The two calls every YAML file goes through: read with places, then parsed as a model, with all
errors at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from recipes_lib.config.documents import Document, read
from recipes_lib.config.parsing import FilePath, Section, parse
from recipes_lib.core.errors import RecipeError, RecipeErrors


class Part(Section):
    file: FilePath
    weight: float = Field(1.0, gt=0)


class Inner(Section):
    gone: ClassVar = {"lr": "write inner.rate"}

    rate: float | None = None
    count: int = Field(1, ge=1)
    on: bool = False
    when: Literal["no", "steps", "epoch"] = "no"
    rows: FilePath | list[Part] | None = None


class Outer(Section):
    inner: Inner = Inner()
    names: list[str] = []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def errors_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(Outer, read(path, overrides))
    return [str(error) for error in caught.value.errors]


def test_everything_wrong_is_said_at_once_at_its_line_with_a_remedy(folder: Path) -> None:
    path = write(
        "a.yaml",
        "inner:\n  count: 0\n  cuont: 1\n  rate: '1'\n  on: 1\n  when: step\n  lr: 3\n"
        "  count: 2\nnames: x\ninnner: {}\n",
    )
    said = dict(error.split(": ", 1) for error in errors_of(path))
    expected = {
        3: "did you mean inner.count?",
        4: "remove the quotes: 1",
        5: "inner.on must be",
        6: "did you mean steps?",
        7: "write inner.rate",
        8: "duplicate key 'inner.count': lines 2 and 8",
        9: "names must be",
        10: "did you mean inner?",
    }
    assert len(said) == len(expected)
    missing = [line for line, words in expected.items() if words not in said[f"a.yaml:{line}"]]
    assert not missing, said


WRONG_TYPES = [
    "count: true",
    "count: '16'",
    "count: 4.0",
    "rate: true",
    "rate: .nan",
    "on: 'true'",
    "rows: [{file: x, weight: 0}]",
    "rows: [{weight: 1}]",
    "rows: [{file: x, wieght: 1}]",
    "rows: 5",
]


def test_a_value_of_another_type_is_one_error_at_its_line(folder: Path) -> None:
    for text in WRONG_TYPES:
        errors = errors_of(write("a.yaml", f"inner:\n  {text}\n"))
        assert len(errors) == 1, errors
        assert errors[0].startswith("a.yaml:2: inner.") or "'inner." in errors[0], errors


def test_numbers_and_words_are_read_as_yaml_1_2_does(folder: Path) -> None:
    path = write("a.yaml", "inner: {rate: 2e-5, when: no}\nnames: [no, '16', 010, 1:30, x]\n")
    parsed = parse(Outer, read(path))
    assert (parsed.inner.rate, parsed.inner.when) == (2e-5, "no")
    assert parsed.names == ["no", "16", "010", "1:30", "x"]


def test_a_diamond_of_parents_is_read_once_each_and_every_value_has_its_place(
    folder: Path,
) -> None:
    write("top.yaml", "inner: {count: 1, rate: 1}\n")
    write("left.yaml", "extends: top.yaml\ninner:\n  count: 2\n")
    write("right.yaml", "extends: top.yaml\nnames: [a]\n")
    path = write("a.yaml", "extends: [left.yaml, right.yaml]\nnames:\n- b\n")
    document = read(path, ["inner.when=no"])
    parsed = parse(Outer, document)
    assert (parsed.inner.count, parsed.names) == (2, ["b"])
    places = {key: str(document.origin(key)) for key in ("inner.count", "names", "inner.when")}
    assert places == {
        "inner.count": "left.yaml:3",
        "names": "a.yaml:2",
        "inner.when": "command line",
    }
    assert document.replaced["inner", "count"] == 1


def test_paths_are_meant_from_the_file_that_wrote_them(folder: Path) -> None:
    write("rows/r.jsonl", "")
    write("base/b.yaml", "inner: {rows: ../rows/r.jsonl}\n")
    path = write("sub/a.yaml", "extends: ../base/b.yaml\n")
    os.chdir("sub")
    assert parse(Outer, read("a.yaml")).inner.rows == str(folder / "rows/r.jsonl")
    os.chdir(folder)
    parsed = parse(Outer, read(path, ["inner.rows=[{file: rows/r.jsonl}]"]))
    assert isinstance(parsed.inner.rows, list)
    assert parsed.inner.rows[0].file == str(folder / "rows/r.jsonl")


def test_rules_judge_what_is_sound_beside_what_is_not(folder: Path) -> None:
    def rule(value: Outer, document: Document) -> Iterator[RecipeError]:
        if value.inner.count > 5:
            yield document.error("inner.count", "inner.count is above 5")
        if value.inner.rate is None:
            document.warn("inner", "no rate")

    document = read(write("a.yaml", "inner:\n  count: 6\n  rate: x\n"))
    with pytest.raises(RecipeErrors) as caught:
        parse(Outer, document, rule)
    assert [error.line for error in caught.value.errors] == [2, 3]
    assert [str(warning) for warning in document.warnings] == ["a.yaml:1: warning: no rate"]


BOMB = """\
a: &a [x, x, x, x, x, x, x, x, x, x]
b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]
c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]
d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]
"""
NO_YAML = [
    ("a: [1\n", "a.yaml:"),
    (BOMB, "aliases expand"),
    ("a: !!python/object/apply:os.system [ls]\n", "tags are not allowed"),
    ("run:\n  notes: ${HOME}\n", "no interpolation"),
    ("run: {notes: hf_abcdefghijklmnopqrstuvwx}\n", "looks like a secret"),
    ("extends: a.yaml\n", "a.yaml -> a.yaml"),
    ("run: 1\nextends: b.yaml\n", "a.yaml:2: extends a file that does not exist"),
    ("", "is empty"),
    ("- 1\n", "holds no mapping"),
]


def test_what_is_no_yaml_for_us_is_one_line(folder: Path) -> None:
    for text, words in NO_YAML:
        errors = errors_of(write("a.yaml", text))
        assert [error for error in errors if words in error], errors
        assert "abcdefghijklm" not in str(errors)


KINDS = [
    ({"model": {}}, "", "r.yaml", "recipe"),
    ({"lora": {}}, "", "sub/_b.yaml", "base"),
    ({"colour": 1}, "recipe", "_b.yaml", "base"),
    ({"distributed_type": "NO"}, "", "ddp.yaml", "accelerate"),
    ({"model_name_or_path": "a"}, "", "old.yaml", "flat"),
    ({"model": {}, "learning_rate": 1}, "", "r.yaml", "recipe"),
    ({"model": {}, "data": {}, "training": {"seed": 1}}, "", "r.yaml", "recipe"),
    ({"lora": {}, "base_model": "m"}, "", "r.yaml", "recipe"),
    ({"suite": {}, "judge": {}}, "", "e.yaml", "eval"),
    ({"base_model": "a", "sequence_len": 1}, "", "r.yaml", "foreign"),
    ({"model_name_or_path": "a", "finetuning_type": "lora"}, "", "r.yaml", "foreign"),
    ({"model_name_or_path": "a", "beta": 0.1}, "", "r.yaml", "foreign"),
]


def test_a_file_tells_its_kind_by_schema_line_or_keys() -> None:
    for values, schema, file, kind in KINDS:
        line = f"# yaml-language-server: $schema=../schema/{schema}.schema.json\n"
        assert Document(Path(file), values, line if schema else "").kind == kind, values
    line = "# yaml-language-server: $schema=poem.schema.json\n"
    with pytest.raises(RecipeError, match="schema 'poem'"):
        _ = Document(Path("r.yaml"), {"model": {}}, line).kind
