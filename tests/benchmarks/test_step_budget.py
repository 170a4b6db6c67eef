"""The budget of a training step on a GPU, held by a count that needs none: whoever makes a step
more expensive learns it here.

A limit is what was counted when it was written, and 1% more. The goals are at most 2,000
launches, 75 MB per token and no wait. All three are reached by fused adapters in compiled blocks:
benchmarks/README.md has the kernels of a block.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from benchmarks.step_budget import RECIPE, STAGES, Costs, micro_batch_costs

from recipes_lib.config.recipe import load_recipe
from recipes_lib.planning.plan import plan_recipe
from recipes_lib.planning.step_costs import step_costs
from recipes_lib.training.trainer import RecipeTrainer

#: stage -> launches, MB per token (at 4,090 tokens), waits; Llama-2-7B, LoRA of rank 32, dropout
LIMITS = {
    "padded": (8_013, 171.5, 2),
    "varlen": (8_026, 171.1, 0),
    "compiled": (3_404, 64.3, 0),
    "fused": (4_164, 97.3, 0),
    "fused, compiled": (1_707, 50.9, 0),
}


QLORA, FULL = "llama2-7b-dolly/qlora-r32", "llama2-7b-dolly/full-bf16"
_counted = cache(micro_batch_costs)


def counted(name: str, words: tuple[str, ...]) -> Costs:
    return _counted(words, name=name)


def test_every_stage_has_a_limit() -> None:
    assert LIMITS.keys() == STAGES.keys()


def of_stages() -> list[Any]:
    """All of them; of the two that are compiled, which takes seconds, one is slow."""
    slow = {"compiled": pytest.mark.slow}
    return [pytest.param(stage, marks=slow.get(stage, ())) for stage in STAGES]


@pytest.mark.parametrize("stage", of_stages())
def test_a_micro_batch_costs_no_more_than_its_budget(stage: str) -> None:
    costs, (launches, megabytes, waits) = counted(RECIPE, STAGES[stage]), LIMITS[stage]
    assert costs.launches <= launches, costs.operators
    assert costs.bytes_per_token / 1e6 <= megabytes, costs.operators
    assert len(costs.waits) <= waits, costs.waits
    assert costs.logits == 0, "logits of whole rows in float32"


@pytest.mark.parametrize("stage", of_stages())
def test_a_plan_counts_the_costs_of_every_stage(stage: str) -> None:
    test_a_plan_takes_its_times_from_what_the_trace_counts(RECIPE, STAGES[stage])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (RECIPE, ("train.activation_checkpointing=true",)),
        (RECIPE, (*STAGES["fused"], "train.activation_checkpointing=true")),
        (
            RECIPE,
            (
                "model.name_or_path=mistralai/Mistral-7B-v0.3",
                "lora={r: 8, lora_dropout: 0, target_modules: [q_proj, v_proj]}",
            ),
        ),
        (QLORA, ()),
        (QLORA, STAGES["fused"]),
        (FULL, ("train.activation_checkpointing=false",)),
    ],
)
def test_a_plan_takes_its_times_from_what_the_trace_counts(
    name: str, words: tuple[str, ...]
) -> None:
    costs = counted(name, words)
    settings = plan_recipe(load_recipe(name, words), gpu="h100").settings
    planned = step_costs(settings)
    # what makes half precision of 4 bits is bitsandbytes', and not in the trace
    unpacking = 6 * 7 * 32 if settings.bits else 0
    assert planned.kernels - unpacking == pytest.approx(costs.launches, rel=0.035)
    streamed = planned.per_token * costs.tokens + planned.constant
    assert streamed == pytest.approx(costs.bytes - costs.products, rel=0.02)


def test_fused_adapters_in_compiled_blocks_reach_the_goals() -> None:
    costs = counted(RECIPE, STAGES["fused, compiled"])
    assert costs.launches <= 2_000 and costs.bytes_per_token <= 75e6 and not costs.waits


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
