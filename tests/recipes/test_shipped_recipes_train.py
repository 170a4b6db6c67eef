"""Every recipe in the repository trains two steps on a tiny Llama with its own hyperparameters,
launched as its CPU twin.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.config.accelerate_config import load_accelerate_config
from recipes_lib.config.recipe import load_recipe

PROJECT = Path(__file__).resolve().parents[2]
RECIPES = sorted(
    path
    for path in (PROJECT / "recipes").glob("*/*.yaml")
    if not path.name.startswith("_") and path.parent.name not in {"studies", "published"}
)
ROWS = PROJECT / "recipes" / "quickstart" / "data" / "instructions.jsonl"
TIME_LIMIT_S = 200


def twin(name: str) -> str:
    """The config with which a machine without GPUs runs the same code."""
    kind = load_accelerate_config(name).distributed_type
    return {"NO": "cpu", "MULTI_GPU": "ddp_cpu", "FSDP": "fsdp_cpu"}[kind]


def shrunk(path: Path, model: Path) -> list[str]:
    """Overrides that shrink batch, length and steps, and take what only a GPU can do out of the
    way.
    """
    recipe = load_recipe(path)
    overrides = [
        f"model.name_or_path={model}",
        f"data.source={ROWS}",
        "data.max_examples=60",
        "run.name=shrunk",
    ]
    overrides += [
        "train.max_steps=2",
        "train.max_length=224",
        "train.per_device_train_batch_size=2",
        "train.logging_steps=1",
    ]
    overrides += ["train.save_steps=2", "train.eval_steps=2"]
    overrides += (
        ["run.global_batch_size=4"]
        if recipe.run.global_batch_size
        else ["train.gradient_accumulation_steps=1"]
    )
    if recipe.train.get("fp16"):
        overrides += [
            "train.fp16=false",
            "train.bf16=true",
            "model.dtype=bfloat16",
        ]  # fp16 does nothing on a CPU, so it is refused there
    return overrides


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_recipe_trains_two_steps(
    path: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    recipe, config = load_recipe(path), twin(load_recipe(path).launch.accelerate)
    overrides = shrunk(path, tiny_model_dir)
    if config == "cpu":
        from recipes_lib.train import main

        assert main([str(path), *overrides]) == 0
    else:
        launch_on_two_ranks(path, config, overrides)
    run = tmp_path / "runs" / "shrunk"
    state = json.loads((run / "run.json").read_text())
    check_launch(state["launch"], config)
    check_weights(run, state, recipe.lora, full=recipe.lora is None)
    losses = [
        json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [loss for loss in losses if loss is not None and math.isfinite(loss) and loss > 0]
    if recipe.quantization:
        assert state["summary"]["quantized_layers"] == 14


def launch_on_two_ranks(path: Path, config: str, overrides: list[str]) -> None:
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    file = str(PROJECT / "accelerate_configs" / f"{config}.yaml")
    command = [
        accelerate,
        "launch",
        "--config_file",
        file,
        "-m",
        "recipes_lib.train",
        str(path),
        *overrides,
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def check_launch(line: str, config: str) -> None:
    expected = {
        "cpu": "one process, world size 1",
        "ddp_cpu": "DDP, world size 2",
        "fsdp_cpu": "FSDP, world size 2",
    }
    assert line.startswith(expected[config])


def check_weights(
    run: Path, state: dict[str, Any], lora: dict[str, Any] | None, full: bool
) -> None:
    from safetensors import safe_open

    assert state["state"] == "finished" and state["weights_check"]["reload"]["agrees"]
    if full:
        assert (run / "model" / "model.safetensors").is_file()
        return
    assert lora is not None
    with safe_open(run / "adapter" / "adapter_model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names} == set(
        lora["target_modules"]
    )
    assert len(names) == 2 * 2 * len(lora["target_modules"])  # A and B in each of two layers
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == lora["r"]
