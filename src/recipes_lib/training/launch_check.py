"""What the launcher asked for against what is really running: launchers change it silently. And
FSDP2 on CPU processes.
"""

import argparse
import os
from typing import Any

import psutil

from recipes_lib.config.launch import Active, asks_for, load_accelerate_config, precision_conflict
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.ranks import world_size

_WORKERS_PER_CPU = 8  # 200 on two CPUs took all of a machine for minutes before a first step
DDP_ON_CPU = "on a machine without GPUs use accelerate_configs/ddp_cpu.yaml or fsdp_cpu.yaml"


def leave_gpus_out() -> None:
    """Hide the GPUs from a launch for the CPU; call it before torch is imported."""
    if asks_for("ACCELERATE_USE_CPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def what_runs(state: Any = None) -> Active:
    """Return what has met: one process, DDP, or FSDP (the launcher says so until then)."""
    from accelerate import PartialState

    running = state or PartialState()
    kind = str(getattr(running.distributed_type, "value", running.distributed_type))
    if state is None and running.num_processes > 1 and asks_for("ACCELERATE_USE_FSDP"):
        kind = "FSDP1" if os.getenv("FSDP_VERSION") == "1" else "FSDP"
    names = {"MULTI_GPU": "DDP", "MULTI_CPU": "DDP", "NO": "one process"}
    return Active(
        world_size=running.num_processes,
        distributed_type=names.get(kind, kind),
        device=str(running.device),
        wrapped_classes=os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ""),
    )


def check_request(recipe: Recipe, num_gpus: int) -> None:
    """Refuse what no process can be: a backend that is not supported, more processes than GPUs that
    each can see, another mixed precision of the launcher than the recipe's (accelerate's wins).
    """
    for backend in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):  # by flags alone
        if asks_for(f"ACCELERATE_USE_{backend}"):
            hint = f"unset ACCELERATE_USE_{backend}, or use accelerate_configs/fsdp.yaml"
            raise RecipeError(f"{backend} was requested but cannot be used here", hint)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if 0 < num_gpus < processes and not asks_for("ACCELERATE_USE_CPU"):
        raise RecipeError(
            f"{processes} processes on this machine, but each of them sees {num_gpus} GPU(s)",
            f"start {num_gpus}: --gpus with recipes train, --num_processes with accelerate launch",
            "CUDA shows a process only one of several MIG slices",
        )
    workers = recipe.train.get("dataloader_num_workers", 0) * max(processes, 1)
    most_workers = _WORKERS_PER_CPU * (os.cpu_count() or 1)
    if workers > most_workers:
        key = "train.dataloader_num_workers"
        what = f"{key}: {workers} processes would load rows here; {most_workers} is the most"
        raise recipe.error(key, what, "set 0 to 4: the rows are prepared, and collating is fast")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    conflict = precision_conflict(recipe.train, precision, "the launcher")
    if conflict:
        raise recipe.error("train.bf16", *conflict)


def _asked_of_accelerate_launch() -> int:
    """Return the number of processes that were asked for; 1 where it is not known."""
    # the environment of a rank says how many were started; what was asked for stands only here
    try:
        command = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return 1
    if not any(word.endswith("launch") for word in command):
        return 1
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--num_processes", "--num-processes", type=int)
    flags.add_argument("--config_file", "--config-file")
    given, _ = flags.parse_known_args(command)
    if given.num_processes is None and given.config_file is not None:
        return load_accelerate_config(given.config_file).num_processes
    return given.num_processes or 1


def check_launch(active: Active) -> str:
    """Return the start-up line that states what is active, once it agrees with what was asked."""
    running = active.world_size
    requested = _asked_of_accelerate_launch()
    if world_size() != running:
        what = f"the launcher started {world_size()} processes, but each of them would train alone"
        hint = "set ACCELERATE_USE_CPU=true, or use accelerate_configs/ddp_cpu.yaml"
        raise RecipeError(what, hint)
    if requested > running:
        what = f"{requested} processes were requested, but accelerate launch started {running}"
        raise RecipeError(what, DDP_ON_CPU)
    if asks_for("ACCELERATE_USE_FSDP") and active.distributed_type != "FSDP" and running > 1:
        what = f"FSDP was requested, but {active.distributed_type} is active"
        raise RecipeError(what, f"set fsdp_version: 2 in the accelerate config; {DDP_ON_CPU}")
    return f"{active.distributed_type}, world size {running}, {active.device}"


def shard_on_cpus() -> None:
    """Let this process shard on CPUs where it was launched with an FSDP config."""
    import torch

    from recipes_lib.models import upstream_fixes

    on_cpus = not torch.accelerator.is_available()
    if world_size() > 1 and on_cpus and asks_for("ACCELERATE_USE_FSDP"):
        upstream_fixes.let_fsdp_run_on_cpus()
