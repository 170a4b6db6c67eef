"""What the launcher asked for against what is really running; several ways to launch silently do
something else.

`recipes train` and a cluster job say what they start in RECIPES_EXPECT; of other launchers the
variables tell that they hand to each process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping
from typing import Any

from recipes_lib.config.launch import Active, precision_conflict
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.ranks import world_size

YES = ("1", "true", "yes")
DDP_ON_CPU = "on a machine without GPUs use accelerate_configs/ddp_cpu.yaml or fsdp_cpu.yaml"


def leave_gpus_out(environment: MutableMapping[str, str] = os.environ) -> None:
    """Hide the GPUs from a launch for the CPU; call it before torch is imported."""
    if environment.get("ACCELERATE_USE_CPU", "false").lower() in YES:
        environment["CUDA_VISIBLE_DEVICES"] = ""


def what_runs(state: Any) -> Active:
    """Name what an Accelerator, or accelerate's PartialState, reports in our words: one process,
    DDP, FSDP.
    """
    kind = str(getattr(state.distributed_type, "value", state.distributed_type))
    words = {"MULTI_GPU": "DDP", "MULTI_CPU": "DDP", "NO": "one process"}
    return Active(state.num_processes, words.get(kind, kind), str(state.device))


def what_will_run() -> Active:
    """Return what the processes that have met will do, by the launcher's word on FSDP: accelerate's
    state has it only with the trainer.
    """
    from accelerate import PartialState

    active = what_runs(PartialState())
    kind = "FSDP" if asks_for_fsdp() and active.world_size > 1 else active.distributed_type
    return Active(active.world_size, kind, active.device)


def asks_for_fsdp() -> bool:
    """Whether the launcher asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in YES


def check_gpus(num_gpus: int, environment: Mapping[str, str] = os.environ) -> None:
    """Check that each process of this machine has a GPU of its own, where the launcher means GPUs.

    Args:
        num_gpus: how many this process can see.

    Raises:
        RecipeError: there are more processes than GPUs.
    """
    processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    on_cpu = environment.get("ACCELERATE_USE_CPU", "false").lower() in YES
    if 0 < num_gpus < processes and not on_cpu:
        seen = f"{num_gpus} GPU{'s' * (num_gpus > 1)}"
        raise RecipeError(
            f"{processes} processes on this machine, but each of them sees {seen}; a process needs"
            " a GPU of its own",
            f"start {num_gpus}: --gpus {num_gpus} with recipes train, --num_processes with"
            " accelerate launch",
            "of several MIG slices CUDA shows a process one only",
        )


def check_precision(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> None:
    """Check that the launcher asks for no other mixed precision than the recipe: its word, which
    accelerate hands on in a variable, would win.

    Raises:
        RecipeError: it asks for another one.
    """
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if conflict := precision_conflict(recipe.train, asked, "the launcher"):
        raise recipe.error("train.bf16", *conflict)


def check_launch(active: Active, environment: Mapping[str, str] = os.environ) -> str:
    """Return the start-up line that states what is active, once it agrees with what was asked.

    Raises:
        RecipeError: another number of processes, or another distribution, than asked is running.
    """
    expected = json.loads(environment.get("RECIPES_EXPECT", "{}"))
    if expected and expected["world_size"] != active.world_size:
        raise RecipeError(
            f"{expected['world_size']} processes were asked for, but {active.world_size} is"
            " training",
            DDP_ON_CPU,
        )
    if world_size() != active.world_size:
        raise RecipeError(
            f"the launcher started {world_size()} processes, but each of them would train alone",
            "set ACCELERATE_USE_CPU=true, or use accelerate_configs/ddp_cpu.yaml",
        )
    sharded = active.distributed_type == "FSDP"
    if asks_for_fsdp() and not sharded and active.world_size > 1:
        raise RecipeError(
            f"FSDP was asked for, but {active.distributed_type} is active",
            f"set fsdp_version: 2 in the accelerate config; {DDP_ON_CPU}",
        )
    if expected.get("distributed_type") in ("MULTI_GPU", "NO") and sharded:
        raise RecipeError(
            f"{expected['distributed_type']} was asked for, but FSDP is active",
            "unset ACCELERATE_USE_FSDP",
        )
    return f"{active.distributed_type}, world size {active.world_size}, {active.device}"
