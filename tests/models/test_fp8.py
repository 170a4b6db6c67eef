"""Frozen layers in FP8: both products and the gradient are those of the quantized numbers, and
nothing of a layer is trained, kept twice or rounded again.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from tests.families import FAMILIES, family_config
from transformers import AutoConfig, AutoModelForCausalLM

from recipes_lib.models.architectures import auto_class, fp8_layers, why_not_fp8
from recipes_lib.models.fp8 import (
    Fp8Linear,
    describe_fp8,
    has_scaled_product,
    quantize_layers,
    quantize_rows,
)

CPU = torch.device("cpu")
SIZES = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
# Rounding to bfloat16 alone, relative to the length of the vector: measured 0.17% for torch's own
# product, which rounds once, and 0.24% for the plain one and the gradient, which do twice. A bias
# is one time more.
ROUNDED = {1: 0.002, 2: 0.003, 3: 0.0035}
WHY = (
    "has experts, which are parameters and no linear layers",
    "has no linear layers in its decoder blocks to quantize",
)


def model_of(kind: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **HEADS, **settings})
    return AutoModelForCausalLM.from_config(config).bfloat16()


def layer_of(inputs: int, outputs: int, bias: bool = False) -> tuple[torch.nn.Linear, Fp8Linear]:
    torch.manual_seed(0)
    plain = torch.nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    return plain, Fp8Linear(plain)


def numbers(matrix: torch.Tensor) -> torch.Tensor:
    """What a matrix is after quantization, in float64."""
    quantized, scale = quantize_rows(matrix)
    return quantized.double() * scale.double()


def apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled product", "plain product"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradient_are_those_of_the_quantized_numbers_in_float64(
    scaled: bool, dtype: torch.dtype, bias: bool
) -> None:
    if scaled and not has_scaled_product(CPU):
        pytest.skip("this torch has no product in FP8 on a CPU")
    plain, layer = layer_of(576, 192, bias)
    layer.scaled = scaled
    x = torch.randn(3, 17, 576, dtype=dtype) * torch.logspace(-3, 3, 17, dtype=dtype)[:, None]
    output = layer(x.requires_grad_())
    exact = numbers(x.detach()) @ numbers(plain.weight).t()
    exact = exact + plain.bias.double() if bias else exact
    assert output.dtype == torch.bfloat16 and output.shape == (3, 17, 192)
    # token by token: a scale for all of them would lose the small ones
    for token in range(17):
        assert apart(output[:, token], exact[:, token]) < ROUNDED[2 - scaled + bias]
    grad = torch.randn_like(output)
    output.backward(grad)
    assert x.grad is not None and x.grad.dtype == dtype
    assert apart(x.grad, grad.double() @ numbers(plain.weight)) < ROUNDED[2]


def test_a_layer_in_fp8_is_as_far_from_the_one_in_bf16_as_three_bits_of_mantissa_make_it() -> None:
    plain, layer = layer_of(576, 192)
    x = torch.randn(64, 576, dtype=torch.bfloat16, requires_grad=True)
    output = layer(x)
    output.backward(grad := torch.randn_like(output))
    assert x.grad is not None
    assert 0.03 < apart(output, x.double() @ plain.weight.double().t()) < 0.045  # weight and input
    assert 0.02 < apart(x.grad, grad.double() @ plain.weight.double()) < 0.03  # the weight alone


def test_every_number_is_within_a_sixteenth_and_what_is_not_finite_stays_so() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(50, 160) * torch.logspace(-20, 20, 50)[:, None]
    matrix[7] = 0
    quantized, scale = quantize_rows(matrix)
    back = quantized.double() * scale.double()
    assert scale.dtype == torch.float32 and scale.shape == (50, 1)
    large = matrix.abs() > matrix.abs().amax(1, keepdim=True) / 2**14  # else below the smallest
    large &= matrix.abs().amax(1, keepdim=True) > 1e-12
    assert ((back - matrix).abs() <= matrix.abs() / 16 + 1e-30)[large].all()
    assert (back[7] == 0).all()
    for wrong in (float("nan"), float("inf")):
        matrix[3, 5] = wrong
        found = Fp8Linear(torch.nn.Linear(160, 16, bias=False))(matrix)
        assert found[3].isnan().all() and found[4:].isfinite().all() and found[:3].isfinite().all()


def test_nothing_of_a_layer_is_trained_and_no_input_is_kept_for_the_backward_pass() -> None:
    _, layer = layer_of(64, 32)
    assert not any(one.requires_grad for one in layer.parameters())
    kept: list[torch.Tensor] = []
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda a: a):
        layer(x)
    assert sum(one.numel() * one.element_size() for one in kept) == 32 * 64 + 32 * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_another_precision_of_the_model_leaves_weights_and_scales_as_they_are(
    dtype: torch.dtype,
) -> None:
    """`bf16_full_eval` turns a whole model into bfloat16."""
    _, layer = layer_of(64, 32)
    before = [one.clone() for one in layer.quantized]
    after = copy.deepcopy(layer).to(dtype).quantized
    assert torch.equal(before[0].view(torch.uint8), after[0].view(torch.uint8))
    assert torch.equal(before[1], after[1]) and after[1].dtype == torch.float32


def test_linear_layers_of_the_blocks_are_quantized_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of()
    names = fp8_layers(model)
    assert len(names) == 14 and not [name for name in names if "head" in name or "embed" in name]
    seen: list[int] = []

    def bytes_of() -> int:
        return sum(one.numel() * one.element_size() for one in model.parameters())

    class Watched(Fp8Linear):
        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__(layer)
            seen.append(bytes_of() + self.weight.numel() + 4 * self.scale.numel())

    before = bytes_of()
    monkeypatch.setattr("recipes_lib.models.fp8.Fp8Linear", Watched)
    quantize_layers(model, names)
    largest = 64 * 96 + 4 * 96
    assert len(seen) == 14 and max(seen) <= before + largest and seen[-1] < before
    linear = sum(64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 for _ in range(2))
    rows = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert bytes_of() == before - linear + 4 * rows
    assert str(describe_fp8(model)).startswith("FP8 in 14 layers, products in ")


def test_widths_that_no_product_in_fp8_takes_stay_as_they_are() -> None:
    found = fp8_layers(model_of(intermediate_size=100))
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 1}, "has no linear layers in its decoder"),
        ("mixtral", {"num_local_experts": 2}, "has experts, which are parameters"),
        ("llama", {}, None),
    ],
)
def test_models_with_experts_or_without_linear_layers_are_not_for_fp8(
    kind: str, settings: dict[str, Any], why: str | None
) -> None:
    found = why_not_fp8(model_of(kind, **settings))
    assert found is None if why is None else str(found).startswith(why)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_answer_over_fp8_as_over_bf16_or_are_refused(family: str) -> None:
    """A model that reads weights as numbers would answer noise."""
    torch.manual_seed(0)
    config = family_config(family)
    loader = getattr(transformers, auto_class(config.model_type))
    model, ids = loader.from_config(config).bfloat16().eval(), torch.randint(5, 100, (1, 17))
    if why_not_fp8(model):
        assert why_not_fp8(model) in WHY
        return
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits.double()
        quantize_layers(model, fp8_layers(model))
        found = model(input_ids=ids, use_cache=False).logits
    # random weights of width 64: 1 to 5% for most, 10 to 21% for the Gemmas, 140% for noise
    assert 0 < apart(found, plain) < 0.3


def test_inputs_that_a_model_cast_to_the_type_of_a_weight_are_an_error() -> None:
    _, layer = layer_of(64, 32)
    with pytest.raises(TypeError, match="a layer in FP8 was given"):
        layer(torch.ones(2, 64).to(layer.weight.dtype))


def test_a_compiled_layer_is_one_graph_with_the_same_output_and_gradient() -> None:
    _, layer = layer_of(64, 32)
    one, other = (torch.ones(8, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    expected = layer(one)
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(other)
    expected.sum().backward()
    found.sum().backward()
    assert torch.equal(found, expected) and torch.equal(one.grad, other.grad)
