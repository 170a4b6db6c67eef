"""The numbers of a finished training, as run.json, the model card and the results tables
show them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.training.metrics import first_and_last, peak_memory_gib
from recipes_lib.training.start_up import count_quantized

if TYPE_CHECKING:
    from recipes_lib.config.launch import Active
    from recipes_lib.data.preparation import PreparedData
    from recipes_lib.training.attempt import Resumption
    from recipes_lib.training.trainer import RecipeTrainer


def summarise_training(
    trainer: RecipeTrainer,
    data: PreparedData,
    metrics: Path,
    active: Active,
    resumption: Resumption | None,
    planned: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Return rows, steps, losses, time and memory of the attempt that reached the end; None where
    not measured.

    Times are this attempt's: after a resume they leave out the earlier attempts, `resumed` in
    run.json says so, and the planned time, which is that of the whole training, is not put beside
    them.
    """
    training, validation = first_and_last(metrics, "loss"), first_and_last(metrics, "eval_loss")
    state, tokens = trainer.state, int(trainer._total_train_tokens)
    begun = resumption.marker.get("tokens", 0) if resumption else 0
    return {
        "steps": state.global_step,
        **({"best_step": state.best_global_step} if trainer.args.load_best_model_at_end else {}),
        "training_rows": len(data.train),
        "validation_rows": len(data.validation) if data.validation is not None else 0,
        "first_training_loss": training[0],
        "last_training_loss": training[1],
        "first_validation_loss": validation[0],
        "last_validation_loss": validation[1],
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round((tokens - begun) / seconds, 1) if seconds else None,
        "quantized_layers": count_quantized(trainer.model),
        "peak_memory_gib": round(peak_memory_gib(), 2),
        "planned_seconds": planned.get("seconds") if resumption is None else None,
        "planned_peak_memory_gib": planned.get("peak_memory_gib"),
        "world_size": active.world_size,
        "distribution": active.distributed_type,
        "reproducible": (
            "exact on the same versions"
            if active.device.startswith("cpu")
            else "same hardware, within rounding"
        ),
    }


def beside_the_plan(summary: dict[str, Any]) -> str:
    """Return time and peak memory as measured, and as planned where there was a plan.

    Example:
        >>> beside_the_plan({"seconds": 51.3, "peak_memory_gib": 1.88, "planned_seconds": 47.9, "planned_peak_memory_gib": 2.07})
        'took 51 s (planned 48), peak memory 1.9 GiB (planned 2.1)'
    """  # noqa: E501
    seconds, peak = summary["planned_seconds"], summary["planned_peak_memory_gib"]
    time_planned = "" if seconds is None else f" (planned {seconds:,.0f})"
    peak_planned = "" if peak is None else f" (planned {peak:.1f})"
    return (
        f"took {summary['seconds']:,.0f} s{time_planned}, peak memory"
        f" {summary['peak_memory_gib']:.1f} GiB{peak_planned}"
    )
