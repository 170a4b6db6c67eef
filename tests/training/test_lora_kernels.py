"""The Triton kernels of fused adapters compute what torch does, masks included, under Triton's
interpreter; and Triton compiles them for GPUs without spilling registers. No GPU ran them here.

The interpreter multiplies bf16 wrongly, so they run in float16 and float32.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recipes_lib.training import fused_lora, lora_kernels

#: kernel -> what its tiles are for a group, from the ranks of a layer and of all
CONSTANTS = {
    "product_kernel": lambda each, together: lora_kernels.tile(together),
    "add_kernel": lambda each, together: lora_kernels.tile(together, 64),
    "up_kernel": lambda each, together: lora_kernels.tile(each, 64),
    "down_kernel": lambda each, together: {**lora_kernels.tile(each), "BT": 32},
    "gradients_kernel": lambda each, together: {
        **lora_kernels.tile(each),
        "BA": lora_kernels.tile(together)["BR"],
        "DROPS": True,
    },
}


@pytest.fixture(scope="module")
def interpreted() -> Any:
    """The module as it is under TRITON_INTERPRET, on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        found = importlib.util.spec_from_file_location("interpreted", lora_kernels.__file__)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        yield module
    importlib.reload(lora_kernels)  # its operators took the names


@pytest.mark.parametrize(
    ("tokens", "inputs", "widths", "ranks", "dtype"),
    [
        (1, 64, [64], [8], torch.float32),
        (70, 72, [40, 130, 8], [8, 24, 5], torch.float32),
        (129, 136, [136], [16], torch.float16),
        (65, 64, [200, 64], [100, 156], torch.float16),
        (66, 130, [64, 64, 64], [32, 32, 32], torch.float16),
    ],
)
@pytest.mark.parametrize("dropped", [True, False])
def test_the_kernels_compute_what_torch_does_in_float64(
    interpreted: Any,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    inputs: int,
    widths: list[int],
    ranks: list[int],
    dtype: torch.dtype,
    dropped: bool,
) -> None:
    """Ragged tokens and widths, one to three layers, ranks from 5 to 256."""
    torch.manual_seed(0)
    shapes = ((tokens, inputs), (sum(ranks), inputs), *((tokens, sum(ranks)),) * 2)
    x, a, low, of_low = (torch.randn(shape).to(dtype) for shape in shapes)
    b = [torch.randn(pair).to(dtype) for pair in zip(widths, ranks, strict=True)]
    grads = [torch.randn(tokens, width).to(dtype) for width in widths]
    scales = [0.5 + number for number in range(len(b))]
    seed, drop = (torch.tensor([2**61 + 12345]), 20_000) if dropped else (None, 0)

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        x_, a_, low_, of_low_ = (one.to(dtype) for one in (x, a, low, of_low))
        b_, grads_, outputs = (
            [one.to(dtype, copy=True) for one in many] for many in (b, grads, grads)
        )
        of_x = x_.clone()
        fused_lora.add_dropped_product(of_x, of_low_, a_, seed, drop)
        fused_lora.add_up(outputs, low_, b_, scales)
        rest = (of_low_, x_, seed, drop, low_, grads_, b_, scales)
        return [
            fused_lora.dropped_product(x_, a_, seed, drop),
            of_x,
            fused_lora.down(grads_, b_, scales),
            *outputs,
            *fused_lora.adapter_gradients(*rest),
        ]

    exact = results(torch.float64)
    monkeypatch.setattr(fused_lora, "lora_kernels", interpreted)
    monkeypatch.setattr(fused_lora, "_has_kernels", lambda x: True)
    got = results(dtype)
    in_float32 = len(got) - 2 * len(b)
    for number, (one, its) in enumerate(zip(got, exact, strict=True)):
        assert one.dtype == (dtype if number < in_float32 else torch.float32)
        error = float((one.double() - its).abs().max() / its.abs().max())
        assert error < (5e-4 if one.dtype == torch.float16 else 1e-6), number


def test_tokens_are_summed_in_shares_of_the_same_size_whatever_their_number(
    interpreted: Any,
) -> None:
    """More tokens than one program takes, and shares without any."""
    x, low = torch.ones(200, 64), torch.ones(200, 8)
    rows = interpreted.gradients(low, x, None, 0, low, [torch.ones(200, 32)], [8], [1.0])
    assert rows.shape == (16, 8 * 64 + 32 * 8)
    assert torch.equal(rows.sum(0), torch.full((768,), 200.0))
    assert torch.equal(rows[:4], torch.tensor([64.0, 64, 64, 8])[:, None].expand(4, 768))
    assert not rows[4:].any()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_model_gets_the_gradients_that_torch_computes(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    """Ranks and scales of the layers differ, and nothing uses one of the outputs."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=50,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    ranks = {"rank_pattern": {"k_proj": 7}, "alpha_pattern": {"v_proj": 32}, "r": 4}
    lora = LoraConfig(
        init_lora_weights=False, lora_dropout=dropout, target_modules="all-linear", **ranks
    )
    model = get_peft_model(AutoModelForCausalLM.from_config(config), lora).train()
    fused_lora.fuse_lora(model, None)
    ids, alone = torch.randint(50, (2, 17)), model.base_model.model.model.layers[0].mlp.up_proj

    def measure() -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss + alone(torch.ones(3, 64)).sum()).backward()  # gate_proj is not asked there
        return [loss, *(one.grad for one in model.parameters() if one.requires_grad)]

    expected = measure()
    monkeypatch.setattr(fused_lora, "lora_kernels", interpreted)
    monkeypatch.setattr(fused_lora, "_has_kernels", lambda x: True)
    for one, its in zip(measure(), expected, strict=True):
        assert float((one - its).abs().max() / its.abs().max()) < 1e-5


def compiled(name: str, ranks: int, capability: int, folder: Path) -> tuple[str, str]:
    """Return what cuobjdump says of a kernel for three layers in bf16, and its PTX."""
    kernel, layers = getattr(lora_kernels, name), 3
    constants = CONSTANTS[name](ranks, ranks * layers)
    of_layers = {"outputs": "*bf16", "grads": "*bf16", "b": "*bf16", "scales": "fp32"}
    types = {
        **{one: (kind,) * layers for one, kind in of_layers.items()},
        **dict.fromkeys(("widths", "ranks"), ("i32",) * layers),
        **dict.fromkeys(("x", "a", "low", "of_x", "of_low"), "*bf16"),
        "seed": "*i64",
        "found": "*fp32",
        "scale": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {one: types.get(one, "i32") for one in kernel.arg_names}
    places = {one: (place,) for place, one in enumerate(kernel.arg_names)}
    aligned = [
        (place, *inside)
        for one, (place,) in places.items()
        for inside in ([(i,) for i in range(layers)] if isinstance(signature[one], tuple) else [()])
        if one in ("K", "R", "size", "widths", "ranks") or "*" in str(signature[one])
    ]
    source = ASTSource(
        kernel,
        signature,
        {places[one]: value for one, value in constants.items()},
        {place: [["tt.divisibility", 16]] for place in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    binary = folder / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    said = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True)
    return said.stdout, made.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CONSTANTS)
def test_they_compile_for_a_gpu_with_tensor_cores_and_without_spills(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for ranks in (8, 32, 96):
        usage, ptx = compiled(name, ranks, capability, tmp_path)
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        assert numbers["STACK"] == numbers["LOCAL"] == 0, (ranks, usage)
        assert numbers["REG"] <= 255 and ("mma" in ptx), (ranks, usage)
