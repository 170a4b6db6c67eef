"""Who reads the weights: what the code knows before a training starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.families import build_family

from recipes_lib.config.launch import why_each_rank_reads
from recipes_lib.config.recipe import load_recipe
from recipes_lib.weights.load import load_model, load_tokenizer


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("quantization={load_in_8bit: true}", "quantized weights cannot be handed on"),
        ("model.resize_embeddings=true", "model.resize_embeddings computes new rows"),
        ("lora.init_lora_weights=pissa", "lora.init_lora_weights: pissa starts from them"),
        ("lora.use_dora=true", "lora.use_dora starts from them"),
        ("lora.trainable_token_indices=[1]", "lora.trainable_token_indices starts from them"),
    ],
)
def test_what_is_computed_from_the_weights_is_computed_where_they_are_read(
    tiny_recipe: Path, override: str, words: str
) -> None:
    why = why_each_rank_reads(load_recipe(tiny_recipe, [override]), sharded=True, asked=True)
    assert why is not None and words in why


def test_rank_0_reads_alone_where_it_is_asked_for_and_weights_are_shared_out(
    tiny_recipe: Path,
) -> None:
    for words in ([], ["lora=null"], ["lora.init_lora_weights=gaussian"]):
        recipe = load_recipe(tiny_recipe, words)
        assert why_each_rank_reads(recipe, sharded=True, asked=True) is None
        assert "is false" in str(why_each_rank_reads(recipe, sharded=True, asked=False))
        assert "whole" in str(why_each_rank_reads(recipe, sharded=False, asked=True))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_a_model_without_weights_is_the_model_in_all_else(
    family: str, tiny_recipe: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = build_family(family, tmp_path / family, tiny_model_dir)
    words = [f"model.name_or_path={folder}", "model.dtype=bfloat16"]
    recipe = load_recipe(tiny_recipe, words)
    tokenizer = load_tokenizer(recipe)
    whole, empty = load_model(recipe, tokenizer), load_model(recipe, tokenizer, empty=True)
    described = [
        [(name, one.shape, one.dtype) for name, one in model.state_dict().items()]
        for model in (whole, empty)
    ]
    assert described[0] == described[1]
    assert all(one.is_meta for one in empty.parameters())
    assert [name for name, _ in whole.named_parameters()] == [
        name for name, _ in empty.named_parameters()
    ]
