"""Numbers that were chosen for being good: the best of many arms, and the best of many
checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from recipes_lib.compare.findings import Finding
from recipes_lib.compare.validity.settings import arm_values

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import Measurements

MANY = 3


def check_selection(study: Study | None, measurements: Measurements) -> Iterator[Finding]:
    """Yield the best-of-many arms, and arms whose checkpoint was chosen by its validation loss."""
    trained = [
        name
        for name, arm in measurements.arms.items()
        if arm.runs and not arm.is_base and name != "base"
    ]
    if len(trained) >= MANY and (study is None or len(study.factors) < 2):
        title = f"The best of {len(trained)} arms is flattered by having been chosen"
        evidence = (
            f"arms: {', '.join(trained)}",
            "Holm's correction keeps the tests honest, not the size of the lead",
        )
        remedy = (
            "name the winner, and measure it again on other questions or with other seeds before"
            " its lead is quoted"
        )
        yield Finding("best-of-many", "warning", title, evidence, remedy)
    for name, values in arm_values(study, measurements).items():
        if not values.get("train.load_best_model_at_end") or name not in measurements.arms:
            continue
        counts = {
            sum(line.get("eval_loss") is not None for line in run.curves)
            for run in measurements.arms[name].runs
        }
        if counts and max(counts) > 1:
            title = f"{name} kept the best of {max(counts)} checkpoints by its validation loss"
            told = (f"train.load_best_model_at_end, {max(counts)} evaluations in metrics.jsonl",)
            remedy = (
                "its lowest validation loss is flattered too: compare on data that chose nothing"
            )
            yield Finding(
                "best-checkpoint", "note", title, told, remedy, (name,), ("validation_loss",)
            )
