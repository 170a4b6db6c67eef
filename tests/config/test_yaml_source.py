from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes_lib.config import yaml_source
from recipes_lib.config.yaml_source import parse_yaml, read_yaml
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("6.02e+23", 6.02e23),
        ("1_000", 1000),
        ("0x1F", 31),
        ("'2e-5'", "2e-5"),
        ("08", "08"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("a: {}", {"a": {}}),
        ("NO: 1", {"NO": 1}),
        ("1: x", {"1": "x"}),
    ],
)
def test_plain_text_is_read_as_people_expect(text, value):
    assert parse_yaml(text, "f").values == value


def test_numbers_that_are_none_are_read_as_such():
    assert math.isnan(parse_yaml(".nan", "f").values)
    assert parse_yaml("-.inf", "f").values == -math.inf


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", True),
        ("Off", False),
        ("010", 8),
        ("1:30", 90),
        ("08", "08"),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_surprising_spellings_keep_their_yaml_value_and_warn(text, value):
    source = parse_yaml(f"a:\n  b: {text}\n", "f")
    assert source.values == {"a": {"b": value}}
    [warning] = source.warnings
    assert (warning.file, warning.line) == ("f", 2)
    assert "a.b" in warning.what
    assert f'"{text}"' in warning.hints[0]


@pytest.mark.parametrize("text", ["true", "False", "'yes'", "7", "0", "0.5", "null"])
def test_ordinary_spellings_do_not_warn(text):
    assert not parse_yaml(f"a: {text}\n", "f").warnings


def test_every_key_and_list_item_has_its_line():
    source = parse_yaml("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n", "f")
    assert source.lines == {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 3,
        ("a", "c", 0): 4,
        ("a", "c", 1): 5,
        ("a", "c", 1, "d"): 5,
    }


def test_an_alias_is_the_value_it_names():
    assert parse_yaml("a: &x [1]\nb: *x\n", "f").values == {"a": [1], "b": [1]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [*a]", "aliases"),
        ("a: !str 1", "tags are not allowed"),
        ("a: {<<: {b: 1}}", "merge keys"),
        ("? [a]\n: 1", "plain text"),
        ("a: 1\n---\nb: 2", "one document"),
        ("a: b: c", "second ':'"),
        ("a: " + "[" * 3000, "YAML"),
        ("a: \x01", "YAML"),
    ],
)
def test_what_a_recipe_never_needs_is_refused_in_one_line(text, words):
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "f")
    assert words in str(caught.value) or "nested" in str(caught.value)


def test_several_duplicates_are_reported_together():
    with pytest.raises(RecipeError) as caught:
        parse_yaml("a: 1\na: 2\nb: 1\nb: 2\n", "f")
    assert "lines 1 and 2" in str(caught.value)
    assert "lines 3 and 4" in str(caught.value)


def test_a_caret_stands_under_the_place():
    with pytest.raises(RecipeError) as caught:
        parse_yaml("a:\n  b: 'x\n", "f")
    excerpt, caret = caught.value.hints
    assert excerpt[caret.index("^")] == "'"


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_bytes(b"a: 1\n" * 300_000)
    with pytest.raises(RecipeError, match="larger than 1 MB"):
        read_yaml(path)


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused_with_our_error(text):
    try:
        parse_yaml(text, "f")
    except RecipeError as error:
        assert str(error).startswith("f:")


@pytest.mark.skipif(yaml_source._FAST_LOADER is None, reason="PyYAML was built without libyaml")
def test_libyaml_reads_what_pyyaml_reads(monkeypatch):
    """With the same lines, warnings and problems; and whatever it reads otherwise is not left
    to it.
    """
    folders = ("recipes", "evals", "accelerate_configs", "launch")
    files = [file for name in folders for file in (project_root() / name).glob("**/*.yaml")]
    odd = ["a: !!str 1", "a:\tb", "? k", "{a? 1}", "|# x", "%YAML 1.1\n---\n1", "- ", "a: é"]
    odd += [
        "NO",
        "010",
        "1:30",
        "a: [x,]",
        "a: &b {c: '1'}\nd: *b",
        "a: 1\na: 2",
        "'it''s': \"\\t\"",
    ]
    texts = [*odd, *(file.read_text(encoding="utf-8") for file in files)]

    def read(text: str) -> object:
        yaml_source._compose.cache_clear()
        try:
            return parse_yaml(text, "f", keep_going=True)
        except RecipeError as error:
            return str(error)

    def told(text: str) -> str:
        return str(getattr(found := read(text), "__dict__", found))

    fast = [told(text) for text in texts]
    monkeypatch.setattr(yaml_source, "_FAST_LOADER", None)
    for text, found in zip(texts, fast, strict=True):
        assert told(text) == found
    easy = [text for text in texts if not yaml_source._PYYAML_ALONE.search(text)]
    assert len(files) > 50 and len(easy) > 20
