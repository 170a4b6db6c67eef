"""A plan as plain JSON values: `recipes plan --json`, described by schema/plan.schema.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from recipes_lib.planning.activations import activations_of, reference_per_token
from recipes_lib.planning.advice import MethodRow, advise, method_rows
from recipes_lib.planning.duration import operations_per_token
from recipes_lib.planning.memory import MIB, host_gib
from recipes_lib.planning.plan import Plan


def plan_json(plan: Plan, *, methods: bool = True) -> dict[str, object]:
    """Return memory, time, steps and advice, and other methods beside it if asked."""
    rows = [_method(row) for row in method_rows(plan)] if methods else []
    return _rounded(
        {
            "model": _model(plan),
            "memory": {**_memory(plan), "methods": rows},
            "time": _time(plan),
            "steps": _steps(plan),
            "advice": [asdict(item) for item in advise(plan)],
        }
    )


def _model(plan: Plan) -> dict[str, object]:
    shape = plan.settings.shape
    return {
        "name": shape.name,
        "family": shape.family,
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "trained_parameters": plan.settings.trained_parameters,
        "numbers": shape.source,
    }


def _memory(plan: Plan) -> dict[str, object]:
    settings, here = plan.settings, activations_of(plan.settings)
    on_cpu = settings.device == "cpu"
    per_token = here.per_token if on_cpu else reference_per_token(settings)
    parts = {**asdict(plan.memory), "peak": plan.memory.peak, "needed": plan.memory.needed}
    parts["least"] = plan.least
    return {
        **{f"{name}_gib": gib for name, gib in parts.items()},
        "activation_mb_per_token": per_token / MIB,
        "activation_mb_per_token_on_card": here.per_token / MIB,
        "activation_mb_per_token_checkpointed": here.checkpointed / MIB,
        "host_gib": None if on_cpu else host_gib(settings),
        "card": plan.card.name,
        "card_gib": plan.card.memory_gib,
        "card_stands_in": plan.card.stands_in,
        "processes_on_card": plan.sharing,
        "fits": plan.certain,
        "uncounted": list(plan.uncounted),
        "micro_batch_tokens": plan.batches.largest,
        "max_tokens_per_micro_batch": plan.largest(),
        "max_tokens_with_checkpointing": plan.largest(checkpointing=True),
        "max_tokens_without_checkpointing": plan.largest(checkpointing=False),
    }


def _time(plan: Plan) -> dict[str, object]:
    duration = plan.duration
    return {
        "card": plan.card.name,
        "basis": plan.basis,
        "processes": plan.settings.world_size,
        "operations_per_token": operations_per_token(plan.settings),
        "mfu": duration.mfu,
        "tokens_per_second_per_process": duration.tokens_per_second,
        "training_s": duration.training,
        "validation_s": duration.validation,
        "start_and_end_s": duration.around,
        "train_total_s": duration.total,
        "walltime_s": plan.walltime,
        "evaluation_s": plan.evaluation,
        "evaluations": [
            {
                "name": item.name,
                "answering_s": item.answering,
                "judging_s": item.judging,
                "not_estimated": list(item.unknown),
            }
            for item in plan.evals
        ],
        "total_s": duration.total + plan.evaluation,
        "gpu_hours": plan.card_hours,
        "price_per_gpu_hour": plan.price,
        "cost": None if plan.price is None else plan.price * plan.card_hours,
    }


def _steps(plan: Plan) -> dict[str, object]:
    batches, lengths = plan.batches, plan.lengths
    return {
        "steps": batches.steps,
        "steps_per_epoch": batches.steps_per_epoch,
        "epochs": batches.epochs,
        "examples_per_step": batches.examples_per_step,
        "per_device": plan.settings.per_device,
        "accumulation": plan.accumulation,
        "processes": plan.settings.world_size,
        "training_rows": lengths.train,
        "validation_rows": lengths.validation,
        "tokens": batches.tokens * batches.steps,
        "computed_tokens": batches.computed * batches.steps,
        "padding_factor": batches.padding,
        "lengths": lengths.source,
        "lengths_counted": lengths.counted,
    }


def _method(row: MethodRow) -> dict[str, object]:
    """Return one line of the table of methods, with nulls where there is no plan."""
    plan = row.plan
    return {
        "method": row.method,
        "processes": row.processes,
        "strategy": row.strategy,
        "this_recipe": row.is_the_recipe,
        "needed_gib": plan and plan.least,
        "fits": plan and plan.certain,
        "max_tokens_per_micro_batch": plan and plan.largest(),
        "train_total_s": plan and plan.duration.total,
    }


def _rounded(value: Any) -> Any:
    """Return the values with numbers to four places, which is more than a plan knows."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
