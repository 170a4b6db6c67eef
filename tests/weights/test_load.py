"""How a base is loaded and told apart from others, and what is said where it cannot be had."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from recipes_lib.config.recipe import ModelSection, load_recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.weights.load import attach, base_fingerprint, explain_load_failure


def test_why_a_model_cannot_be_had_is_said_by_the_type_of_the_hubs_error() -> None:
    response: Any = SimpleNamespace(headers={}, request=None)
    section = ModelSection(name_or_path="org/m", revision="v9")
    for cause, words in (
        (errors.GatedRepoError("403 Error", response=response), "is gated"),
        (errors.LocalEntryNotFoundError("not here"), "offline, and 'org/m' is not in the local"),
        (ConnectionError(), "offline"),
        (errors.RepositoryNotFoundError("404", response=response), "no model 'org/m'"),
    ):
        assert words in explain_load_failure(section, cause).what, words
        error = OSError("no v9, says transformers")
        error.__cause__ = cause
        assert words in explain_load_failure(section, error).what, words


def test_an_adapter_on_another_base_is_refused_by_the_name_of_a_layer(tiny_model_dir, runs) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    adapter = runs("lora") / "adapter"
    for change in ({"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 32}):
        config = LlamaConfig.from_pretrained(tiny_model_dir, **change)
        with pytest.raises(RecipeError, match="base") as caught:
            attach(LlamaForCausalLM(config), {"default": adapter})
        assert "another base model" in caught.value.hints[0], change


def test_a_base_is_known_by_the_content_of_its_weights(
    tiny_recipe, tiny_model_dir, tmp_path
) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    recipe, copy = (
        load_recipe(tiny_recipe, [f"model.name_or_path={place}"])
        for place in (tiny_model_dir, folder)
    )
    assert base_fingerprint(copy) == base_fingerprint(recipe) is not None
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert base_fingerprint(copy) != base_fingerprint(recipe)
