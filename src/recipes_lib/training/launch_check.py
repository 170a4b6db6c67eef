"""What was asked of the launcher against what is really running; several ways to launch silently do
something else.

What was asked is known from RECIPES_EXPECT (set by `recipes train`), else read from the command
line of the parent process (`accelerate launch`, `torchrun`). Where neither tells, the start-up line
says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.config.accelerate_config import load_accelerate_config, precision_conflict
from recipes_lib.config.launch import Active
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipeError

EXPECT_VARIABLE = "RECIPES_EXPECT"
PRECISION_VARIABLE = "ACCELERATE_MIXED_PRECISION"


@dataclass(frozen=True)
class Asked:
    """What the launcher was asked for; None where that cannot be known."""

    world_size: int | None = None
    distributed_type: str | None = None
    source: str = "not known"


def what_was_asked(
    environment: Mapping[str, str] = os.environ, parent: Sequence[str] | None = None
) -> Asked:
    """Return what the launcher was asked for.

    Args:
        parent: the launcher's command line; default: that of the parent process, where /proc tells.
    """
    if EXPECT_VARIABLE in environment:
        expected = json.loads(environment[EXPECT_VARIABLE])
        return Asked(expected["world_size"], expected["distributed_type"], "recipes train")
    argv = list(parent if parent is not None else _parent_command())
    launcher = " ".join(Path(word).name for word in argv[:4])
    if "accelerate" in launcher:
        return _asked_of_accelerate(argv)
    if "torchrun" in launcher or "torch.distributed.run" in " ".join(argv[:4]):
        per_node = _flag(argv, "--nproc_per_node", "--nproc-per-node")
        nodes = _flag(argv, "--nnodes") or "1"
        if per_node and per_node.isdigit() and nodes.isdigit():
            return Asked(int(per_node) * int(nodes), None, "torchrun")
    return Asked()


def _asked_of_accelerate(argv: Sequence[str]) -> Asked:
    path = _flag(argv, "--config_file", "--config-file")
    config = load_accelerate_config(path) if path else None
    processes = _flag(argv, "--num_processes", "--num-processes")
    world_size = int(processes) if processes else config.num_processes if config else None
    if "--use_fsdp" in argv:
        kind: str | None = "FSDP"
    elif "--multi_gpu" in argv:
        kind = "MULTI_GPU"
    elif config:
        kind = config.distributed_type
    else:
        kind = None
    return Asked(world_size, kind, f"accelerate launch{' ' + path if path else ''}")


def what_will_run() -> Active:
    """Return what the processes that have met will do, by the launcher's word on FSDP: accelerate's
    state has it only with the trainer.
    """
    from accelerate import PartialState

    active = what_runs(PartialState())
    fsdp = (
        active.world_size > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    )
    return dataclasses.replace(active, distributed_type="FSDP") if fsdp else active


def check_gpus(num_gpus: int, environment: Mapping[str, str] = os.environ) -> None:
    """Check that each process of this machine has a GPU of its own, where the launcher means GPUs.

    Args:
        num_gpus: how many this process can see.

    Raises:
        RecipeError: there are more processes than GPUs.
    """
    processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    on_cpu = environment.get("ACCELERATE_USE_CPU", "false").lower() == "true"
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
    """Check that the launcher asks for no other mixed precision than the recipe; its word would
    win.

    accelerate hands it on in a variable, wherever it was written.

    Raises:
        RecipeError: it asks for another one.
    """
    conflict = precision_conflict(
        recipe.train, environment.get(PRECISION_VARIABLE, "no"), "the launcher"
    )
    if conflict:
        raise recipe.error("train.bf16", *conflict)


def check_launch(asked: Asked, active: Active) -> str:
    """Return the start-up line that states what is active, once it agrees with what was asked.

    Raises:
        RecipeError: another number of processes, or another distribution, than asked is running.
    """
    described = f"{active.distributed_type}, world size {active.world_size}, {active.device}"
    if asked.world_size is None:
        described += f" (not checked: {asked.source})"
    elif asked.world_size != active.world_size:
        raise RecipeError(
            f"{asked.source} asked for {asked.world_size} processes, but {active.world_size} is"
            " training",
            "on a machine without GPUs use accelerate_configs/ddp_cpu.yaml or fsdp_cpu.yaml:",
            "`--cpu` and `distributed_type: MULTI_CPU` start one process only",
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != active.world_size:
        raise RecipeError(
            f"the launcher started {started} processes, but each of them would train alone",
            "set ACCELERATE_USE_CPU=true, or use accelerate_configs/ddp_cpu.yaml",
        )
    sharded = active.distributed_type == "FSDP"
    if asked.distributed_type == "FSDP" and not sharded and active.world_size > 1:
        raise RecipeError(
            f"{asked.source} asked for FSDP, but {active.distributed_type} is active",
            "set fsdp_version: 2 in the accelerate config; on a machine without GPUs use"
            " accelerate_configs/fsdp_cpu.yaml",
        )
    if asked.distributed_type in {"MULTI_GPU", "NO"} and sharded:
        raise RecipeError(
            f"{asked.source} asked for {asked.distributed_type}, but FSDP is active",
            "unset ACCELERATE_USE_FSDP",
        )
    return described


def leave_gpus_out(environment: MutableMapping[str, str] = os.environ) -> None:
    """Hide the GPUs from a launch for the CPU; call it before torch is imported."""
    if environment.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes"):
        environment["CUDA_VISIBLE_DEVICES"] = ""


def what_runs(state: Any) -> Active:
    """Name what an Accelerator, or accelerate's PartialState, reports in our words: one process,
    DDP, FSDP.
    """
    kind = str(getattr(state.distributed_type, "value", state.distributed_type))
    words = {"MULTI_GPU": "DDP", "MULTI_CPU": "DDP", "NO": "one process"}
    return Active(state.num_processes, words.get(kind, kind), str(state.device))


def _flag(argv: Sequence[str], *names: str) -> str | None:
    for index, word in enumerate(argv):
        for name in names:
            if word == name and index + 1 < len(argv):
                return argv[index + 1]
            if word.startswith(name + "="):
                return word.partition("=")[2]
    return None


def _parent_command() -> list[str]:
    try:
        raw = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return raw.decode(errors="replace").split("\0")[:-1]
