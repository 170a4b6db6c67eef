"""What a finished training says of itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes_lib.config.launch import Active
from recipes_lib.training.attempt import Resumption
from recipes_lib.training.finish import beside_the_plan, summarise_training


@pytest.mark.parametrize(
    ("checkpoint", "planned"),
    [(None, " (planned 60)"), (Path("checkpoint-3"), "")],
    ids=["whole", "resumed"],
)
def test_the_time_of_a_resumed_attempt_does_not_stand_beside_the_plan_of_the_whole(
    tmp_path: Path, checkpoint: Path | None, planned: str
) -> None:
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(global_step=6, best_global_step=None),
        args=SimpleNamespace(load_best_model_at_end=False),
        model=torch.nn.Linear(2, 2),
        _total_train_tokens=600,
    )
    data: Any = SimpleNamespace(train=[1, 2], validation=None)
    resumption = Resumption(checkpoint, {"tokens": 300}, {}) if checkpoint else None
    plan = {"seconds": 60.0, "peak_memory_gib": 1.5}
    summary = summarise_training(
        trainer,
        data,
        tmp_path / "metrics.jsonl",
        Active(1, "one process", "cpu"),
        resumption,
        plan,
        30.0,
    )
    said = beside_the_plan(summary)
    assert said.startswith(f"took 30 s{planned}, peak memory ") and said.endswith(
        " GiB (planned 1.5)"
    )
    assert summary["tokens_per_second"] == (10.0 if checkpoint else 20.0)
    assert summary["planned_seconds"] == (None if checkpoint else 60.0)
