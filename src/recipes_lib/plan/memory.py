"""The memory of one process at its worst moment, and the largest micro-batch that still fits."""

from __future__ import annotations

from dataclasses import dataclass

from recipes_lib.plan.cards import Card
from recipes_lib.plan.steps import Setup
from recipes_lib.plan.trace import Trace

GIB = 2**30
CONTEXT_GIB, NCCL_GIB, GAPS = 0.6, 0.5, 0.05
# Python with torch, transformers and datasets beside the model: 0.6 to 0.9 in three runs
CPU_PROCESS_GIB = 0.8
TILE = 128  # tokens of the loss whose logits are there at once


@dataclass(frozen=True)
class Memory:
    """GiB of one process.

    Args:
        weights: of the base; the shard under FSDP2.
        gathered: FSDP2's whole layers beside the shards.
        activations: kept for the backward pass.
        moment: logits, or what one block needs while it is computed again and differentiated.
        outside: context, communication and gaps of the allocator.
    """

    weights: float
    trained: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    moment: float
    outside: float

    @property
    def peak(self) -> float:
        """What `torch.cuda.max_memory_allocated` will show."""
        return self.needed - self.outside

    @property
    def needed(self) -> float:
        """What the card must have."""
        return sum(vars(self).values())


def memory_of(trace: Trace, setup: Setup, tokens: int, row: int) -> Memory:
    """Return the memory for a micro-batch of `tokens` tokens in rows of `row`."""
    shards = setup.world_size if setup.sharded else 1
    half = setup.precision.half is not None
    trained = float(trace.trained_bytes)
    weights, adapter = float(trace.weight_bytes), trained
    if setup.full:
        # FSDP2 under autocast keeps trained weights in float32
        trained = float(4 * trace.trained) if setup.sharded and half else trained
        weights, adapter = weights - trace.trained_bytes + trained, 0.0
    gradients = trained / shards
    if setup.sharded and setup.accumulation > 1 and not setup.shares_each_batch:
        gradients = 4.0 * trace.trained  # whole until the step's last backward pass
    elif setup.world_size > 1 and not setup.sharded:
        gradients *= 2  # DDP's buckets hold a copy
    kept, block = trace.per_token, trace.block
    if setup.masked:  # sdpa makes its mask anew in each block and keeps it
        mask = float(row * setup.precision.compute_bytes)
        kept, block = kept + trace.layers * mask, block + mask
    activations = tokens * kept + trace.constant
    at_work = float(tokens) * (4 + 2 * setup.precision.compute_bytes) * trace.hidden
    if setup.checkpointing:
        attended = trace.attention * setup.precision.compute_bytes if setup.selective else 0
        activations = tokens * (trace.checkpointed + attended)
        at_work += tokens * block + trace.constant / trace.layers
    memory = Memory(
        weights=weights / shards / GIB,
        trained=adapter / shards / GIB,
        gradients=gradients / GIB,
        optimizer=trace.trained / shards * _optimizer_bytes(setup, trained / trace.trained) / GIB,
        gathered=_gathered(trace, setup) / GIB if setup.sharded else 0.0,
        activations=activations / GIB,
        moment=max(_logits(trace, setup, tokens), at_work) / GIB,
        outside=0.0,
    )
    outside = CONTEXT_GIB + NCCL_GIB * (setup.world_size > 1) + GAPS * memory.peak
    return Memory(**vars(memory) | {"outside": CPU_PROCESS_GIB if setup.on_cpu else outside})


def largest_tokens(trace: Trace, setup: Setup, card: Card, row: int) -> int:
    """Return the largest micro-batch in tokens that fits the card, in rows of `row`."""
    low, high = 0, 1 << 24
    while low < high:
        middle = (low + high + 1) // 2
        rows = middle if setup.flattened else min(row, middle)
        fits = memory_of(trace, setup, middle, rows).needed <= card.memory_gib
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _optimizer_bytes(setup: Setup, trained_bytes: float) -> float:
    """Return the optimizer's state in bytes per trained weight; an unknown name counts as AdamW."""
    name = setup.optimizer.lower()
    if "sgd" in name or "adafactor" in name:
        return 0.1
    moments = 1 if any(word in name for word in ("lion", "rmsprop", "adagrad")) else 2
    if "8bit" in name:
        return 1.05 * moments
    if "4bit" in name:
        return 0.55 * moments
    in_float32 = any(word in name for word in ("bnb", "paged", "32bit"))
    return moments * (4.0 if in_float32 else trained_bytes)


def _gathered(trace: Trace, setup: Setup) -> float:
    """Bytes of whole layers under FSDP2: embeddings and head, and this block and the next, or all
    without resharding. Full fine-tuning adds gradients that are not shared out yet.
    """
    width = trace.weight_bytes / trace.parameters
    in_blocks = trace.parameters - trace.outside
    blocks = min(2 * trace.largest_layer, in_blocks) if setup.reshard else in_blocks
    gathered = trace.outside * setup.precision.compute_bytes + blocks * width
    return gathered + (4 * (trace.largest_layer + trace.outside) if setup.full else 0)


def _logits(trace: Trace, setup: Setup, tokens: int) -> float:
    """Bytes of a tile of logits, and in float32 the gradient of the head's input and, in full
    fine-tuning, of the head.
    """
    rows = tokens + (trace.vocabulary if setup.full and not setup.sharded else 0)
    tile = TILE * trace.vocabulary * (setup.precision.compute_bytes + 8)
    return float(tile + 4 * rows * trace.hidden)
