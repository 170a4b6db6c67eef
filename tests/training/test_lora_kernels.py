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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recipes_lib.training import fused_lora, lora_kernels

KERNELS = ("product_kernel", "add_kernel", "outer_kernel")


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
    ("tokens", "inputs", "ranks", "dtype"),
    [
        (1, 64, 8, torch.float32),
        (70, 72, 24, torch.float32),
        (129, 136, 16, torch.float16),
        (65, 64, 256, torch.float16),
        (66, 130, 96, torch.float16),
    ],
)
def test_the_kernels_compute_what_torch_does_in_float64(
    interpreted: Any, tokens: int, inputs: int, ranks: int, dtype: torch.dtype
) -> None:
    """Ragged tokens and widths, and the ranks of a group from 8 to 256."""
    torch.manual_seed(0)
    shapes = ((tokens, inputs), (ranks, inputs), (tokens, ranks), (tokens, inputs))
    x, a, of_low, before = (torch.randn(shape).to(dtype) for shape in shapes)
    seed, drop = torch.tensor([2**61 + 12345]), 20_000
    of_x = before.clone()
    interpreted.add_product(of_x, of_low, a, seed, drop)
    got = (
        interpreted.product(x, a, seed, drop),
        of_x,
        interpreted.outer(of_low, x, seed, drop),
    )
    x, a, of_low, exact_of_x = (one.double() for one in (x, a, of_low, before))
    low = fused_lora.dropped_product(x, a, seed, drop)
    of_a = fused_lora.dropped_gradients(of_low, x, a, exact_of_x, seed, drop)
    for one, exact, rounded in zip(got, (low, exact_of_x, of_a), (dtype, dtype, None), strict=True):
        error = float((one.double() - exact).abs().max() / exact.abs().max())
        assert error < (5e-4 if rounded == torch.float16 else 1e-6)


def test_tokens_are_summed_in_shares_of_the_same_size_whatever_their_number(
    interpreted: Any,
) -> None:
    """More tokens than one program takes, and a last share with fewer."""
    x, of_low = torch.ones(200, 64), torch.ones(200, 8)
    one = interpreted.outer(of_low, x, torch.tensor([3]), 0)
    assert torch.equal(one, torch.full((8, 64), 200.0))


def compiled(name: str, ranks: int, capability: int, folder: Path) -> tuple[str, str]:
    """Return what cuobjdump says of a kernel for bf16, and its PTX."""
    kernel = getattr(lora_kernels, name)
    constants = lora_kernels.tile(ranks, 64) if name == "add_kernel" else lora_kernels.tile(ranks)
    types = {
        "seed": "*i64",
        "of_a": "*fp32",
        "scale": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    tensors = dict.fromkeys(("x", "a", "low", "of_x", "of_low"), "*bf16")
    signature = {one: {**types, **tensors}.get(one, "i32") for one in kernel.arg_names}
    places = {one: (place,) for place, one in enumerate(kernel.arg_names)}
    aligned = [one for one in signature if signature[one].startswith("*") or one == "K"]
    source = ASTSource(
        kernel,
        signature,
        {places[one]: value for one, value in constants.items()},
        {places[one]: [["tt.divisibility", 16]] for one in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    binary = folder / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    said = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True)
    return said.stdout, made.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_for_a_gpu_with_tensor_cores_and_without_spills(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for name in KERNELS:
        for ranks in (8, 96):
            usage, ptx = compiled(name, ranks, capability, tmp_path)
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
            assert numbers["STACK"] == numbers["LOCAL"] == 0, (name, ranks, usage)
            assert numbers["REG"] <= 255 and ("mma" in ptx), (name, ranks, usage)
