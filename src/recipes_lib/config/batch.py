"""The arithmetic of steps: examples per step = per device x accumulation x processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from recipes_lib.core.errors import RecipeError

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe


def accumulation_steps(recipe: Recipe, world_size: int) -> int:
    """Return the gradient accumulation steps, derived from `run.global_batch_size` if it is set."""
    if recipe.run.global_batch_size is None:
        return int(recipe.train.get("gradient_accumulation_steps", 1))
    per_device = recipe.train.get("per_device_train_batch_size", 8)
    try:
        return solve_batch(recipe.run.global_batch_size, per_device, world_size)
    except RecipeError as error:
        raise recipe.error("run.global_batch_size", error.what, *error.hints) from None


def sync_each_batch(recipe: Recipe) -> bool:
    """Return whether FSDP2 shares out the gradients of every backward pass, not once per optimizer
    step: else each GPU keeps all of them in float32, 4 bytes per trained parameter.
    """
    return recipe.lora is None or bool(recipe.lora.get("modules_to_save"))


def solve_batch(global_batch_size: int, per_device: int, world_size: int) -> int:
    """Return the accumulation steps that make a step see `global_batch_size` examples."""
    micro_batch = per_device * world_size
    accumulation, rest = divmod(global_batch_size, micro_batch)
    if rest == 0 and accumulation > 0:
        return accumulation
    below = global_batch_size - rest
    legal = " or ".join(str(size) for size in (below, below + micro_batch) if size)
    raise RecipeError(
        f"run.global_batch_size {global_batch_size} cannot be made of micro-batches:"
        f" {global_batch_size} / ({per_device} per device x {world_size} processes = {micro_batch})"
        f" = {global_batch_size / micro_batch:g}",
        f"set run.global_batch_size to {legal}, or another train.per_device_train_batch_size",
    )


def planned_steps(
    rows: int,
    *,
    per_device: int,
    accumulation: int,
    world_size: int,
    epochs: float,
    max_steps: int = -1,
) -> tuple[int, int]:
    """Return the optimizer steps of an epoch and of the run, for which `max_steps` above 0 wins. A
    step is a whole global batch; the rows that do not fill one are left out of the epoch.
    """
    examples = per_device * accumulation * world_size
    per_epoch = max(rows // examples, 1)
    return per_epoch, max_steps if max_steps > 0 else math.ceil(per_epoch * epochs)


def describe_batch(
    rows: int, steps: tuple[int, int], *, per_device: int, accumulation: int, world_size: int
) -> str:
    """Return the batch arithmetic of the start-up lines; `steps` are those of `planned_steps`."""
    examples = per_device * accumulation * world_size
    rest = rows % examples if steps[1] >= steps[0] else 0
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    return (
        f"{per_device} per device x {accumulation} accumulation x {ranks} = {examples} examples per"
        f" step; {rows:,} examples -> {steps[0]:,} steps per epoch, {steps[1]:,} steps"
        + (f"; left out, because they fill no step: {rest}" if rest else "")
    )
