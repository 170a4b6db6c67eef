"""What a trainer is made of before its first step, where only a GPU would show the fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conftest import NF4

from recipes_lib.config.launch import why_each_rank_reads
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import RecipesError
from recipes_lib.train import main
from recipes_lib.training.trainer import RecipeTrainer


@pytest.mark.parametrize(("fp16", "expected"), [(False, torch.bfloat16), (True, torch.float32)])
def test_adapters_of_a_quantized_base_are_float32_where_fp16_scales_the_loss(
    fp16, expected, tiny_recipe, monkeypatch
) -> None:
    """torch cannot unscale bfloat16 gradients on a GPU, and TRL makes these adapters bfloat16."""
    from recipes_lib.config import upstream

    build, found = upstream.build_sft_config, []

    def build_config(*args: Any, **kwargs: Any) -> Any:
        config = build(*args, **kwargs)
        config.fp16 = fp16  # a recipe with fp16 is refused without a GPU
        return config

    def look(trainer: RecipeTrainer, **_: Any) -> None:
        found.extend(
            parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad
        )
        raise RecipesError("seen")

    monkeypatch.setattr(upstream, "build_sft_config", build_config)
    monkeypatch.setattr(RecipeTrainer, "train", look)
    dtype = "float16" if fp16 else "bfloat16"
    assert main([str(tiny_recipe), NF4, f"model.dtype={dtype}", "train.bf16=false"]) == 1
    assert found and set(found) == {expected}


# ---- Who reads the weights ----


def test_rank_0_reads_alone_where_it_is_asked_for_and_weights_are_handed_on(tiny_recipe) -> None:
    for words in ([], ["lora=null"], ["lora.init_lora_weights=gaussian"]):
        recipe = load_recipe(tiny_recipe, words)
        assert why_each_rank_reads(recipe, sharded=True, asked=True) is None
        assert "is false" in str(why_each_rank_reads(recipe, sharded=True, asked=False))
        assert "whole" in str(why_each_rank_reads(recipe, sharded=False, asked=True))
    reasons = {
        "quantization={load_in_8bit: true}": "quantized weights cannot be handed on",
        "model.resize_embeddings=true": "model.resize_embeddings computes new rows",
        "lora.init_lora_weights=pissa": "lora.init_lora_weights: pissa starts from them",
        "lora.use_dora=true": "lora.use_dora starts from them",
        "lora.trainable_token_indices=[1]": "lora.trainable_token_indices starts from them",
    }
    for override, reason in reasons.items():
        recipe = load_recipe(tiny_recipe, [override])
        assert reason in str(why_each_rank_reads(recipe, sharded=True, asked=True))
