"""What the launcher asked for, by the variables that it hands to each process, against what is
really running; several ways to launch silently do something else.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import psutil

from recipes_lib.config.launch import Active, load_accelerate_config, precision_conflict
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.ranks import world_size

DDP_ON_CPU = "on a machine without GPUs use accelerate_configs/ddp_cpu.yaml or fsdp_cpu.yaml"


def _asks_for(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def leave_gpus_out() -> None:
    """Hide the GPUs from a launch for the CPU; call it before torch is imported."""
    if _asks_for("ACCELERATE_USE_CPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def what_runs(state: Any = None) -> Active:
    """Return the processes that have met, in our words: one process, DDP, FSDP.

    Args:
        state: an Accelerator. Before there is one, FSDP is the launcher's word: accelerate's own
            state has it only with the trainer.
    """
    from accelerate import PartialState

    known = state or PartialState()
    kind = str(getattr(known.distributed_type, "value", known.distributed_type))
    if state is None and known.num_processes > 1 and _asks_for("ACCELERATE_USE_FSDP"):
        kind = "FSDP"
    words = {"MULTI_GPU": "DDP", "MULTI_CPU": "DDP", "NO": "one process"}
    return Active(known.num_processes, words.get(kind, kind), str(known.device))


def check_processes(num_gpus: int) -> None:
    """Check that the launcher started the processes that it was asked for, each with a GPU of its
    own where it means GPUs.

    Args:
        num_gpus: how many this process can see.

    Raises:
        RecipeError: it starts one process where several were asked for, as `--cpu --num_processes
            2` and MULTI_CPU do, or more processes than there are GPUs.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if not processes and (asked := _asked_of_accelerate_launch()) > 1:
        what = f"{asked} processes were asked for, but accelerate launch started one"
        raise RecipeError(what, DDP_ON_CPU)
    if 0 < num_gpus < processes and not _asks_for("ACCELERATE_USE_CPU"):
        raise RecipeError(
            f"{processes} processes on this machine, but each of them sees {num_gpus} GPU(s)",
            f"start {num_gpus}: --gpus with recipes train, --num_processes with accelerate launch",
            "of several MIG slices CUDA shows a process one only",
        )


def _asked_of_accelerate_launch() -> int:
    """Return how many processes the command line that started this one asks for."""
    try:
        command = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return 1
    if not any(word.endswith("launch") for word in command):
        return 1
    flags = dict(itertools.pairwise(part for word in command for part in word.split("=", 1)))
    if "--num_processes" in flags:
        return int(flags["--num_processes"])
    file = flags.get("--config_file")
    return load_accelerate_config(file).num_processes if file else 1


def check_precision(recipe: Recipe) -> None:
    """Check that the launcher asks for no other mixed precision than the recipe: its word, which
    accelerate hands on in a variable, would win.

    Raises:
        RecipeError: it asks for another one.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if conflict := precision_conflict(recipe.train, asked, "the launcher"):
        raise recipe.error("train.bf16", *conflict)


def check_launch(active: Active) -> str:
    """Return the start-up line that states what is active, once it agrees with what was asked.

    Raises:
        RecipeError: another number of processes, or another distribution, than asked is running.
    """
    running, kind = active.world_size, active.distributed_type
    if world_size() != running:
        what = f"the launcher started {world_size()} processes, but each of them would train alone"
        remedy = "set ACCELERATE_USE_CPU=true, or use accelerate_configs/ddp_cpu.yaml"
        raise RecipeError(what, remedy)
    if _asks_for("ACCELERATE_USE_FSDP") and kind != "FSDP" and running > 1:
        what = f"FSDP was asked for, but {kind} is active"
        raise RecipeError(what, f"set fsdp_version: 2 in the accelerate config; {DDP_ON_CPU}")
    return f"{kind}, world size {running}, {active.device}"
