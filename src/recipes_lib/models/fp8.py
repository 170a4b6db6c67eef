"""Frozen linear layers in FP8 (`model.base_precision: fp8`): weights as float8_e4m3fn with a
float32 scale a row, inputs as the same with a scale a token, found anew in every pass.

The product is `torch._scaled_mm` where the device has it, else one in bfloat16 of the same
quantized numbers. The gradient of the input is a bfloat16 product with the dequantised weight,
0.24% from that in float64 (512 x 1536 x 576); a scaled product would be faster, but quantizes
gradients too: 3.7% from the gradient of the layer in bf16 where this one is 2.6%. Weights get no
gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
SMALLEST = 1e-12  # of what a scale is made from: rows of zeros have one, too


def quantize_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in FP8, and the float32 scale of each row, shape (rows, 1).

    A row's largest number becomes the largest of FP8. What is not finite stays so.

    Example:
        >>> numbers, scale = quantize_rows(torch.tensor([[2.0, -7.0], [0.0, 0.0]]))
        >>> numbers.float().tolist(), round(scale[0].item() * 448, 5)
        ([[128.0, -448.0], [0.0, 0.0]], 7.0)
    """
    largest = matrix.abs().amax(-1, keepdim=True).float()
    scale = largest.clamp_min(SMALLEST) / LARGEST
    return (matrix / scale).to(FLOAT8), scale


def dequantize_rows(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the bfloat16 matrix nearest to what `quantize_rows` returned."""
    return numbers.bfloat16().mul_(scale)  # exact, then rounded once


@functools.cache
def has_scaled_product(device: torch.device) -> bool:
    """Return whether torch multiplies FP8 with scales for each row on a device, by trying."""
    with torch.no_grad():
        numbers, scale = quantize_rows(torch.ones(16, 16, device=device))
        try:
            found = scaled_product(numbers, scale, numbers, scale)
            return bool((found == 16).all())
        except (RuntimeError, ValueError):
            return False


def scaled_product(
    numbers: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """Return the product of quantized rows with a quantized weight by torch's own operator, in
    bfloat16.

    Source: torchao's training with scales for each row adds up fast in the forward pass, too
        (torchao 0.18 float8/config.py: Float8GemmConfig(use_fast_accum=True)).
    """
    return torch._scaled_mm(
        numbers,
        weight.t(),
        scale_a=scale,
        scale_b=weight_scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def plain_product(
    numbers: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """Return the product of quantized rows with a quantized weight in bfloat16, where every
    quantized number is exact: only the sums are rounded.
    """
    sums = numbers.bfloat16() @ weight.bfloat16().t()
    return (sums * scale * weight_scale.t()).bfloat16()


class _Product(torch.autograd.Function):
    """x W', with x quantized for each token: shapes (tokens, inputs) and (outputs, inputs)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Fp8Linear) -> torch.Tensor:
        ctx.save_for_backward(*layer.quantized)
        ctx.dtype = x.dtype
        return layer.product(*quantize_rows(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        weight, scale = ctx.saved_tensors
        return (grad @ dequantize_rows(weight, scale)).to(ctx.dtype), None


class Fp8Linear(torch.nn.Linear):
    """A frozen linear layer in FP8, for PEFT a linear layer like any other.

    Both parameters are kept as integers of the same bytes: PEFT makes adapters in the type of the
    weight where that is a floating one, and `model.to(dtype)` would round the scales.
    """

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        with torch.no_grad():
            numbers, scale = quantize_rows(layer.weight)
        self.weight = torch.nn.Parameter(numbers.view(torch.uint8), requires_grad=False)
        self.scale = torch.nn.Parameter(scale.view(torch.int32), requires_grad=False)
        self.bias = layer.bias
        self.scaled = has_scaled_product(self.weight.device)
        self.train(layer.training)

    def _apply(self, fn: Any, recurse: bool = True) -> Fp8Linear:
        super()._apply(fn, recurse)  # to another device, for one
        self.scaled = has_scaled_product(self.weight.device)
        return self

    @property
    def quantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight as `quantize_rows` returned it."""
        return self.weight.view(FLOAT8), self.scale.view(torch.float32)

    def product(self, numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the bfloat16 product of quantized rows with the weight, without a gradient."""
        multiply = scaled_product if self.scaled else plain_product
        return multiply(numbers, scale, *self.quantized)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output in bfloat16.

        Raises:
            TypeError: the inputs are no numbers: a model cast them to the type of a weight.
        """
        if not x.is_floating_point():
            raise TypeError(f"a layer in FP8 was given {x.dtype}")
        found = _Product.apply(x.reshape(-1, self.in_features), self)
        return self.with_bias(found).view(*x.shape[:-1], self.out_features)

    def with_bias(self, output: torch.Tensor) -> torch.Tensor:
        """Return a product with the layer's bias, if it has one."""
        return output if self.bias is None else output + self.bias.to(output.dtype)


def describe_fp8(model: Any) -> str | None:
    """Return how many layers of a model are in FP8, and what multiplies them; None for none."""
    layers = [one for one in model.modules() if isinstance(one, Fp8Linear)]
    if not layers:
        return None
    own = "FP8" if layers[0].scaled else "bfloat16 (this device has no product in FP8)"
    return f"FP8 in {len(layers)} layers, products in {own}"


def quantize_layers(model: Any, names: Iterable[str]) -> None:
    """Put linear layers of a model into FP8, one by one: memory never holds two copies of more."""
    for name in names:
        model.set_submodule(name, Fp8Linear(model.get_submodule(name)))
