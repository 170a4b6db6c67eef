"""What the launcher asked for against what is really running; several ways to launch silently do
something else.

`recipes train` and a cluster job say what they start in RECIPES_EXPECT; of other launchers the
variables tell that they hand to each process.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import psutil

from recipes_lib.config.launch import Active, load_accelerate_config, precision_conflict
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
    sharded = asks_for_fsdp() and active.world_size > 1
    return replace(active, distributed_type="FSDP") if sharded else active


def asks_for_fsdp() -> bool:
    """Whether the launcher asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in YES


def check_processes(num_gpus: int, environment: Mapping[str, str] = os.environ) -> None:
    """Check that the launcher started the processes that it was asked for, each with a GPU of its
    own where it means GPUs.

    Args:
        num_gpus: how many this process can see.

    Raises:
        RecipeError: it starts one process where several were asked for, as `--cpu --num_processes
            2` and MULTI_CPU do, or more processes than there are GPUs.
    """
    asked = 1 if "LOCAL_WORLD_SIZE" in environment else asked_of_launcher(_parent_command())
    if asked > 1:
        raise RecipeError(
            f"{asked} processes were asked for, but accelerate launch started one", DDP_ON_CPU
        )
    processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    on_cpu = environment.get("ACCELERATE_USE_CPU", "false").lower() in YES
    if 0 < num_gpus < processes and not on_cpu:
        raise RecipeError(
            f"{processes} processes on this machine, but each of them sees {num_gpus} GPU(s)",
            f"start {num_gpus}: --gpus with recipes train, --num_processes with accelerate launch",
            "of several MIG slices CUDA shows a process one only",
        )


def asked_of_launcher(command: Sequence[str]) -> int:
    """Return how many processes an `accelerate launch` command line asks for; 1 for any other.

    Example:
        >>> asked_of_launcher(["accelerate", "launch", "--cpu", "--num_processes=2", "-m", "x"])
        2
    """
    flags: dict[str, str] = {}
    if not re.search(r"(^|[ ./])launch ", " ".join(command)):
        return 1
    words = [part for word in command for part in word.split("=", 1)]
    for flag, value in itertools.pairwise(words):
        flags.setdefault(flag.lstrip("-"), value)
    if "num_processes" in flags:
        return int(flags["num_processes"])
    file = flags.get("config_file")
    return load_accelerate_config(file).num_processes if file else 1


def _parent_command() -> list[str]:
    try:
        return psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return []


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
    asked, running = expected.get("world_size", active.world_size), active.world_size
    kind, sharded = expected.get("distributed_type"), active.distributed_type == "FSDP"
    refused: list[str] = []
    if asked != running:
        refused = [f"{asked} processes were asked for, but {running} is training", DDP_ON_CPU]
    elif world_size() != running:
        what = f"the launcher started {world_size()} processes, but each of them would train alone"
        refused = [what, "set ACCELERATE_USE_CPU=true, or use accelerate_configs/ddp_cpu.yaml"]
    elif asks_for_fsdp() and not sharded and running > 1:
        what = f"FSDP was asked for, but {active.distributed_type} is active"
        refused = [what, f"set fsdp_version: 2 in the accelerate config; {DDP_ON_CPU}"]
    elif sharded and kind in ("MULTI_GPU", "NO"):
        refused = [f"{kind} was asked for, but FSDP is active", "unset ACCELERATE_USE_FSDP"]
    if refused:
        raise RecipeError(*refused)
    return f"{active.distributed_type}, world size {active.world_size}, {active.device}"
