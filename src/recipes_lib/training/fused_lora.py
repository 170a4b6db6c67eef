"""LoRA's forward and backward pass written out, for the layers that read the same input together:
queries, keys and values; gate and up; each other layer alone.

PEFT runs every adapter as a chain of modules, each with a cast, a dropout mask and the dropped
input of its own. Here the input is dropped out once per group, its mask drawn again in the backward
pass instead of being kept, and what the adapters add goes into the product of the base. Matrices
and seeds of a decoder block are made at once when it begins. Parameters, checkpoints and the saved
adapter stay PEFT's: only `forward` of its layers is replaced, until the training ends.

The mask comes from counters (`kept`), so that `lora_kernels` draws the same one on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Sequence
from typing import Any

import bitsandbytes
import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.bnb import Linear4bit
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from recipes_lib.models.fp8 import FLOAT8, Fp8Linear, dequantize_rows, quantize_rows

if HAS_KERNELS := importlib.util.find_spec("triton") is not None:  # torch for a GPU brings it
    from recipes_lib.training import lora_kernels

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
DECISIONS = 2**16  # a dropout decision is 16 bits of a random number
ROUNDS = 7  # the fewest that pass every test of randomness (Salmon et al. 2011, table 2)
_LOW = 0xFFFFFFFF


def fuse_lora(model: Any, half: torch.dtype | None) -> FusedLora:
    """Replace the forward pass of every LoRA layer that can be computed together with others.

    Args:
        half: the precision of autocast, None without.
    """
    groups: list[_Group] = []
    others: Counter[str] = Counter()
    for parent in model.modules():
        children = {name: one for name, one in parent.named_children() if is_adapted(one)}
        for name, layer in list(children.items()):
            if why := why_not_fused(layer, half):
                others[why] += 1
                del children[name]
        for names in (*SHARED, *((name,) for name in children)):
            layers = [children.pop(name) for name in names if name in children]
            if layers and len({_dropout(one) for one in layers}) == 1:
                groups.append(_Group(layers))
            else:
                groups += [_Group([one]) for one in layers]
    fused = FusedLora(groups, others)
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            inside = {*block.modules()}
            fused.serve(block, [group for group in groups if group.layers[0] in inside])
    return fused


def is_adapted(module: Any) -> bool:
    """Whether a module is one of PEFT's with trained LoRA matrices."""
    return isinstance(module, LoraLayer) and bool(module.lora_A or module.lora_embedding_A)


def why_not_fused(layer: Any, half: torch.dtype | None) -> str | None:
    """Return why a LoRA layer stays as PEFT computes it, None if it need not."""
    if type(layer) not in (Linear, Linear4bit):
        return f"{type(layer).__name__} is no linear layer of 4, 16 or 32 bits"
    if len(layer.active_adapters) != 1:
        return "several adapters"
    name, base = layer.active_adapters[0], layer.get_base_layer()
    if name in layer.lora_variant:
        return type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
    four_bit = isinstance(base, bitsandbytes.nn.Linear4bit)
    if type(base) not in (torch.nn.Linear, Fp8Linear) and not four_bit:
        return f"its base is {type(base).__name__}"
    if layer.lora_bias[name] or any(one.requires_grad for one in base.parameters()):
        return "a bias is trained"
    if type(layer.lora_dropout[name]) not in (torch.nn.Dropout, torch.nn.Identity):
        return f"its dropout is {type(layer.lora_dropout[name]).__name__}"
    if _dropout(layer) and base.weight.is_cuda and not HAS_KERNELS:
        return "its dropout on a GPU needs the package triton"
    computes = base.compute_dtype if four_bit else half or base.weight.dtype
    if isinstance(base, Fp8Linear):
        computes = torch.bfloat16
    adapts = half or layer.lora_A[name].weight.dtype
    if computes != adapts:
        short = (str(one).removeprefix("torch.") for one in (computes, adapts))
        return "the base computes in {}, the adapter in {}".format(*short)
    return None


class FusedLora(TrainerCallback):
    """What was replaced in a model; gives it back when the training ends.

    Args:
        others: number of layers that stay PEFT's, by reason.
    """

    def __init__(self, groups: list[_Group], others: Counter[str]) -> None:
        self.groups = groups
        self.others = others
        self.hooks: list[RemovableHandle] = []
        for group in groups:
            for number, layer in enumerate(group.layers):
                layer.forward = functools.partial(group.forward, number)

    def serve(self, block: torch.nn.Module, groups: list[_Group]) -> None:
        """Make what these groups need when their block begins, after FSDP2 has gathered it."""
        if groups:
            begin, end = functools.partial(_begin, groups), functools.partial(_end, groups)
            self.hooks.append(block.register_forward_pre_hook(begin))
            self.hooks.append(block.register_forward_hook(end, always_call=True))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is saved, checked and asked afterwards is computed by PEFT."""
        for group in self.groups:
            for layer in group.layers:
                del layer.forward
        for hook in self.hooks:
            hook.remove()
        self.groups = []

    def line(self) -> str:
        """Return what is computed how, in one line."""
        fused = sum(len(group.layers) for group in self.groups)
        rest = "; ".join(f"{count} as PEFT does: {why}" for why, count in self.others.items())
        text = f"lora: {fused} layers fused in {len(self.groups)} groups"
        return (text if fused else "lora: not fused") + (f"; {rest}" if rest else "")


class _Group:
    """LoRA layers that read the same input: the first one that is called computes all."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.plain = [layer.forward for layer in layers]
        self.input: torch.Tensor | None = None
        self.waiting: dict[int, torch.Tensor] = {}  # outputs for this input, by layer
        # made for the whole block while it computes: A of all layers, B of each, and the seed
        self.matrices: list[torch.Tensor] = []
        self.seed: torch.Tensor | None = None

    def forward(self, number: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What one layer returns; PEFT's own where it is asked for anything unusual."""
        layer = self.layers[number]
        on, device = not (args or kwargs or layer.disable_adapters or layer.merged), x.device.type
        if torch.is_autocast_enabled(device):
            x_cast = x.to(torch.get_autocast_dtype(device))
        else:
            x_cast = x
            weights = _adapter(layer)
            on = on and x.dtype == weights[0].dtype
        if not on:
            return self.plain[number](x, *args, **kwargs)
        if self.input is not x or number not in self.waiting:
            self.input, self.waiting = x, dict(enumerate(self._compute(x_cast)))
        output = self.waiting.pop(number)
        if not self.waiting:
            self.input = None
        return output

    def _compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        drop = round(_dropout(self.layers[0]) * DECISIONS)
        seed = (_seeds(1, x.device) if self.seed is None else self.seed) if drop else None
        matrices = self.matrices
        if not matrices or matrices[0].dtype != x.dtype:
            (matrices,) = _matrices([self], x.dtype)
        return _Together.apply(x, seed, drop, self.layers, *matrices, *self.weights())

    def weights(self) -> list[torch.Tensor]:
        """Return A and B of each layer."""
        return [matrix for layer in self.layers for matrix in _adapter(layer)]


def _begin(groups: list[_Group], block: Any, args: Any) -> None:
    if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
        return  # what is computed twice draws its seeds itself, twice the same
    weight = groups[0].weights()[0]
    device = weight.device.type
    on = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if on else weight.dtype
    for group, matrices in zip(groups, _matrices(groups, dtype), strict=True):
        group.matrices = matrices
    if any(_dropout(group.layers[0]) for group in groups):
        for group, seed in zip(groups, _seeds(len(groups), weight.device).split(1), strict=True):
            group.seed = seed


def _end(groups: list[_Group], *call: Any) -> None:
    for group in groups:
        group.matrices, group.seed = [], None


def _seeds(count: int, device: torch.device) -> torch.Tensor:
    # drawn on the device: nobody waits, and recomputation draws the same again
    return torch.randint(2**62, (count,), device=device)


def _matrices(groups: list[_Group], dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Return for each group A of all its layers below each other, and B of each layer, in one
    precision; all copies are made at once.
    """
    found, copies, sources = [], [], []
    for group in groups:
        weights = [one.detach() for one in group.weights()]
        if len(group.layers) > 1 or weights[0].dtype != dtype:
            a = weights[0].new_empty(
                sum(one.shape[0] for one in weights[::2]), weights[0].shape[1], dtype=dtype
            )
            copies += a.split([one.shape[0] for one in weights[::2]])
            sources += weights[::2]
        else:
            a = weights[0]
        b = weights[1::2]
        if b[0].dtype != dtype:
            sources += b
            b = [torch.empty_like(one, dtype=dtype) for one in b]
            copies += b
        found.append([a, *b])
    if copies:
        torch._foreach_copy_(copies, sources)
    return found


def _adapter(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    name = layer.active_adapters[0]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _dropout(layer: Any) -> float:
    dropout = layer.lora_dropout[layer.active_adapters[0]]
    return float(dropout.p) if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0


class _Together(torch.autograd.Function):
    """Outputs of a group: x W' + s drop(x) A' B' for each of its layers.

    Letters: T tokens, K inputs, N outputs of one layer, R the ranks of all layers together.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, seed: Any, drop: int, layers: list[Any], *matrices: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        a, b, weights = matrices[0], matrices[1 : len(layers) + 1], matrices[len(layers) + 1 :]
        tokens = x.reshape(-1, x.shape[-1]).contiguous()  # TK
        low = dropped_product(tokens, a, seed, drop)  # TR, with A as RK
        bases = [layer.get_base_layer() for layer in layers]
        scales = [layer.scaling[layer.active_adapters[0]] for layer in layers]
        rows: Any = None  # of FP8, once for all layers
        outputs = []
        for base in bases:
            if isinstance(base, Fp8Linear):
                rows = rows or quantize_rows(tokens)
                outputs.append(base.with_bias(base.product(*rows)).view(*x.shape[:-1], -1))
            else:
                outputs.append(base(x))
        add_up([one.view(-1, one.shape[-1]) for one in outputs], low, b, scales)
        ctx.drop, ctx.scales, ctx.shape = drop, scales, x.shape
        ctx.dtypes = [one.dtype for one in weights]
        ctx.states = [_state(base) for base in bases]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed, tokens, low, a, *b, *(base.weight for base in bases))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        seed, x, low, a, *saved = ctx.saved_tensors
        count = len(grads)
        b, bases = saved[:count], saved[count:]
        used = [number for number, grad in enumerate(grads) if grad is not None]
        # of an output that nothing used, zeros
        rows = [
            (x.new_zeros(len(x), len(wide)) if grad is None else grad).reshape(-1, len(wide))
            for grad, wide in zip(grads, b, strict=True)
        ]
        of_low = down(rows, b, ctx.scales)
        of_x: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            first, *others = used
            of_x = rows[first] @ _whole(bases[first], ctx.states[first], x.dtype)
            for number in others:
                _add_mm(of_x, rows[number], _whole(bases[number], ctx.states[number], x.dtype))
            add_dropped_product(of_x, of_low, a, seed, ctx.drop)
            of_x = of_x.view(ctx.shape)
        matrices = adapter_gradients(
            of_low, x, seed, ctx.drop, low, rows, b, ctx.scales, ctx.dtypes[0]
        )
        needed = ctx.needs_input_grad[5 + count :]
        found = [
            matrix.to(dtype) if needs and number // 2 in used else None
            for number, (matrix, dtype, needs) in enumerate(
                zip(matrices, ctx.dtypes, needed, strict=True)
            )
        ]
        return (of_x, *(None,) * (4 + count), *found)


def _state(base: Any) -> Any:
    """What turns the weight of a base layer into numbers, None where it holds them."""
    return (
        base.quantized[1]
        if isinstance(base, Fp8Linear)
        else getattr(base.weight, "quant_state", None)
    )


def _whole(weight: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """The matrix of a base layer, in the precision of the products."""
    if isinstance(state, torch.Tensor):
        weight = dequantize_rows(weight.view(FLOAT8), state)
    elif state is not None:
        weight = bitsandbytes.functional.dequantize_4bit(weight, state)
    return weight.to(dtype)


def dropped_product(
    x: torch.Tensor, a: torch.Tensor, seed: torch.Tensor | None, drop: int
) -> torch.Tensor:
    """Return drop(x) A'.

    Args:
        seed: of this dropout, one number; None for no dropout.
        drop: how many of `DECISIONS` drop an element.
    """
    if seed is None:
        return x @ a.t()
    if _has_kernels(x):
        return lora_kernels.product(x, a, seed, drop)
    dropped = x.masked_fill(~kept(seed, x.shape[0], x.shape[1], drop), 0)
    return torch.addmm(x.new_empty(()), dropped, a.t(), beta=0, alpha=_scale(drop))


def add_dropped_product(
    of_x: torch.Tensor,
    of_low: torch.Tensor,
    a: torch.Tensor,
    seed: torch.Tensor | None,
    drop: int,
) -> None:
    """Add to the gradient of x what comes to it through `dropped_product`.

    Args:
        of_low: the gradient of its result.
    """
    if seed is None:
        _add_mm(of_x, of_low, a)
    elif _has_kernels(of_x):
        lora_kernels.add_product(of_x, of_low, a, seed, drop)
    else:
        dropped = ~kept(seed, of_x.shape[0], of_x.shape[1], drop)
        of_x.add_((of_low @ a).masked_fill_(dropped, 0), alpha=_scale(drop))


def add_up(
    outputs: list[torch.Tensor], low: torch.Tensor, b: Sequence[torch.Tensor], scales: list[float]
) -> None:
    """Add to the output of each layer its scale times its part of `low` times B'."""
    if _has_kernels(low):
        return lora_kernels.add_outputs(outputs, low, b, scales)
    parts = low.split([one.shape[1] for one in b], 1)
    for output, part, wide, scale in zip(outputs, parts, b, scales, strict=True):
        output.addmm_(part, wide.t(), alpha=scale)
    return None


def down(grads: list[torch.Tensor], b: Sequence[torch.Tensor], scales: list[float]) -> torch.Tensor:
    """Return the gradient of `low` in `add_up`, from those of the outputs."""
    if _has_kernels(grads[0]):
        return lora_kernels.gradient_of_low([one.contiguous() for one in grads], b, scales)
    of_low = grads[0].new_empty(len(grads[0]), sum(one.shape[1] for one in b))
    parts = of_low.split([one.shape[1] for one in b], 1)
    for part, grad, wide, scale in zip(parts, grads, b, scales, strict=True):
        part.addmm_(grad, wide, beta=0, alpha=scale)
    return of_low


def adapter_gradients(
    of_low: torch.Tensor,
    x: torch.Tensor,
    seed: torch.Tensor | None,
    drop: int,
    low: torch.Tensor,
    grads: list[torch.Tensor],
    b: Sequence[torch.Tensor],
    scales: list[float],
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Return the gradients of A and B of each layer, where `low` is `dropped_product`'s and the
    outputs `add_up`'s.

    Args:
        of_low: the gradient of `low`.
        grads: those of the outputs.
        dtype: of what the kernels return; torch returns that of its products.
    """
    ranks, inputs = [one.shape[1] for one in b], x.shape[1]
    if _has_kernels(x):
        grads = [one.contiguous() for one in grads]
        sums = lora_kernels.gradients(of_low, x, seed, drop, low, grads, ranks, scales)
        found = (sums.sum(0) if len(sums) > 1 else sums.view(-1)).to(dtype)
        of_a, *of_b = found.split([sum(ranks) * inputs, *(one.numel() for one in b)])
        matrices = [one.view(wide.shape) for one, wide in zip(of_b, b, strict=True)]
        of_a = of_a.view(-1, inputs)
    else:
        matrices = [
            torch.addmm(part.new_empty(()), grad.t(), part, beta=0, alpha=scale)
            for grad, part, scale in zip(grads, low.split(ranks, 1), scales, strict=True)
        ]
        if seed is not None:
            x = x.masked_fill(~kept(seed, x.shape[0], x.shape[1], drop), 0)
        of_a = torch.addmm(x.new_empty(()), of_low.t(), x, beta=0, alpha=_scale(drop))
    return [one for pair in zip(of_a.split(ranks), matrices, strict=True) for one in pair]


def _add_mm(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if _has_kernels(total):
        lora_kernels.add_mm(total, left, right)
    else:
        total.addmm_(left, right)


def _has_kernels(x: torch.Tensor) -> bool:
    return HAS_KERNELS and x.is_cuda


def _scale(drop: int) -> float:
    return DECISIONS / (DECISIONS - drop)


def kept(seed: torch.Tensor, rows: int, columns: int, drop: int) -> torch.Tensor:
    """Return which elements of a matrix a dropout keeps: row and column are the counters of
    Philox-4x32, which makes eight decisions at once.

    Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (2011), section
        4; constants of its reference implementation.
    """
    blocks = torch.arange(-(-columns // 8), device=seed.device)
    words = [blocks, torch.arange(rows, device=seed.device)[:, None], *(blocks.new_zeros(2))]
    key = [seed & _LOW, seed >> 32]
    for _ in range(ROUNDS):
        left, right = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            (right >> 32 & _LOW) ^ words[1] ^ key[0],
            right & _LOW,
            (left >> 32 & _LOW) ^ words[3] ^ key[1],
            left & _LOW,
        ]
        key = [key[0] + 0x9E3779B9 & _LOW, key[1] + 0xBB67AE85 & _LOW]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1).flatten(1)[:, :columns] >= drop
