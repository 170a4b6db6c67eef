"""The memory of one process of a training, part by part."""

from typing import TYPE_CHECKING

from recipes_lib.config.recipe import DPO, sync_each_batch

if TYPE_CHECKING:
    from recipes_lib.plan.plan import Plan

GIB = 2**30
CONTEXT_GIB = 0.6  # of a process on a GPU before anything is there: CUDA and its kernels
NCCL_GIB = 0.5  # buffers of a process that talks to others
GAPS = 0.05  # between the blocks that torch has allocated, as a share of them
# Python with torch, transformers and datasets beside the model: 0.6 to 0.9 in three runs
CPU_PROCESS_GIB = 0.8
TILE = 128  # tokens of the loss whose logits are there at once
FLOAT32 = 4  # bytes
# Bytes of a 4-bit weight: the scale of each block of 64 is a float32, or with double quantization a
# byte and a float32 for 256 scales.
NF4 = 0.5 + 4 / 64
NF4_NESTED = 0.5 + (1 + 4 / 256) / 64
# Bytes of an optimizer's state for each trained weight, by what its name in `train.optim` holds;
# the first that fits counts. AdamW's two numbers have the weight's precision.
OPTIMIZERS = {"ademamix_8bit": 3.1, "ademamix": 12, "lion_8bit": 1.1, "lion": 4, "8bit": 2.1}
OPTIMIZERS |= {"rmsprop": 4, "adagrad": 4, "paged": 8, "bnb": 8, "sgd": 0.1, "adafactor": 0.1}


def memory_of(plan: "Plan") -> dict[str, float]:
    """Return GiB of one process, by what they are for."""
    sizes = _of_weights(plan) | _of_activations(plan)
    memory = {part: size / GIB for part, size in sizes.items()}
    if plan.card.name == "cpu":
        return memory | {"context": CPU_PROCESS_GIB}
    context = CONTEXT_GIB
    if plan.launch.world_size > 1:
        context += NCCL_GIB
    return memory | {"context": context + GAPS * sum(memory.values())}


def _of_weights(plan: "Plan") -> dict[str, float]:
    """Return the bytes of weights and of what is kept for each of them."""
    traced = plan.trace
    launch = plan.launch
    is_full = plan.recipe.lora is None
    is_sharded = launch.distributed_type == "FSDP"
    shards = launch.world_size if is_sharded else 1

    frozen: float = traced.weight_bytes
    trained: float = traced.trained_bytes
    if is_full:
        frozen -= trained
        if is_sharded:
            trained = FLOAT32 * traced.trained  # FSDP2 keeps them so for autocast

    name = str(plan.recipe.train.get("optim", ""))
    optimizer = 2 * trained  # of AdamW
    for word, size in OPTIMIZERS.items():
        if word in name:
            optimizer = size * traced.trained
            break
    if is_full and "8bit" in name:  # bitsandbytes keeps that of embeddings in float32
        optimizer *= 1 + 2.8 * traced.vocabulary * traced.hidden / traced.trained

    gradients = trained / shards
    if is_sharded and plan.steps.accumulation > 1 and not sync_each_batch(plan.recipe):
        gradients = FLOAT32 * traced.trained  # whole until the step's last backward pass
    elif launch.world_size > 1 and not is_sharded:
        gradients *= 2  # DDP's buckets hold a copy

    gathered = 0.0
    if is_sharded:  # embeddings and head; this block and the next, or all without resharding
        blocks = traced.parameters - traced.outside
        if launch.config.fsdp_config.get("fsdp_reshard_after_forward", True):
            blocks = min(2 * traced.largest_layer, blocks)
        gathered = blocks * traced.weight_bytes / traced.parameters + traced.outside * plan.width
        if is_full:  # gradients that are not shared out yet
            gathered += FLOAT32 * (traced.largest_layer + traced.outside)
    return {
        "weights": frozen / shards,
        "trained": trained / shards,
        "gradients": gradients,
        "optimizer": optimizer / shards,
        "gathered": gathered,
    }


def _of_activations(plan: "Plan") -> dict[str, float]:
    """Return the bytes of what the forward pass keeps, and of the most that is there beside it."""
    traced = plan.trace
    steps = plan.steps
    tokens = steps.largest
    kept = traced.per_token
    block = traced.block
    # each block keeps a mask of sdpa; on a CPU, with an example at a time, those with a window
    masks = 0
    if plan.recipe.stage == DPO:  # pairs are padded, on a CPU too
        masks = traced.layers
    elif plan.card.name == "cpu":
        masks = traced.windows
    elif steps.per_device > 1 or plan.recipe.train.get("packing"):
        masks = traced.layers
    if masks and (plan.recipe.model.attn_implementation or "sdpa") in ("sdpa", "eager"):
        kept += masks * steps.row * plan.width
        block += steps.row * plan.width

    activations = tokens * kept + traced.constant
    at_work = tokens * (4.0 + 2 * plan.width) * traced.hidden
    if plan.checkpointing:  # one block is computed again
        activations = tokens * traced.checkpointed
        at_work += tokens * block + traced.constant / traced.layers
    # a tile of logits with its gradient; in float32 the gradients of the head's input and of it
    logits = TILE * traced.vocabulary * (plan.width + 8) + FLOAT32 * tokens * traced.hidden
    if plan.recipe.lora is None and plan.launch.distributed_type != "FSDP":
        logits += FLOAT32 * traced.vocabulary * traced.hidden
    return {"activations": activations, "temporary": max(logits, at_work)}
