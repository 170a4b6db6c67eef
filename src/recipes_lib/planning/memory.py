"""Memory of one process: what lies there all the time, what a micro-batch adds, and the largest
micro-batch that still fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipes_lib.planning.activations import activations_of, backward_bytes, head_bytes
from recipes_lib.planning.cards import Card
from recipes_lib.planning.settings import Settings

GIB, MIB = 2**30, 2**20
CONTEXT_GIB, NCCL_GIB, GAPS = 0.6, 0.5, 0.05
# Python with torch, transformers and datasets beside the model: 0.6 to 0.9 in three runs
CPU_PROCESS_GIB = 0.8
BLOCK_4BIT, NESTED_BLOCK = 64, 256


@dataclass(frozen=True)
class Memory:
    """GiB of one process at its worst moment.

    Args:
        weights: base weights, 4-bit constants among them; the shard under FSDP2.
        gathered: FSDP2's whole layers beside the shards.
        activations: kept for the backward pass.
        moment: logits tile, recomputed block, gradients inside a block: whichever is largest.
        validation: of a validation batch; counts where it is more than training needs.
        outside: context, communication and gaps of the allocator.
    """

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    moment: float
    validation: float
    outside: float

    @property
    def peak(self) -> float:
        """What `torch.cuda.max_memory_allocated` will show."""
        steady = self.weights + self.adapter + self.gradients + self.optimizer + self.gathered
        return steady + max(self.activations + self.moment, self.validation)

    @property
    def needed(self) -> float:
        """What the card must have."""
        return self.peak + self.outside


def memory_of(settings: Settings, tokens: int, row: int, eval_tokens: int = 0) -> Memory:
    """Return the memory for a forward pass of `tokens` tokens in rows of `row`, and for the largest
    validation batch of `eval_tokens`.
    """
    trained, width = settings.trained_parameters, settings.trained_bytes
    shards = settings.world_size if settings.sharded else 1
    weights = weight_gib(settings)
    if settings.adapter is None and settings.bits is None:
        weights = weights * width / settings.weight_bytes
    gradients: float = trained * width / shards
    if settings.sharded and settings.accumulates and not settings.shares_each_batch:
        # whole, until the last backward pass of the step turns them into shares, layer by layer
        gradients = trained * (4 if settings.half else width)
    if not settings.sharded and settings.world_size > 1:
        gradients *= 2  # DDP's buckets hold a copy
    kept = activations_of(settings)
    at_work = backward_bytes(settings, tokens) + _dequantised(settings)
    if settings.checkpointing:
        at_work += kept.block.of(tokens, row)
    forward = backward_bytes(settings, eval_tokens) + head_bytes(settings, eval_tokens)
    memory = Memory(
        weights=weights / shards,
        adapter=trained * width / GIB / shards if settings.adapter is not None else 0.0,
        gradients=gradients / GIB,
        optimizer=trained * optimizer_bytes(settings.optimizer, width) / shards / GIB,
        gathered=_gathered(settings) / GIB,
        activations=kept.saved(tokens, row, settings.checkpointing) / GIB,
        moment=max(head_bytes(settings, tokens), at_work) / GIB,
        validation=forward / GIB if eval_tokens else 0.0,
        outside=CPU_PROCESS_GIB,
    )
    if settings.device == "cpu":
        return memory
    nccl = NCCL_GIB if settings.world_size > 1 else 0.0
    return replace(memory, outside=CONTEXT_GIB + nccl + GAPS * memory.peak)


def largest_tokens(settings: Settings, card: Card, row: int, eval_tokens: int = 0) -> int:
    """Return the largest forward pass in tokens that fits the card, in rows of `row`; a flattened
    micro-batch under sdpa is one row, so its mask grows with the square.
    """

    def fits(tokens: int) -> bool:
        rows = tokens if settings.flattened and settings.masked else min(row, tokens)
        return memory_of(settings, tokens, rows, eval_tokens).needed <= card.memory_gib

    low, high = 0, 1 << 24
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def weight_gib(settings: Settings) -> float:
    """Return the base weights in GiB, whole."""
    shape, per_weight = settings.shape, float(settings.weight_bytes)
    if settings.bits == 8:
        per_weight = 1.0
    elif settings.bits == 4:
        # half a byte, and the scale of each block of 64: a float32, or a byte and a float32 for 256
        # scales
        scale = 1 + 4 / NESTED_BLOCK if settings.double_quantized else 4
        per_weight = 0.5 + scale / BLOCK_4BIT
    quantized = shape.linear_parameters  # of linear layers alone, whoever quantizes
    rest = shape.parameters - quantized
    return (quantized * per_weight + rest * settings.weight_bytes) / GIB


def host_gib(settings: Settings) -> float:
    """Return what the processes of one machine, of several the first, hold in its memory while a
    model is loaded for GPUs: all weights in each process, or in one where rank 0 reads them alone;
    bitsandbytes takes weights to the GPU one by one.
    """
    full = settings.adapter is None
    width = settings.trained_bytes if full else settings.weight_bytes
    whole = 0.0 if settings.bits else settings.shape.parameters * width / GIB
    readers = 1 if settings.reads_once else settings.per_machine
    return readers * whole + settings.per_machine * CPU_PROCESS_GIB


def optimizer_bytes(optimizer: str, trained_bytes: int) -> float:
    """Return optimizer state in bytes per trained weight; an unknown name counts as AdamW.

    Example:
        >>> optimizer_bytes("adamw_torch_fused", 4), optimizer_bytes("adamw_8bit", 4)
        (8, 2.1)
    """
    name = optimizer.lower()
    if "sgd" in name or "adafactor" in name:
        return 0.1
    moments = 1 if any(word in name for word in ("lion", "rmsprop", "adagrad")) else 2
    if "8bit" in name:
        return 1.05 * moments
    if "4bit" in name:
        return 0.55 * moments
    return moments * (4 if "bnb" in name or "paged" in name or "32bit" in name else trained_bytes)


def _gathered(settings: Settings) -> float:
    """Bytes of whole layers under FSDP2: embeddings and head, and two of the largest blocks (this
    and the next), or all without resharding. Full fine-tuning adds gradients that are not shared
    out yet.
    """
    if not settings.sharded:
        return 0.0
    shape = settings.shape
    others = (shape.parameters - shape.block_parameters) * settings.weight_bytes
    blocks = weight_gib(settings) * GIB - others
    largest = max(block.parameters for block, _ in shape.kinds)
    gathered: float = shape.embedding_parameters * settings.weight_bytes
    gathered += 2 * blocks * largest / shape.block_parameters if settings.reshard else blocks
    if settings.adapter is None:
        gathered += 4 * (largest + shape.embedding_parameters)
    return gathered


def _dequantised(settings: Settings) -> float:
    """The largest quantized matrix, written out for its product."""
    if not settings.bits:
        return 0.0
    return 2.0 * max(
        matrix.inputs * matrix.outputs
        for block, _ in settings.shape.kinds
        for matrix in block.matrices
        if matrix.linear
    )
