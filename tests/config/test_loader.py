from __future__ import annotations

from pathlib import Path

import pytest

from recipes_lib.config.loader import COMMAND_LINE, load_document
from recipes_lib.core.errors import RecipeError


def origins(document) -> dict[str, str]:
    return {".".join(map(str, path)): str(origin) for path, origin in document.origins.items()}


def test_mappings_merge_and_lists_and_scalars_replace(write):
    write("train: {seed: 1, bf16: true}\nlora: {r: 8, target_modules: [a, b]}\n", "_b.yaml")
    write("extends: _b.yaml\ntrain: {seed: 2}\nlora: {target_modules: [c]}\n")
    document = load_document("r.yaml")
    assert document.values == {
        "train": {"seed": 2, "bf16": True},
        "lora": {"r": 8, "target_modules": ["c"]},
    }
    assert origins(document)["train.seed"] == "r.yaml:2"
    assert origins(document)["train.bf16"] == "_b.yaml:1"
    assert origins(document)["lora.target_modules.0"] == "r.yaml:3"
    assert "lora.target_modules.1" not in origins(document)


def test_null_sets_null_and_a_mapping_replaces_null(write):
    write("lora: {r: 8}\n", "_b.yaml")
    write("extends: _b.yaml\nlora: null\n", "_full.yaml")
    write("extends: _full.yaml\nlora: {r: 4}\n")
    assert load_document("_full.yaml").values == {"lora": None}
    assert load_document("r.yaml").values == {"lora": {"r": 4}}


def test_later_parents_win_and_a_diamond_applies_its_top_once(write):
    write("train: {seed: 0, bf16: true}\n", "_top.yaml")
    write("extends: _top.yaml\ntrain: {seed: 1}\n", "_left.yaml")
    write("extends: _top.yaml\ntrain: {bf16: false}\n", "_right.yaml")
    write("extends: [_left.yaml, _right.yaml]\nlora: {r: 8}\n")
    document = load_document("r.yaml")
    assert document.values["train"] == {"seed": 1, "bf16": False}
    assert document.levels == 2


def test_parents_are_found_from_the_file_that_names_them(write):
    write("lora: {r: 8}\n", "shared/_b.yaml")
    write("extends: ../shared/_b.yaml\n", "sub/r.yaml")
    assert origins(load_document("sub/r.yaml"))["lora.r"] == "shared/_b.yaml:1"


@pytest.mark.parametrize(("value", "line"), [("7", 1), ("", 1), ("[a.yaml, 3]", 1)])
def test_extends_must_name_files(value, line, write):
    write("lora: {r: 8}\n", "a.yaml")
    write(f"extends: {value}\ntrain: {{seed: 1}}\n")
    with pytest.raises(RecipeError, match="file name or a list of file names") as caught:
        load_document("r.yaml")
    assert caught.value.line == line


def test_extending_another_kind_is_refused(write):
    write("distributed_type: 'NO'\n", "acc.yaml")
    write("extends: acc.yaml\n")
    with pytest.raises(RecipeError, match="is an accelerate config"):
        load_document("r.yaml")


@pytest.mark.parametrize("word", ["train.learning_rate=2e-5", "--train.learning_rate=2e-5"])
def test_an_override_is_yaml_and_comes_from_the_command_line(word, write):
    document = load_document(write(), [word])
    assert document.values["train"] == {"seed": 1, "learning_rate": 2e-5}
    assert origins(document)["train.learning_rate"] == COMMAND_LINE
    assert origins(document)["train.seed"] == "r.yaml:8"


def test_overrides_reach_null_lists_and_whole_sections(write):
    document = load_document(
        write(),
        ["lora=null", "data.columns={response: output}", "run.tags=[a, b]", "run.notes=a=b"],
    )
    assert document.values["lora"] is None
    assert document.values["data"]["columns"] == {"response": "output"}
    assert document.values["run"] == {"tags": ["a", "b"], "notes": "a=b"}


@pytest.mark.parametrize(
    ("word", "form"),
    [
        ("learning_rate=1e-4", "train.learning_rate=1e-4"),
        ("--learning_rate=1e-4", "train.learning_rate=1e-4"),
        ("--learning-rate=1e-4", "train.learning_rate=1e-4"),
        ("--learning_rate", "train.learning_rate=VALUE"),
        ("lora_r=8", "lora.r=8"),
        ("--model_name_or_path=a/b", "model.name_or_path=a/b"),
        ("max_seq_length=512", "train.max_length=512"),
    ],
)
def test_a_bare_trl_flag_is_told_the_dotted_form(word, form, write):
    with pytest.raises(RecipeError) as caught:
        load_document(write(), [word])
    assert f"write {form}" in str(caught.value)
    assert caught.value.file == COMMAND_LINE


@pytest.mark.parametrize("word", ["train.seed", "=3", "train.=3", ".seed=3"])
def test_a_word_that_is_no_override_is_refused(word, write):
    with pytest.raises(RecipeError, match=r"is not section\.key=value") as caught:
        load_document(write(), [word])
    assert caught.value.file == COMMAND_LINE


def test_a_surprising_override_warns_with_its_key(write):
    [warning] = load_document(write(), ["run.name=NO"]).warnings
    assert "run.name" in warning.what
    assert "NO is read as false" in warning.what


def test_a_parent_that_is_a_link_to_itself_is_an_error_at_its_line(write):
    Path("loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(
        RecipeError, match=r"r.yaml:1: extends a file that does not exist: loop.yaml"
    ):
        load_document(write("extends: loop.yaml\nmodel: {name_or_path: a}\n"))
