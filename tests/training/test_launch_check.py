"""What was asked of the launcher and what is running must be the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.training.launch_check import (
    Active,
    check_launch,
    check_precision,
    check_processes,
    leave_gpus_out,
    what_runs,
)

CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"


def expecting(world_size: int, kind: str) -> dict[str, str]:
    """The variables of a launch that says what it starts."""
    return {"RECIPES_EXPECT": json.dumps({"world_size": world_size, "distributed_type": kind})}


def test_one_process_where_two_were_asked_is_refused() -> None:
    with pytest.raises(RecipeError, match="2 processes were asked for, but 1 is") as caught:
        check_launch(Active(1, "one process", "cpu"), expecting(2, "MULTI_GPU"))
    assert "ddp_cpu.yaml" in str(caught.value)


def test_two_processes_that_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="each of them would train alone"):
        check_launch(Active(1, "one process", "cpu"), {})


def test_ddp_where_fsdp_was_asked_and_fsdp_where_ddp_was_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="MULTI_GPU was asked for, but FSDP is active"):
        check_launch(Active(2, "FSDP", "cpu"), expecting(2, "MULTI_GPU"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="FSDP was asked for, but DDP is active"):
        check_launch(Active(2, "DDP", "cpu"), expecting(2, "FSDP"))


def test_fsdp_of_one_process_is_one_process() -> None:
    line = check_launch(Active(1, "one process", "cpu"), expecting(1, "FSDP"))
    assert line == "one process, world size 1, cpu"


def test_a_launch_for_the_cpu_sees_no_gpu() -> None:
    for environment in (
        {"ACCELERATE_USE_CPU": "true"},
        {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": "0,1"},
    ):
        leave_gpus_out(environment)
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
    for environment in ({}, {"ACCELERATE_USE_CPU": "false"}):
        leave_gpus_out(environment)
        assert "CUDA_VISIBLE_DEVICES" not in environment


@pytest.mark.parametrize(("config", "said"), [("cpu", "true"), ("single_gpu", "None")])
def test_recipes_train_tells_its_one_process_whether_the_launch_is_for_the_cpu(
    config, said, tiny_recipe, monkeypatch
) -> None:
    """One process is started without accelerate launch, which says it to several."""
    from recipes_lib.commands.train import supervise
    from recipes_lib.config.launch import plan_launch

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    recipe = load_recipe(tiny_recipe)
    script = (
        f"import os, sys; sys.exit(3 if str(os.environ.get('ACCELERATE_USE_CPU')) == '{said}'"
        " else 4)"
    )
    assert (
        supervise(
            [sys.executable, "-c", script], recipe, plan_launch(recipe.launch, accelerate=config)
        )
        == 3
    )


def test_a_precision_of_the_launcher_that_the_recipe_does_not_have_is_refused(
    tiny_recipe: Path,
) -> None:
    none, bf16 = (load_recipe(tiny_recipe, [f"train.bf16={word}"]) for word in ("false", "true"))
    for asked, recipe in (("bf16", none), ("FP16", bf16), ("fp8", bf16), ("fp8", none)):
        with pytest.raises(RecipeError, match=f"launcher asks for mixed_precision {asked}"):
            check_precision(recipe, {"ACCELERATE_MIXED_PRECISION": asked})
    check_precision(bf16, {"ACCELERATE_MIXED_PRECISION": "bf16"})
    check_precision(bf16, {"ACCELERATE_MIXED_PRECISION": "no"})
    check_precision(none, {})


def test_accelerates_names_become_ours() -> None:
    assert (
        what_runs(
            SimpleNamespace(distributed_type="MULTI_CPU", num_processes=2, device="cpu")
        ).distributed_type
        == "DDP"
    )
    assert (
        what_runs(
            SimpleNamespace(distributed_type="FSDP", num_processes=2, device="cuda:0")
        ).distributed_type
        == "FSDP"
    )


def test_more_processes_than_gpus_are_refused_with_the_numbers() -> None:
    with pytest.raises(
        RecipeError, match="4 processes on this machine, but each of them sees 1 GPU"
    ) as caught:
        check_processes(1, {"LOCAL_WORLD_SIZE": "4"})
    assert "--gpus" in str(caught.value) and "MIG" in str(caught.value)
    check_processes(4, {"LOCAL_WORLD_SIZE": "4"})
    check_processes(0, {"LOCAL_WORLD_SIZE": "2"})
    check_processes(1, {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "True"})
    check_processes(1, {})


def test_accelerate_launch_that_starts_one_process_of_two_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    multi_cpu = tmp_path / "multi.yaml"
    multi_cpu.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    asked = {
        "2 processes were asked for": ["--cpu", "--num_processes", "2", "-m", "recipes_lib.train"],
        "MULTI_CPU": ["--config_file", str(multi_cpu), "-m", "recipes_lib.train"],
    }
    for said, words in asked.items():
        command = ["python", "/bin/accelerate", "launch", *words]
        monkeypatch.setattr(psutil.Process, "cmdline", lambda self, command=command: command)
        with pytest.raises(RecipeError, match=said):
            check_processes(0, {})
        check_processes(0, {"LOCAL_WORLD_SIZE": "2"})
