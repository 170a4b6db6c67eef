"""Whether a training may start: the plan against the card that is really there. Says no only where the numbers say so.

A plan that cannot be made (a model nobody knows here, an odd architecture) stops nobody.
"""

from __future__ import annotations

from typing import Any

from recipes_lib.errors import EnvironmentFault, RecipesError
from recipes_lib.planning.advice import advise
from recipes_lib.planning.cards import cards_here
from recipes_lib.planning.machine import cpu_card
from recipes_lib.planning.plan import Plan, plan_launched
from recipes_lib.planning.text import clock, refusal
from recipes_lib.recipe.launch import Launch
from recipes_lib.recipe.recipe import Recipe


def plan_for_here(recipe: Recipe, launch: Launch) -> Plan | None:
    """Return the plan for this machine under a launch, or None where none can be made."""
    cards = () if launch.config.use_cpu else cards_here()
    try:
        return plan_launched(recipe, launch, min(cards, key=lambda card: card.memory_gib) if cards else cpu_card())
    except (RecipesError, OSError):
        return None


def refuse_what_cannot_fit(plan: Plan) -> None:
    """Stop a training whose plan does not fit the card that is there.

    Raises:
        EnvironmentFault: it does not; with the arithmetic, what would make it fit, and how to insist.
    """
    if plan.fits:
        return
    what, largest = refusal(plan)
    hints = [f"{item.setting}   ({'costs' if item.saves_s < 0 else 'saves'} {clock(abs(item.saves_s))})" for item in advise(plan)[:3]]
    origin = plan.recipe.origin_of("train.per_device_train_batch_size")
    raise EnvironmentFault(what, largest, *hints, "or insist with --no-plan", file=origin.file, line=origin.line)


def planned_facts(plan: Plan) -> dict[str, Any]:
    """Return what run.json keeps of the plan, to stand beside what is measured."""
    return {
        "card": plan.card.name,
        "basis": plan.card.basis,
        "peak_gib": round(plan.memory.peak, 2),
        "needed_gib": round(plan.memory.needed, 2),
        "training_s": round(plan.duration.training + plan.duration.validation, 1),
        "total_s": round(plan.duration.total, 1),
        "tokens_per_second": round(plan.duration.tokens_per_second * plan.settings.world_size, 1),
        "fits": plan.fits,
    }
