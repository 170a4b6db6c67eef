"""A plan as plain JSON values: `recipes plan --json`, described by schema/plan.schema.json. Sizes
in GiB, times in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from recipes_lib.planning.activations import activations_of, reference_per_token
from recipes_lib.planning.advice import Advice
from recipes_lib.planning.duration import operations_per_token
from recipes_lib.planning.evaluations import EvalTime
from recipes_lib.planning.memory import MIB
from recipes_lib.planning.methods import MethodRow
from recipes_lib.planning.plan import Plan


def plan_json(
    plan: Plan,
    evals: Sequence[EvalTime],
    rows: Sequence[MethodRow],
    advice: Sequence[Advice],
    price: float | None,
) -> dict[str, Any]:
    """Return memory, time, steps and advice.

    Args:
        price: of one card for one hour, in any currency; None for no cost.
    """
    return {
        "memory": {**memory_json(plan), "methods": [_method(row) for row in rows]},
        "time": time_json(plan, evals, price),
        "steps": steps_json(plan),
        "advice": [_rounded(asdict(item)) for item in advice],
    }


def memory_json(plan: Plan) -> dict[str, Any]:
    """Return the memory of one process at its worst moment."""
    memory, settings = plan.memory, plan.settings
    here = activations_of(settings)
    return _rounded(
        {
            "weights_gib": memory.weights,
            "adapter_gib": memory.adapter,
            "gradients_gib": memory.gradients,
            "optimizer_gib": memory.optimizer,
            "gathered_gib": memory.gathered,
            "activation_mb_per_token": (
                here.per_token if settings.device == "cpu" else reference_per_token(settings)
            )
            / MIB,
            "activation_mb_per_token_on_card": here.per_token / MIB,
            "activation_mb_per_token_checkpointed": here.checkpointed / MIB,
            "activations_gib": memory.activations,
            "moment_gib": memory.moment,
            "validation_gib": memory.validation,
            "peak_gib": memory.peak,
            "outside_gib": memory.outside,
            "needed_gib": memory.needed,
            "card": plan.card.name,
            "card_gib": plan.card.memory_gib,
            "card_stands_in": plan.card.stands_in,
            "processes_on_card": plan.sharing,
            "fits": fits_json(plan),
            "uncounted": list(plan.uncounted),
            "micro_batch_tokens": plan.batches.largest,
            "max_tokens_per_micro_batch": plan.largest(),
            "max_tokens_with_checkpointing": plan.largest(checkpointing=True),
            "max_tokens_without_checkpointing": plan.largest(checkpointing=False),
        }
    )


def fits_json(plan: Plan) -> bool | None:
    """Return whether a plan fits; None where something is not counted."""
    return {"yes": True, "no": False}.get(plan.verdict)


def time_json(plan: Plan, evals: Sequence[EvalTime], price: float | None) -> dict[str, Any]:
    """Return seconds, card hours and cost."""
    duration = plan.duration
    evaluation = sum(item.total for item in evals)
    hours = plan.gpu_hours + evaluation / 3600
    return _rounded(
        {
            "card": plan.card.name,
            "basis": plan.card.basis,
            "processes": plan.settings.world_size,
            "operations_per_token": operations_per_token(plan.settings),
            "mfu": duration.mfu,
            "tokens_per_second_per_process": duration.tokens_per_second,
            "training_s": duration.training,
            "validation_s": duration.validation,
            "start_and_end_s": duration.around,
            "train_total_s": duration.total,
            "walltime_s": plan.walltime,
            "evaluation_s": evaluation,
            "evaluations": [
                {
                    "name": item.name,
                    "answering_s": item.answering,
                    "judging_s": item.judging,
                    "not_estimated": list(item.unknown),
                }
                for item in evals
            ],
            "total_s": duration.total + evaluation,
            "gpu_hours": hours,
            "price_per_gpu_hour": price,
            "cost": None if price is None else price * hours,
        }
    )


def steps_json(plan: Plan) -> dict[str, Any]:
    """Return steps, batches and what padding costs."""
    batches, lengths = plan.batches, plan.lengths
    return _rounded(
        {
            "steps": batches.steps,
            "steps_per_epoch": batches.steps_per_epoch,
            "epochs": batches.epochs,
            "examples_per_step": batches.examples_per_step,
            "per_device": plan.settings.per_device,
            "accumulation": batches.accumulation,
            "processes": plan.settings.world_size,
            "training_rows": lengths.train,
            "validation_rows": lengths.validation,
            "tokens": batches.tokens * batches.steps,
            "computed_tokens": batches.computed * batches.steps,
            "padding_factor": batches.padding,
            "lengths": lengths.source,
            "lengths_counted": lengths.counted,
        }
    )


def _method(row: MethodRow) -> dict[str, Any]:
    """Return one line of the table of methods; null where the examples per step cannot be
    divided.
    """
    plan = row.plan
    return _rounded(
        {
            "method": row.method,
            "processes": row.processes,
            "strategy": row.strategy,
            "this_recipe": row.is_the_recipe,
            "needed_gib": plan and plan.memory.needed,
            "fits": plan and fits_json(plan),
            "max_tokens_per_micro_batch": plan and plan.largest(),
            "train_total_s": plan and plan.duration.total,
        }
    )


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with numbers to four significant places after the point, which is more than
    a plan knows.
    """
    rounded: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            rounded[key] = [_rounded(item) if isinstance(item, dict) else item for item in value]
        else:
            rounded[key] = round(value, 4) if isinstance(value, float) else value
    return rounded
