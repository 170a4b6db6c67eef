"""What to change: the first change that makes a training fit, or that makes it faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from recipes_lib.core.errors import RecipesError
from recipes_lib.plan.plan import Plan

COUNTS = (2, 4, 8)
METHODS = ("LoRA", "QLoRA", "full")


@dataclass(frozen=True)
class Advice:
    """A change of a recipe.

    Args:
        words: what to type, `section.key=value`.
        why: what it does.
        plan: the plan with it.
        same_result: whether the training computes the same.
    """

    words: str
    why: str
    plan: Plan
    same_result: bool = True


def advise(plan: Plan) -> Advice | None:
    """Return the first change that fits, smallest first; for what fits, one that is faster."""
    if not plan.fits:
        return next((advice for advice in _to_fit(plan) if advice.plan.fits), None)
    if plan.setup.checkpointing:
        kept = plan.change(checkpointing=False)
        if kept.fits:
            why = "activations fit without computing every block twice"
            return Advice("train.activation_checkpointing=false", why, kept)
    return None


def _to_fit(plan: Plan) -> Iterator[Advice]:
    setup = plan.setup
    recompute = "train.activation_checkpointing=true"
    recomputed = plan.change(checkpointing=True)
    for size in (size for size in (4, 2, 1) if size < setup.per_device):
        if setup.per_device % size == 0:
            factor = setup.per_device // size
            smaller = plan.change(per_device=size, accumulation=setup.accumulation * factor)
            words = f"train.per_device_train_batch_size={size}"
            yield Advice(words, "smaller micro-batches of the same step", smaller)
    if not setup.checkpointing:
        yield Advice(
            recompute, "keeps the inputs of the blocks and computes each twice", recomputed
        )
        if setup.per_device > 1:
            smallest = recomputed.change(
                per_device=1, accumulation=setup.accumulation * setup.per_device
            )
            words = f"{recompute} train.per_device_train_batch_size=1"
            yield Advice(words, "both", smallest)
    for count in COUNTS if not setup.on_cpu else ():
        rows, rest = divmod(setup.per_device * setup.accumulation * setup.world_size, count)
        if count <= setup.world_size or rest or rows % setup.per_device:
            continue
        shared = recomputed.change(
            world_size=count, per_machine=count, sharded=True, accumulation=rows // setup.per_device
        )
        words = f"launch.accelerate=fsdp launch.gpus={count}"
        words += "" if setup.checkpointing else f" {recompute}"
        yield Advice(words, f"weights and optimizer shared out over {count} GPUs", shared)
    if not setup.full and setup.precision.bits is None:
        four = replace(setup.precision, bits=4, nested=True)
        words = "'quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4,"
        words += " bnb_4bit_use_double_quant: true, bnb_4bit_compute_dtype: bfloat16}'"
        quantized = recomputed.change(precision=four)
        words += "" if setup.checkpointing else f" {recompute}"
        yield Advice(words, "the base in 4 bits", quantized, same_result=False)
    if (setup.max_length or 0) > 512:
        shorter = recomputed.change(max_length=512)
        words = f"train.max_length=512{'' if setup.checkpointing else f' {recompute}'}"
        yield Advice(words, "longer examples lose their tail", shorter, same_result=False)


def table(plan: Plan) -> list[tuple[str, int, str, Plan]]:
    """Return method, number of cards, strategy and plan for each way that can be planned."""
    found = []
    examples = plan.steps.examples_per_step
    for method in METHODS:
        if (method != "full") == plan.setup.full:
            continue  # a recipe without a lora section says nothing of an adapter
        bits = 4 if method == "QLoRA" else None
        precision = replace(plan.setup.precision, bits=bits, nested=bits is not None)
        for count in (1, *COUNTS) if not plan.setup.on_cpu else (1,):
            share, rest = divmod(examples, count)
            if rest or not share:
                continue
            size = next(n for n in range(min(plan.setup.per_device, share), 0, -1) if not share % n)
            for strategy in ("one",) if count == 1 else ("DDP", "FSDP2"):
                other = plan.change(
                    precision=precision,
                    per_device=size,
                    accumulation=share // size,
                    world_size=count,
                    per_machine=count,
                    sharded=strategy == "FSDP2",
                )
                try:
                    found.append((method, count, strategy, other))
                    _ = other.memory
                except RecipesError:
                    found.pop()
    return found
