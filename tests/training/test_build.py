"""What a trainer is made of before its first step, where only a GPU would show the fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recipes_lib.errors import RecipesError
from recipes_lib.train import main
from recipes_lib.training.build import describe_trainable
from recipes_lib.training.session import Session

NF4 = "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16}"


@pytest.mark.parametrize(("fp16", "expected"), [(False, torch.bfloat16), (True, torch.float32)])
def test_adapters_of_a_quantized_base_are_float32_where_fp16_scales_the_loss(
    fp16: bool, expected: torch.dtype, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch cannot unscale bfloat16 gradients on a GPU, and TRL makes these adapters bfloat16."""
    from recipes_lib.recipe import upstream

    build, found = upstream.build_sft_config, []

    def build_config(*args: Any, **kwargs: Any) -> Any:
        config = build(*args, **kwargs)
        config.fp16 = fp16  # a recipe with fp16 is refused without a GPU
        return config

    def look(session: Session) -> None:
        found.extend(parameter.dtype for parameter in session.trainer.model.parameters() if parameter.requires_grad)
        raise RecipesError("seen")

    monkeypatch.setattr(upstream, "build_sft_config", build_config)
    monkeypatch.setattr(Session, "run_trainer", look)
    dtype = "float16" if fp16 else "bfloat16"
    assert main([str(tiny_recipe), NF4, f"model.dtype={dtype}", "train.bf16=false"]) == 1
    assert found and set(found) == {expected}


def test_the_start_up_line_says_that_fsdp2_trains_half_precision_weights_in_float32() -> None:
    model = torch.nn.Linear(2, 3, bias=False, dtype=torch.bfloat16)
    assert describe_trainable(model) == "6 of 6 parameters in bfloat16"
    assert describe_trainable(model, raised=True) == "6 of 6 parameters in float32 (FSDP2 keeps the bfloat16 weights so)"
    assert describe_trainable(model.to(torch.float32), raised=True) == "6 of 6 parameters in float32"
