"""Decoder blocks are compiled one by one: without a break where a GPU's attention runs in them,
once for all layers and lengths, and what the compiler cannot take is said.

The compiler's first two stages run here (`aot_eager`); what inductor makes of a graph is torch's.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import DENSE, FAMILIES
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipes_lib.training import varlen
from recipes_lib.training.compiled import CompileReport, compile_blocks

EAGER = {"torch_compile_backend": "aot_eager"}


@pytest.fixture
def opaque_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that a graph holds as it holds torch's kernel: nothing of it is traced. What it
    computes is no attention, and no test asks for it.
    """

    @torch.library.custom_op("recipes_tests::rows", mutates_args={})
    def rows(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int
    ) -> torch.Tensor:
        return (q + (k + v).mean(1, keepdim=True)).contiguous()

    @rows.register_fake
    def _(q: Any, k: Any, v: Any, bounds: Any, longest: int) -> torch.Tensor:
        return torch.empty_like(q)

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        one = (grad.sum(1, keepdim=True) / ctx.heads).expand(-1, ctx.heads, -1)
        return grad, one, one, None, None

    def keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.heads = inputs[1].shape[1]

    rows.register_autograd(backward, setup_context=keep)
    monkeypatch.setattr(
        varlen,
        "varlen_attn",
        lambda q, k, v, bounds, _, longest, __, **kwargs: rows(q, k, v, bounds, longest),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("opaque_kernel")
@pytest.mark.parametrize(("family", "graphs"), [("llama", 5), ("gemma3_text", 8)])
def test_blocks_compile_once_for_all_layers_and_lengths_and_without_a_break(
    family: str, graphs: int, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    layers = {"num_hidden_layers": 4}
    if "layer_types" in FAMILIES[family]:
        layers["layer_types"] = FAMILIES[family]["layer_types"] * 2
    config = AutoConfig.for_model(family, vocab_size=520, **{**DENSE, **FAMILIES[family], **layers})
    config._attn_implementation = "sdpa"
    base = AutoModelForCausalLM.from_config(config)
    varlen.use_varlen(base)
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(base, lora)
    report = compile_blocks(model, EAGER, tmp_path)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    draw = random.Random(0)
    for step in range(6):
        lengths = [draw.randint(3, 60) for _ in range(draw.choice([2, 3, 4]))]
        batch = collate([{"input_ids": [7] * length} for length in lengths])
        model.train(step != 3)  # a validation in between
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(step != 3):
            loss = model(**batch, use_cache=False).loss
        if step != 3:
            loss.backward()
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] <= graphs
    assert report.line().endswith("graphs of one kind of blocks, none of them broken")


def test_a_model_without_blocks_and_broken_blocks_are_told_of() -> None:
    assert "nothing is compiled" in CompileReport(0).line()
    report = CompileReport(1)
    counters["stats"]["unique_graphs"] = 6
    counters["graph_break"]["Data dependent operator\n  Explanation: long"] = 3
    assert report.line() == (
        "compiled: 6 graphs of one kind of blocks; broken at 3 places (Data dependent operator)"
    )
    counters.clear()
