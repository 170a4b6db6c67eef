"""Loss trajectories committed with the environment they were measured in; a change of the
mathematics shows here first.

To record them again after an intended change: python -m tests.invariants.test_golden
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from tests.conftest import NF4

GOLDEN = Path(__file__).with_name("golden") / "loss_trajectories.json"
WAYS = {
    "lora-fp32": [],
    "lora-bf16": ["train.bf16=true"],
    "qlora-nf4": [NF4, "train.bf16=true"],
    "full-fp32": ["lora=null", "train.learning_rate=1e-3"],
    "lora-packed": ["train.packing=true"],
    "lora-whole-text": ["train.completion_only_loss=false"],
}
# Other processors order float32 sums, and round bf16, differently.
TOLERANCE = {"lora-bf16": 5e-3, "qlora-nf4": 5e-3}


def trajectory(recipe: Path, name: str, *overrides: str) -> list[float]:
    """Train and return the losses by step."""
    from recipes_lib.train import main

    assert main([str(recipe), f"run.name={name}", *WAYS[name], *overrides]) == 0
    lines = (recipe.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


@pytest.mark.parametrize("name", WAYS)
def test_the_losses_are_those_of_the_recorded_run(tiny_recipe, name) -> None:
    golden = json.loads(GOLDEN.read_text())
    measured = trajectory(tiny_recipe, name)
    assert measured == pytest.approx(golden["losses"][name], rel=TOLERANCE.get(name, 1e-4)), (
        f"recorded with {golden['environment']}"
    )


def record() -> None:
    from tests.conftest import PROJECT, TINY_RECIPE, build_tiny_model

    from recipes_lib.core.environment import describe_devices, library_versions

    with tempfile.TemporaryDirectory() as folder:
        os.environ["RECIPES_RUNS_ROOT"] = f"{folder}/runs"
        build_tiny_model(Path(folder) / "model")
        recipe = Path(folder) / "tiny.yaml"
        rows = PROJECT / "recipes/quickstart/data/instructions.jsonl"
        recipe.write_text(TINY_RECIPE.format(model=f"{folder}/model", rows=rows))
        losses = {name: trajectory(recipe, name) for name in WAYS}
    environment = {**library_versions(), "devices": describe_devices()}
    GOLDEN.write_text(json.dumps({"environment": environment, "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    record()
