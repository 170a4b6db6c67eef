"""A sample is written and read without loss, as its schema says."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import jsonschema
import pytest

from recipes_lib.eval_log import Sample

SCHEMA = json.loads(
    (Path(__file__).parents[1] / "schema" / "eval_result.schema.json").read_text(encoding="utf-8")
)
WHOLE = Sample(
    "81",
    2,
    "math",
    0.5,
    "tie",
    ("A", "A"),
    False,
    (3, 4),
    "asked",
    "yes",
    "nope",
    ("first", None),
    False,
)


@pytest.mark.parametrize(
    "sample",
    [
        WHOLE,
        Sample("q"),
        Sample("q", answer="begi", shortened=True, verdicts=("4",), value=4.0, by_rule=True),
    ],
)
def test_a_sample_is_read_as_it_was_written(sample: Sample) -> None:
    row = json.loads(json.dumps(sample.to_dict("win_rate")))
    assert Sample.from_dict(row) == sample
    jsonschema.validate(row, {"$ref": "#/$defs/sample", "$defs": SCHEMA["$defs"]})


@pytest.mark.parametrize(
    "wrong", [{"turn": 0}, {"verdicts": [4]}, {"raws": [1]}, {"lengths": ["3"]}, {"answer": None}]
)
def test_a_line_that_is_no_sample_is_refused(wrong: dict[str, object]) -> None:
    row = json.loads(json.dumps(WHOLE.to_dict("win_rate"))) | wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(row, {"$ref": "#/$defs/sample", "$defs": SCHEMA["$defs"]})


def test_every_field_of_a_sample_is_in_its_schema() -> None:
    names = {"id": "question_id", "input": "instruction", "opponent": "opponent_answer"}
    expected = {names.get(one.name, one.name) for one in fields(Sample)} | {"metric", "task"}
    assert SCHEMA["$defs"]["sample"]["properties"].keys() == expected


def test_a_verdict_turns_with_the_order_only_where_a_judge_named_one_place_twice() -> None:
    said = {
        ("A", "A"): True,
        ("B", "B"): True,
        ("A", "B"): False,
        ("tie", "tie"): False,
        ("A",): False,
        ("unparsed", "unparsed"): False,
    }
    assert {verdicts: Sample("q", verdicts=verdicts).flip for verdicts in said} == said
    assert not Sample("q", verdicts=("A", "A"), by_rule=True).flip
