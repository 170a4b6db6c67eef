"""What a trainer is made of before its first step, where only a GPU would show the fault."""

from typing import Any

import pytest
import torch
from tests.conftest import NF4

from recipes_lib.config.recipe import load_recipe, one_rank_can_read
from recipes_lib.core.errors import RecipesError
from recipes_lib.train import main
from recipes_lib.training.sft import SupervisedTrainer


@pytest.mark.parametrize(("fp16", "expected"), [(False, torch.bfloat16), (True, torch.float32)])
def test_adapters_of_a_quantized_base_are_float32_where_fp16_scales_the_loss(
    fp16, expected, tiny_recipe, monkeypatch
) -> None:
    """torch cannot unscale bfloat16 gradients on a GPU, and TRL makes these adapters bfloat16."""
    from recipes_lib.config import upstream

    build, found = upstream.build_train_config, []

    def build_config(*args: Any, **kwargs: Any) -> Any:
        config = build(*args, **kwargs)
        config.fp16 = fp16  # a recipe with fp16 is refused without a GPU
        return config

    def look(trainer: SupervisedTrainer, **_: Any) -> None:
        found.extend(
            parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad
        )
        raise RecipesError("seen")

    monkeypatch.setattr(upstream, "build_train_config", build_config)
    monkeypatch.setattr(SupervisedTrainer, "train", look)
    dtype = "float16" if fp16 else "bfloat16"
    assert main([str(tiny_recipe), NF4, f"model.dtype={dtype}", "train.bf16=false"]) == 1
    assert found and set(found) == {expected}


# ---- Who reads the weights ----


def test_rank_0_reads_alone_where_its_weights_can_be_handed_on(tiny_recipe) -> None:
    for words, alone in {
        "lora=null": True,
        "lora.init_lora_weights=gaussian": True,
        "quantization={load_in_8bit: true}": False,
        "model.resize_embeddings=true": False,
        "lora.init_lora_weights=pissa": False,
        "lora.use_dora=true": False,
        "lora.trainable_token_indices=[1]": False,
    }.items():
        assert one_rank_can_read(load_recipe(tiny_recipe, [words])) == alone, words
