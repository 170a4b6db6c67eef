"""Memory: weights as bitsandbytes stores them, optimizer states as torch keeps them, and what must
hold between any two plans.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.config.recipe import load_recipe
from recipes_lib.planning.cards import CARDS, card_named, cpu_card
from recipes_lib.planning.memory import (
    CPU_PROCESS_GIB,
    GIB,
    host_gib,
    largest_tokens,
    optimizer_bytes,
    weight_gib,
)
from recipes_lib.planning.plan import Plan, plan_recipe
from recipes_lib.planning.text import plan_lines

PROJECT = Path(__file__).resolve().parents[2]
LORA, QLORA, FULL = (
    "llama2-7b-dolly/lora-bf16-r32",
    "llama2-7b-dolly/qlora-r32",
    "llama2-7b-dolly/full-bf16",
)


def plan(name: str, *overrides: str, **options: Any) -> Plan:
    return plan_recipe(load_recipe(name, overrides), **{"gpu": "h100", **options})


def test_four_bit_weights_take_what_bitsandbytes_stores(tiny_model_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from recipes_lib.models.known import named_shape

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=config, dtype=torch.bfloat16
    )
    stored = 0
    for parameter in model.parameters():
        stored += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            stored += state.absmax.numel() * state.absmax.element_size()
            stored += state.state2.absmax.numel() * state.state2.absmax.element_size()
    shape = named_shape(str(tiny_model_dir))
    assert shape is not None
    settings = replace(plan(QLORA).settings, shape=shape, dtype="bfloat16")
    assert weight_gib(settings) * GIB == pytest.approx(stored, rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_keeps_its_moments_in_the_precision_of_the_weights(dtype: str) -> None:
    import torch

    weight = torch.nn.Parameter(torch.zeros(1000, dtype=getattr(torch, dtype)))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    kept = sum(
        state[name].numel() * state[name].element_size() for name in ("exp_avg", "exp_avg_sq")
    )
    assert kept / 1000 == optimizer_bytes("adamw_torch_fused", weight.element_size())


def test_llama_2_7b_in_bf16_and_in_nf4_weighs_what_is_known() -> None:
    assert plan(LORA).memory.weights == pytest.approx(6_738_415_616 * 2 / GIB)
    assert plan(QLORA).memory.weights == pytest.approx(
        3.6, abs=0.1
    )  # 3.3 GiB of NF4, 0.5 GiB of embeddings and head


def test_full_fine_tuning_under_fsdp_keeps_float32_and_shares_it_out() -> None:
    two, four = plan(FULL).memory, plan(FULL, gpus=4).memory
    assert two.weights + two.gradients + two.optimizer == pytest.approx(
        6_738_415_616 * 16 / 2 / GIB
    )
    assert four.weights + four.gradients + four.optimizer == pytest.approx(
        6_738_415_616 * 16 / 4 / GIB
    )


def test_under_fsdp_gradients_that_wait_for_the_end_of_the_step_are_counted_whole() -> None:
    once = "train.accelerator_config={gradient_accumulation_kwargs: {sync_each_batch: false}}"
    shared, kept = plan(FULL), plan(FULL, once)
    assert shared.batches.accumulation > 1
    # 25 GiB on every GPU instead of its share: they become shares layer by layer, so both are never
    # there (counted on the tensors in tests/invariants/test_distributed.py)
    assert kept.memory.gradients == pytest.approx(6_738_415_616 * 4 / GIB)
    assert shared.memory.gradients == pytest.approx(
        kept.memory.gradients / shared.settings.world_size
    )
    adapters = plan(LORA, gpus=2, accelerate="fsdp")
    assert adapters.batches.forward_passes > 1
    assert adapters.memory.gradients == pytest.approx(
        adapters.settings.trained_parameters * 4 / GIB
    )
    one_pass = plan(LORA, "run.global_batch_size=8", gpus=2, accelerate="fsdp")
    assert one_pass.memory.gradients == pytest.approx(
        one_pass.settings.trained_parameters * 4 / 2 / GIB
    )


def test_the_memory_of_a_machine_holds_the_weights_once_for_each_process_that_reads_them(
    tmp_path: Path,
) -> None:
    whole, processes = 6_738_415_616 * 2 / GIB, 8 * CPU_PROCESS_GIB
    each = tmp_path / "each.yaml"
    shipped = (PROJECT / "accelerate_configs" / "fsdp.yaml").read_text(encoding="utf-8")
    assert "cpu_ram_efficient_loading: true" in shipped
    each.write_text(shipped.replace("loading: true", "loading: false"), encoding="utf-8")
    for accelerate, readers in (("ddp", 8), ("fsdp", 1), (str(each), 8)):
        held = host_gib(plan(LORA, gpus=8, accelerate=accelerate).settings)
        assert held == pytest.approx(readers * whole + processes)
    computed = plan(LORA, "lora.init_lora_weights=pissa", gpus=8, accelerate="fsdp")
    assert host_gib(computed.settings) == pytest.approx(8 * whole + processes)
    # FSDP2 trains float32 weights, made before they are shared out
    assert host_gib(plan(FULL, gpus=8).settings) == pytest.approx(2 * whole + processes)
    assert host_gib(plan(QLORA, gpus=8, accelerate="fsdp_qlora").settings) < whole


def test_the_plan_says_who_reads_the_weights() -> None:
    for accelerate, said in (
        ("fsdp", "19 GiB (one of 8 processes reads the weights)"),
        ("ddp", "107 GiB (each of 8 processes reads all weights)"),
    ):
        lines = list(plan_lines(plan(LORA, gpus=8, accelerate=accelerate), ()))
        assert f"  memory of each machine while loading: {said}" in lines


def test_what_saves_memory_in_the_docs_saves_memory_in_the_plan() -> None:
    padded = "model.attn_implementation=sdpa"  # else passes take up what is free
    base = plan(LORA, padded).memory.peak
    for words in (
        ["train.activation_checkpointing=true"],
        ["train.per_device_train_batch_size=2"],
        ["lora.lora_dropout=0"],
        ["train.max_length=512"],
        ["lora.r=8", "lora.lora_alpha=16"],
    ):
        assert plan(LORA, padded, *words).memory.peak < base, words
    assert plan(LORA, padded, gpus=2, accelerate="fsdp").memory.peak < base
    assert plan(QLORA, padded).memory.peak < base
    assert plan(LORA, padded, gpus=2).memory.peak > base  # DDP's buckets


def test_a_model_that_is_too_large_by_itself_has_no_micro_batch() -> None:
    made = plan(LORA, "model.name_or_path=meta-llama/Llama-3.1-70B")
    assert not made.fits
    assert made.largest() == 0
    assert largest_tokens(made.settings, card_named("4090"), 1024) == 0


def test_a_smaller_card_holds_less_and_every_card_can_be_planned() -> None:
    sizes = {card.name: plan(QLORA, gpu=card.name).largest() for card in CARDS}
    assert (
        sizes["h200-141gb"] > sizes["h100-80gb"] > sizes["a100-40gb"] > sizes["rtx-4090-24gb"] > 0
    )
    assert all(card.basis == "counted" for card in CARDS)  # until somebody measures one


def test_processes_without_gpus_share_the_memory_of_the_machine() -> None:
    one = plan("smollm2-135m-dolly/lora-r8", gpu="cpu")
    two = plan("smollm2-135m-dolly/lora-r8", gpu="cpu", gpus=2)
    assert (one.sharing, two.sharing) == (1, 2)
    assert two.settings.device == "cpu" and two.launch.config.path.stem == "ddp_cpu"
    assert 0 < cpu_card().memory_gib < 10_000
