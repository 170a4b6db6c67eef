"""Whether a training may start: the plan against the card that is really there. A plan that cannot
be made stops nobody.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from recipes_lib.config.accelerate_config import AccelerateConfig
from recipes_lib.config.launch import READS_ONCE_KEY, Active, Launch, reads_once_is_asked
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipesError
from recipes_lib.planning.advice import advise
from recipes_lib.planning.cards import cards_here, cpu_card
from recipes_lib.planning.lengths import Lengths
from recipes_lib.planning.memory import CONTEXT_GIB
from recipes_lib.planning.plan import Plan, plan_launched
from recipes_lib.planning.text import gain, refusal_lines

if TYPE_CHECKING:
    from recipes_lib.data.prepare import PreparedData


def plan_for_here(recipe: Recipe, launch: Launch) -> Plan | None:
    """Return the plan for this machine under a launch, or None where none can be made."""
    cards = () if launch.config.use_cpu else cards_here()[: launch.per_machine]
    try:
        return plan_launched(
            recipe, launch, min(cards, key=lambda card: card.memory_gib) if cards else cpu_card()
        )
    except (RecipesError, OSError):
        return None


class Planned(TypedDict, total=False):
    """What run.json keeps of a plan, named as what is measured is, or the error alone."""

    card: str
    basis: str
    peak_memory_gib: float
    needed_gib: float
    seconds: float
    total_s: float
    tokens_per_second: float
    fits: bool | None
    tokens_per_pass: int | None
    error: str


def plan_of_active(
    recipe: Recipe, active: Active, data: PreparedData, free_gib: float | None
) -> Planned:
    """Return the plan of a training that is about to start, from its launch as it really is and its
    real rows; the lengths of the first 20,000 speak for all.

    Args:
        free_gib: memory of the fullest GPU that this training may still take; None on a CPU.
    """
    on_cpu = active.device.startswith("cpu")
    machine = int(os.environ.get("LOCAL_WORLD_SIZE", active.world_size))
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    config = AccelerateConfig(
        Path(recipe.launch.accelerate),
        active.distributed_type,
        active.world_size,
        use_cpu=on_cpu,
        fsdp={
            "fsdp_reshard_after_forward": reshard,
            READS_ONCE_KEY: reads_once_is_asked(os.environ),
        },
    )
    launch = Launch(config, per_machine=machine, machines=max(1, active.world_size // machine))
    cards = () if on_cpu else cards_here()
    card = cards[0] if cards else cpu_card()
    if cards and free_gib is not None:
        card = replace(card, memory_gib=min(card.memory_gib, free_gib + CONTEXT_GIB))
    tokens = tuple(len(ids) for ids in data.train[:20_000]["input_ids"])
    validation = len(data.validation) if data.validation is not None else 0
    lengths = Lengths(tokens, len(data.train), validation, "the rows themselves", counted=True)
    try:
        plan = plan_launched(recipe, launch, card, lengths)
        memory, duration = plan.memory, plan.duration
        speed = duration.tokens_per_second * plan.settings.world_size
        return {  # named as what is measured is; on a CPU that is resident memory with libraries
            "card": plan.card.name,
            "basis": plan.basis,
            "peak_memory_gib": round(memory.needed if on_cpu else memory.peak, 2),
            "needed_gib": round(memory.needed, 2),
            "seconds": round(duration.training + duration.validation, 1),
            "total_s": round(duration.total, 1),
            "tokens_per_second": round(speed, 1),
            "fits": plan.certain,
            "tokens_per_pass": plan.tokens_per_pass,
        }
    except Exception as error:  # a plan is a note beside the run; the training goes on
        said = str(error).splitlines() or [""]
        return {"error": f"{type(error).__name__}: {said[0]}"}


def refuse_what_cannot_fit(plan: Plan) -> str | None:
    """Stop a training whose plan does not fit the card that is there; return a warning where it is
    tight. Without a GPU the model's own tensors alone must exceed what is free.

    Raises:
        EnvironmentFault: it does not, with the arithmetic and what would.
    """
    if plan.fits:
        return None
    there = plan.card.memory_gib
    if plan.certain is None:
        return (
            f"warning: by an estimate this needs {plan.needed:.1f} GiB; there are {there:.1f} GiB"
        )
    if plan.settings.device == "cpu" and plan.memory.peak * plan.sharing <= there:
        return (
            f"warning: the plan needs about {plan.needed:.1f} GiB, and {there:.1f} are free now"
            " (recipes plan says what saves some)"
        )
    what, largest = refusal_lines(plan)
    hints = [f"{item.setting}   ({gain(item)})" for item in advise(plan)[:3]]
    key = "train.per_device_train_batch_size"
    raise plan.recipe.fault(key, what, largest, *hints, "or insist with --no-plan")
