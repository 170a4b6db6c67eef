from __future__ import annotations

import pytest

from recipes_lib.config.documents import kind_of
from recipes_lib.core.errors import RecipeError


@pytest.mark.parametrize(
    ("values", "text", "file", "kind"),
    [
        ({"model": {}}, "", "r.yaml", "recipe"),
        ({"lora": {}}, "", "sub/_b.yaml", "base"),
        (
            {"lora": {}},
            "# yaml-language-server: $schema=../schema/recipe.schema.json\n",
            "_b.yaml",
            "base",
        ),
        ({"distributed_type": "NO"}, "", "ddp.yaml", "accelerate"),
        ({"model_name_or_path": "a"}, "", "old.yaml", "flat"),
        ({"model": {}, "learning_rate": 1}, "", "r.yaml", "recipe"),
        ({"model": {}, "data": {}, "training": {"seed": 1}}, "", "r.yaml", "recipe"),
        ({"lora": {}, "base_model": "m"}, "", "r.yaml", "recipe"),
    ],
)
def test_a_file_tells_its_kind_by_schema_line_or_keys(values, text, file, kind):
    assert kind_of(values, text, file).name == kind


def test_an_unknown_schema_is_an_error_even_when_the_keys_are_known():
    with pytest.raises(RecipeError, match="schema 'poem'"):
        kind_of({"model": {}}, "# yaml-language-server: $schema=poem.schema.json\n", "r.yaml")


@pytest.mark.parametrize(
    ("values", "whose"),
    [
        ({"base_model": "a", "sequence_len": 1, "learning_rate": 1}, "axolotl"),
        ({"model_name_or_path": "a", "finetuning_type": "lora"}, "LLaMA-Factory"),
        ({"model_name_or_path": "a", "beta": 0.1}, "DPO or GRPO"),
    ],
)
def test_files_of_other_programs_are_named(values, whose):
    assert whose in kind_of(values, "", "r.yaml").title
