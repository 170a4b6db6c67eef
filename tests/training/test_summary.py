"""What a finished training says of itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes_lib.training.summary import beside_the_plan, summarise_training


def session(tmp_path: Path, checkpoint: Path | None) -> Any:
    return SimpleNamespace(
        run=SimpleNamespace(metrics=tmp_path / "metrics.jsonl"),
        trainer=SimpleNamespace(state=SimpleNamespace(global_step=6, best_global_step=None), _total_train_tokens=600),
        data=SimpleNamespace(train=[1, 2], validation=None),
        args=SimpleNamespace(load_best_model_at_end=False),
        active=SimpleNamespace(world_size=1, distributed_type="NO", device="cpu"),
        planned={"seconds": 60.0, "peak_memory_gib": 1.5},
        marker={"tokens": 300} if checkpoint else {},
        checkpoint=checkpoint,
        seconds=30.0,
        quantized_layers=0,
    )


@pytest.mark.parametrize(("checkpoint", "planned"), [(None, " (planned 60)"), (Path("checkpoint-3"), "")], ids=["whole", "resumed"])
def test_the_time_of_a_resumed_attempt_does_not_stand_beside_the_plan_of_the_whole(
    tmp_path: Path, checkpoint: Path | None, planned: str
) -> None:
    summary = summarise_training(session(tmp_path, checkpoint))
    said = beside_the_plan(summary)
    assert said.startswith(f"took 30 s{planned}, peak memory ") and said.endswith(" GiB (planned 1.5)")
    assert summary["planned_seconds"] == (None if checkpoint else 60.0)
