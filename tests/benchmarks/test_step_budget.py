"""The budget of a training step on a GPU, held by a count that needs none: whoever makes a step
more expensive learns it here.

A limit is what was counted when it was written, and 1% more. Issue 16 wants at most 2,000 launches,
75 MB per token and no wait: a stage that gets there has these as its limits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.step_budget import STAGES, micro_batch_costs

from recipes_lib.training.trainer import RecipeTrainer

#: stage -> launches, MB per token (at 4,090 tokens), waits; Llama-2-7B, LoRA of rank 32, dropout
LIMITS = {
    "padded": (8_013, 171.5, 2),
    "varlen": (8_253, 173.2, 0),
    "compiled": (3_599, 67.8, 0),
}


def test_every_stage_has_a_limit() -> None:
    assert LIMITS.keys() == STAGES.keys()


@pytest.mark.parametrize("stage", LIMITS)
def test_a_micro_batch_costs_no_more_than_its_budget(stage: str) -> None:
    costs, (launches, megabytes, waits) = micro_batch_costs(STAGES[stage]), LIMITS[stage]
    assert costs.launches <= launches, costs.operators
    assert costs.bytes_per_token / 1e6 <= megabytes, costs.operators
    assert len(costs.waits) <= waits, costs.waits
    assert costs.logits == 0, "logits of whole rows in float32"


def test_a_costly_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RecipeTrainer.compute_loss

    def costly(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if int(inputs["labels"].max()) > 0:  # waits for the GPU
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
            return torch.log_softmax(logits.float(), -1).sum()
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RecipeTrainer, "compute_loss", costly)
    costs = micro_batch_costs((), lengths=(30, 20))
    assert any("test_step_budget.py" in place for place in costs.waits), costs.waits
    assert costs.logits == costs.tokens == 50
