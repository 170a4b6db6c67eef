"""What a trace counts is what a real forward pass of the same model keeps, byte for byte."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.families import DEEPSEEK, EXPERTS, FAMILIES, LINEAR_ATTENTION, family_config
from tests.plan.kept import bytes_of, counting_what_is_kept

from recipes_lib.models import families
from recipes_lib.plan.memory import NF4
from recipes_lib.plan.trace import trace, trace_now

# Families that the tiny models of the other tests do not have, with what their configs need.
MORE: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("mistral", "ministral3", "gemma", "gemma2", "olmo2", "exaone4")},
    **{name: {} for name in ("apertus", "hunyuan_v1_dense", "arcee", "cohere", "glm")},
    **dict.fromkeys(("deepseek_v2", "glm4_moe_lite"), DEEPSEEK),
    "seed_oss": {"residual_dropout": 0.0, "attention_dropout": 0.0},
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
    },
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
}
# On purpose: CUDA's dropout keeps a mask of bytes, the CPU's a number for each.
WITHOUT_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
IN_CI = ("llama", "qwen3", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3")
LORA = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def really_kept(config: Any, lora: peft.LoraConfig | None, tokens: int) -> int:
    """Run a real forward pass on the CPU and return the bytes that autograd keeps of it."""
    model = families.on_meta(config, torch.bfloat16, lora, attention="traced")
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    for buffer in model.buffers():
        buffer.data.fill_(0 if buffer.dtype in (torch.int64, torch.bool) else 0.5)
    ids = torch.arange(tokens)[None] % 500
    known = (*model.parameters(), *model.buffers(), ids)
    with torch.autocast("cpu", torch.bfloat16), counting_what_is_kept(known) as kept:
        decoder = families.text_decoder(model.train())
        last = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return bytes_of([*kept, last])


def differences(families: list[str]) -> list[str]:
    """Return for each family and method where trace and real forward pass are not the same."""
    found = []
    for family in families:
        changes = MORE.get(family) or WITHOUT_DROPOUT.get(family) or {}
        config = family_config(family, **changes)
        for lora in (LORA, None):
            traced = trace_now(config, lora)
            few, many = (really_kept(config, lora, tokens) for tokens in (128, 256))
            growth = (many - few) / 128
            if growth != pytest.approx(traced.per_token, rel=0.001):
                method = "LoRA" if lora else "full"
                found.append(f"{family} {method}: traced {traced.per_token}, kept {growth}")
    return found


@pytest.mark.slow
def test_six_families_keep_what_is_traced():
    assert not differences([*IN_CI])


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_every_family_keeps_what_is_traced():
    assert not differences([*FAMILIES, *MORE])


def test_options_of_lora_are_counted_as_peft_makes_them():
    config = family_config("llama")
    plain = trace_now(config, LORA)
    q_proj = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert trace_now(config, q_proj).trained == 2 * 4 * (64 + 64)
    saved = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert trace_now(config, saved).trained == 2 * 4 * 128 + 64 * 520
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    last = peft.LoraConfig(r=4, target_modules=every, layers_to_transform=[1])
    # nothing before the first adapter is kept
    assert trace_now(config, last).per_token < 0.6 * plain.per_token
    dora = peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    assert trace_now(config, dora).constant > 3 * plain.constant


def test_four_bit_weights_take_half_a_byte_and_their_scales():
    config = family_config("llama")
    plain, packed = (trace_now(config, LORA, packed=bytes_) for bytes_ in (None, NF4))
    linear = 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96)
    saved = plain.weight_bytes - packed.weight_bytes
    assert saved == pytest.approx(linear * (2 - 0.5 - 4 / 64), abs=1)
    assert packed.trained_bytes == plain.trained_bytes / 2  # TRL's adapters are bf16 there


def test_models_are_traced_in_every_precision_and_with_their_own_kinds_of_layers():
    experts = family_config("qwen3_moe")
    for half in (None, "float16", "bfloat16"):  # torch's fake kernel takes bfloat16 alone
        assert trace_now(experts, LORA, half or "float32", half).per_token > 0, half
    # gate, up and down of four experts in each of two layers
    assert trace_now(experts, LORA).fused_experts == 2 * 4 * 3 * 64 * 32
    gpt2 = [trace_now(family_config("gpt2"), LORA, packed=bytes_) for bytes_ in (None, NF4)]
    linear = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256)  # all Conv1D
    saved = gpt2[0].weight_bytes - gpt2[1].weight_bytes
    assert saved == pytest.approx(linear * (2 - NF4), abs=1)


def test_a_trace_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path))
    config = family_config("llama")
    first = trace(config, LORA)
    [file] = (tmp_path / "traces").iterdir()
    file.write_text('{"layers": 2}')  # of another version
    assert trace(config, LORA) == first
    monkeypatch.setattr("recipes_lib.plan.trace.trace_now", lambda *_: pytest.fail("traced again"))
    assert trace(config, LORA) == first


def test_a_trace_is_made_again_when_the_code_that_builds_models_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    config = family_config("llama")
    trace(config, LORA)
    changed = tmp_path / "families.py"
    changed.write_text(Path(families.__file__).read_text() + "# changed", encoding="utf-8")
    monkeypatch.setattr(families, "__file__", str(changed))
    trace(config, LORA)
    assert len([*(tmp_path / "cache" / "traces").iterdir()]) == 2
