"""Loss trajectories committed with the environment they were measured in; a change of the
mathematics shows here first. After an intended change RECORD_GOLDEN=1 records them again.
"""

import json
import os
from pathlib import Path

import pytest
from tests.conftest import NF4

from recipes_lib.core.environment import describe_devices, library_versions
from recipes_lib.train import main

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


@pytest.mark.parametrize("name", WAYS)
def test_the_losses_are_those_of_the_recorded_run(tiny_recipe, name) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert main([str(tiny_recipe), f"run.name={name}", *WAYS[name]]) == 0
    lines = (tiny_recipe.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
    measured = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    if "RECORD_GOLDEN" in os.environ:
        golden["losses"][name] = measured
        golden["environment"] = {**library_versions(), "devices": describe_devices()}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    assert measured == pytest.approx(golden["losses"][name], rel=TOLERANCE.get(name, 1e-4)), (
        f"recorded with {golden['environment']}"
    )
