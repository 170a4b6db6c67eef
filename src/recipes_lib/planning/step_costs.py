"""What a forward and backward pass costs a GPU beside the products of large matrices: kernels that
the processor launches, and bytes that pass through the GPU's memory.

Counted, not measured: in a block like Llama's every count is a sum over widths, and these are its
terms. Other families are taken to be like it, with their widths and norms.
"""

from __future__ import annotations

from dataclasses import dataclass

from recipes_lib.planning.settings import Settings

# of a pass, in kernels and bytes: what activation checkpointing does once more
FORWARD = 0.4


@dataclass(frozen=True)
class StepCosts:
    """One pass: kernels, and bytes.

    Args:
        per_token: for each computed token; `forward` of the forward pass alone.
        constant: whatever the tokens: adapters cast to half precision, and their gradients.
    """

    kernels: float
    per_token: float = 0.0
    forward: float = 0.0
    constant: float = 0.0


@dataclass(frozen=True)
class _Block:
    """Bytes of a token for each number of a width, and the kernels of a block.

    Args:
        hidden: of the residual stream, with two norms of it.
        norm: of each further norm, of queries and keys.
    """

    hidden: float
    query: float
    key: float
    inner: float
    norm: float
    kernels: float
    norm_kernels: float


@dataclass(frozen=True)
class _Adapter:
    """Of one adapted matrix: bytes of a token for each input (and more with dropout), output and
    rank, bytes of a pass for each trained weight, kernels (and more with dropout).
    """

    inputs: float
    dropped: float
    outputs: float
    rank: float
    weights: float
    kernels: float
    dropout: float


_EAGER = _Block(hidden=282, query=63, key=33, inner=28, norm=140, kernels=107, norm_kernels=25)
_COMPILED = _Block(hidden=39, query=23.5, key=8.7, inner=16, norm=15, kernels=27, norm_kernels=2.5)
# by the bytes of an adapter's weight: those of float32 are cast, and so is what they are fed with
_ADAPTERS = {
    4: _Adapter(36, 18, 20, 12, 18, kernels=18, dropout=2),
    2: _Adapter(12, 10, 20, 12, 6, kernels=10, dropout=2),
}
_COMPILED_ADAPTERS = {
    4: _Adapter(8.5, 4, 12, 4, 19, kernels=11, dropout=0),
    2: _Adapter(8.5, 4, 12, 4, 6, kernels=7, dropout=0),
}
# trained norms of a block, for each number of the residual stream; and their kernels
_NORMS, _NORM_KERNELS = 16, 11
_AROUND, _TRAINED_AROUND = 44, 84  # kernels outside the blocks, with adapters and without
_TRAINED_HEAD = 15  # bytes of a pass for each weight of trained embeddings and head
_DEQUANTISING = 6  # kernels for a 4-bit matrix: scales of scales, scales, weights; both ways


def step_costs(settings: Settings) -> StepCosts:
    """Return what one pass of these settings costs."""
    shape, adapter = settings.shape, settings.adapter
    block = _COMPILED if settings.compiled else _EAGER
    terms = (_COMPILED_ADAPTERS if settings.compiled else _ADAPTERS)[settings.trained_bytes]
    share = FORWARD
    again = 1 + share * settings.checkpointing
    kernels = per_token = constant = 0.0
    for layer, targets, count in settings.layers:
        inner = sum(
            one.inputs * one.active for one in layer.matrices if one.reads.endswith("inner")
        )
        own_kernels, own = block.kernels, block.hidden * shape.hidden + block.inner * inner
        own += block.query * layer.query + block.key * (layer.key + layer.value)
        if len(layer.norms) > 2:
            further = sum(many * width for many, width in layer.norms) - 2 * shape.hidden
            own += block.norm * further
            own_kernels += block.norm_kernels * (len(layer.norms) - 2)
        if adapter is None:
            own_kernels, own = own_kernels + _NORM_KERNELS, own + _NORMS * shape.hidden
        for matrix, rank in targets:
            dropped = bool(adapter and adapter.dropout)
            own_kernels += terms.kernels + terms.dropout * dropped
            each = (terms.inputs + terms.dropped * dropped) * matrix.inputs
            own += matrix.active * (each + terms.outputs * matrix.outputs + terms.rank * rank)
            weights = rank * max(matrix.experts, 1) * (matrix.inputs + matrix.outputs)
            constant += count * terms.weights * weights
        if settings.bits:
            own_kernels += _DEQUANTISING * sum(one.linear for one in layer.matrices)
        kernels += count * again * own_kernels
        per_token += count * own
    if adapter is None:
        constant += _TRAINED_HEAD * shape.embedding_parameters / (1 if shape.tied else 2)
    per_token *= settings.compute_bytes / 2
    around = _AROUND if adapter else _TRAINED_AROUND
    return StepCosts(around + kernels, again * per_token, share * per_token, constant)
