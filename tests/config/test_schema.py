from __future__ import annotations

import dataclasses
import json

import pytest
from jsonschema import Draft202012Validator

from recipes_lib.config import schema
from recipes_lib.config.constraints import NOT_IN_RECIPES, TIGHTENINGS
from recipes_lib.config.sections import TRAIN_DEFAULTS
from recipes_lib.config.vocabulary import RENAMES, load_schema, section_keys, subschema
from recipes_lib.core.project import project_root


def test_the_committed_schemas_are_those_of_the_installed_versions(capsys):
    assert schema.main(["--check"]) == 0, capsys.readouterr().out


def test_an_outdated_schema_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(schema, "project_root", lambda: tmp_path)
    assert schema.main(["--check"]) == 1
    assert "make schema" in capsys.readouterr().out
    assert schema.main([]) == 0
    assert (tmp_path / "schema/recipe.schema.json").read_bytes() == (
        project_root() / "schema/recipe.schema.json"
    ).read_bytes()
    assert schema.main(["--check"]) == 0


def test_the_committed_schema_is_a_legal_schema():
    Draft202012Validator.check_schema(load_schema())


def test_every_upstream_field_is_reachable_renamed_or_refused_with_a_reason():
    from peft import LoraConfig
    from trl import SFTConfig

    for section, cls in (("train", SFTConfig), ("lora", LoraConfig)):
        fields = {field.name for field in dataclasses.fields(cls)}
        known = set(section_keys(section)) | NOT_IN_RECIPES[section].keys() | RENAMES.keys()
        assert fields <= known
        assert set(section_keys(section)) <= fields


def test_no_table_names_a_key_that_does_not_exist():
    for section, keys in TIGHTENINGS.items():
        assert keys.keys() <= set(section_keys(section))
    for old, rename in RENAMES.items():
        assert rename.new is None or subschema(*rename.new.split(".")) is not None, old
        assert old not in section_keys("train"), old


def test_project_defaults_really_differ_from_upstream_and_have_a_reason():
    from trl import SFTConfig

    upstream = SFTConfig(output_dir="unused", use_cpu=True)
    for key, default in TRAIN_DEFAULTS.items():
        assert getattr(upstream, key) != default.value, key
        assert default.reason


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train.learning_rate", {"type": "number", "exclusiveMinimum": 0, "default": 2e-05}),
        ("train.lr_scheduler_kwargs", {"type": ["object", "null"]}),
        ("train.eval_strategy", {"enum": ["no", "steps", "epoch"]}),
        ("lora.r", {"type": "integer", "minimum": 1}),
        ("quantization.load_in_4bit", {"type": "boolean", "default": False}),
        ("quantization.llm_int8_threshold", {"type": "number", "default": 6.0}),
        ("data.split.method", {"enum": ["hash", "published", "none"]}),
        ("model.dtype", {"enum": ["auto", "float32", "bfloat16", "float16"]}),
    ],
)
def test_types_choices_and_bounds_come_from_the_classes(key, words):
    found = subschema(*key.split(".")) or {}
    assert {word: found.get(word) for word in words} == words
    assert found["description"]


def test_schemas_stay_below_the_size_of_a_file_people_can_open():
    assert len(json.dumps(load_schema())) < 200_000
