"""The plan of one recipe on one kind of card: memory, steps and time, put together.

Time is tokens over speed: the speed that an earlier training of this model measured on such a card,
else the operations of a token over an assumed share of the card's peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig

from recipes_lib.config.documents import did_you_mean, read
from recipes_lib.config.launch import Launch, plan_launch, sync_each_batch
from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import RECIPE_FILE, Recipe
from recipes_lib.config.upstream import build_lora_config
from recipes_lib.core.errors import RecipesError, one_line
from recipes_lib.core.files import hash_of, object_or_none
from recipes_lib.core.project import runs_root
from recipes_lib.models.families import configuration, known_config, known_configs
from recipes_lib.plan.cards import DEFAULT, Card, card_named
from recipes_lib.plan.steps import RowLengths, Steps, rows_of, steps_of
from recipes_lib.plan.trace import Precision, Trace, trace

# Assumed shares of a card's peak (MFU). LoRA: a published bf16 LoRA of Llama-3-8B on an H100 runs
# at 12,473 tokens/s, 40% of its peak with 4N operations. The others: nobody has measured them here.
MFU = {"LoRA": 0.40, "full": 0.40, "QLoRA": 0.25, "LoRA on 8 bits": 0.15}
AROUND_S = 120.0  # start, loading and saving, assumed
GIB = 2**30
CONTEXT_GIB, NCCL_GIB, GAPS = 0.6, 0.5, 0.05
# Python with torch, transformers and datasets beside the model: 0.6 to 0.9 in three runs
CPU_PROCESS_GIB = 0.8
TILE = 128  # tokens of the loss whose logits are there at once
_ON_GPUS = {"cpu": "single_gpu", "ddp_cpu": "ddp", "fsdp_cpu": "fsdp"}
# of a recipe's `train` section, what decides about speed
_SPEED_KEYS = ("bf16", "fp16", "activation_checkpointing", "packing", "per_device_train_batch_size")


@dataclass(frozen=True)
class Plan:
    """What a training needs."""

    recipe: Recipe
    launch: Launch
    card: Card  # of a CPU, the memory is the process's share
    method: str  # full, LoRA, QLoRA or LoRA on 8 bits
    checkpointing: bool  # whether the blocks are computed again in the backward pass
    rows: RowLengths
    trace: Trace
    steps: Steps
    memory: dict[str, float]  # GiB of one process, by what it is for
    speed: float | None  # tokens per second of all processes, None where it is not known
    speed_source: str
    seconds: float | None  # from start to end

    @property
    def needed(self) -> float:
        """GiB that the card must have."""
        return sum(self.memory.values())

    @property
    def peak(self) -> float:
        """GiB that `torch.cuda.max_memory_allocated` will show."""
        return self.needed - self.memory["context"]

    @property
    def fits(self) -> bool:
        """Whether the largest micro-batch fits."""
        return self.needed <= self.card.memory_gib


def plan_of(recipe: Recipe, launch: Launch, card: Card, rows: RowLengths | None = None) -> Plan:
    """Return the plan of a recipe under a launch, on a card; `rows` if they are counted already."""
    train, quantization, lora = recipe.train, recipe.quantization or {}, build_lora_config(recipe)
    on_cpu = card.name == "cpu"

    # the model: its types, and what a pass keeps
    config, dtype = model_config(recipe), str(recipe.model.dtype)
    if dtype == "auto":
        own = str(getattr(config.get_text_config(), "dtype", "")).removeprefix("torch.")
        dtype = own if own in ("float32", "float16") else "bfloat16"
    half = "float16" if train.get("fp16") else "bfloat16" if train.get("bf16", True) else None
    bits = 4 if quantization.get("load_in_4bit") else 8 if quantization else None
    nested = bool(quantization.get("bnb_4bit_use_double_quant"))
    precision = Precision(dtype, half, bits, nested)
    try:
        traced = trace(config, lora, precision)
    except ValueError as error:
        key = "lora.target_modules" if lora else "model.name_or_path"
        raise recipe.error(key, f"{key}: {one_line(error)}") from None

    # the rows, and memory for the largest micro-batch of them
    rows = rows or rows_of(recipe)
    steps = steps_of(recipe, launch.world_size, rows)
    asked = train.get("activation_checkpointing", train.get("gradient_checkpointing"))
    by_launch = launch.config.fsdp_config.get("fsdp_activation_checkpointing")
    checkpointing = bool(asked or by_launch)
    memory = _memory(recipe, launch, traced, steps, precision, checkpointing, on_cpu)

    # time
    method = {4: "QLoRA", 8: "LoRA on 8 bits"}.get(bits or 0, "LoRA") if lora else "full"
    speed, source, seconds = None, "not known for this card", None
    same = _speed_key(recipe.to_dict(), card.name, launch.world_size)
    if measured := _measured_speeds(runs_root()).get(same):
        speed, run = measured
        source = f"measured by the run {run}"
    elif card.tflops is not None:
        operations = ((4 if lora else 6) + (2 if checkpointing else 0)) * traced.active
        speed = card.tflops * 1e12 * MFU[method] * launch.world_size / operations
        source = f"at an assumed {MFU[method]:.0%} of the card's peak (MFU)"
    if speed is not None:
        work = (steps.tokens + steps.validation / (2 if lora else 3)) / speed
        seconds = work + AROUND_S + traced.weight_bytes / GIB
    return Plan(
        recipe=recipe,
        launch=launch,
        card=card,
        method=method,
        checkpointing=checkpointing,
        rows=rows,
        trace=traced,
        steps=steps,
        memory=memory,
        speed=speed,
        speed_source=source,
        seconds=seconds,
    )


def _memory(
    recipe: Recipe,
    launch: Launch,
    traced: Trace,
    steps: Steps,
    precision: Precision,
    checkpointing: bool,
    on_cpu: bool,
) -> dict[str, float]:
    full, width, processes = recipe.lora is None, precision.compute_bytes, launch.world_size
    sharded = launch.distributed_type == "FSDP"
    shards = processes if sharded else 1

    # weights and what is kept for each
    trained, base = traced.trained_bytes, traced.weight_bytes
    if full:
        base -= trained
        if sharded and precision.half:
            trained = 4 * traced.trained  # FSDP2 under autocast keeps them in float32
    name, width_of_moment = str(recipe.train.get("optim", "")), trained / traced.trained
    if "8bit" in name:
        width_of_moment = 1.05
    elif "paged" in name or "bnb" in name:
        width_of_moment = 4
    moments = 1 if "lion" in name or "rmsprop" in name else 2
    optimizer = 0.1 if "sgd" in name or "adafactor" in name else moments * width_of_moment
    gradients = trained / shards
    if sharded and steps.accumulation > 1 and not sync_each_batch(recipe):
        gradients = 4 * traced.trained  # whole until the step's last backward pass
    elif processes > 1 and not sharded:
        gradients *= 2  # DDP's buckets hold a copy
    gathered = 0.0
    if sharded:  # embeddings and head; this block and the next, or all without resharding
        blocks = traced.parameters - traced.outside
        if launch.config.fsdp_config.get("fsdp_reshard_after_forward", True):
            blocks = min(2 * traced.largest_layer, blocks)
        gathered = blocks * traced.weight_bytes / traced.parameters + traced.outside * width
        if full:  # gradients that are not shared out yet
            gathered += 4 * (traced.largest_layer + traced.outside)

    # activations, and what is there beside them: logits, or one block that is computed again
    tokens, kept, block = steps.largest, traced.per_token, traced.block
    # sdpa makes its mask anew in each block and keeps it; on a CPU, where each example is attended
    # alone, blocks with a window have one
    masked = traced.windows if on_cpu else traced.layers * (steps.per_device > 1)
    if masked and (recipe.model.attn_implementation or "sdpa") in ("sdpa", "eager"):
        kept, block = kept + masked * steps.row * width, block + steps.row * width
    activations = tokens * kept + traced.constant
    at_work = float(tokens * (4 + 2 * width) * traced.hidden)
    if checkpointing:
        activations = tokens * traced.checkpointed
        at_work += tokens * block + traced.constant / traced.layers
    # a tile of logits with its gradient; in float32 the gradients of the head's input and of it
    logits = TILE * traced.vocabulary * (width + 8) + 4 * tokens * traced.hidden
    if full and not sharded:
        logits += 4 * traced.vocabulary * traced.hidden

    memory = {
        "weights": base / shards / GIB,
        "trained": trained / shards / GIB,
        "gradients": gradients / GIB,
        "optimizer": optimizer * traced.trained / shards / GIB,
        "gathered": gathered / GIB,
        "activations": activations / GIB,
        "temporary": max(logits, at_work) / GIB,
    }
    context = CONTEXT_GIB + NCCL_GIB * (processes > 1) + GAPS * sum(memory.values())
    return memory | {"context": CPU_PROCESS_GIB if on_cpu else context}


# ---- what is planned for ----


def launch_for(
    recipe: Recipe, gpu: str | None, gpus: int | None, nodes: int | None, accelerate: str | None
) -> Launch:
    """Return the recipe's launch with flags that win over it: a card means no CPU launch."""
    if accelerate is None and gpu not in (None, "cpu"):
        accelerate, gpus = _ON_GPUS.get(recipe.launch.accelerate), gpus or recipe.launch.gpus
    return plan_launch(recipe.launch, accelerate, gpus, nodes)


def card_for(launch: Launch, gpu: str | None) -> Card:
    """Return the named card; else the processor, this machine's smallest GPU, or the default."""
    if gpu == "cpu" or (gpu is None and launch.config.use_cpu):
        return Card("cpu", psutil.virtual_memory().available / GIB / launch.per_machine)
    if gpu:
        return card_named(gpu)
    number = min(torch.cuda.device_count(), launch.per_machine)
    if devices := [*map(torch.cuda.get_device_properties, range(number))]:
        cards = (card_named(device.name, device.total_memory / GIB) for device in devices)
        return min(cards, key=lambda card: card.memory_gib)
    return replace(card_named(DEFAULT), assumed=True)


def model_config(recipe: Recipe) -> Any:
    """Return the configuration of a recipe's model: a folder's, a known model's, or the Hub's."""
    name, folder = recipe.model.name_or_path, local_folder(recipe)
    values = known_config(name)
    try:
        if values is not None:
            return configuration(values)
        return AutoConfig.from_pretrained(folder or name, revision=recipe.model.revision)
    except OSError as error:  # gated, offline, no such model: each has its own message
        what = f"no plan: '{name}' has no config.json here: {one_line(error)}"
        hints = [*did_you_mean(name, known_configs()), f"online: hf download {name} config.json"]
        raise recipe.fault("model.name_or_path", what, *hints) from None
    except (ValueError, KeyError, TypeError) as error:
        why = one_line(error).partition(" Should contain ")[0]  # without all types that are known
        raise recipe.error("model.name_or_path", f"no plan: {why}") from None


@cache
def _measured_speeds(root: Path) -> dict[str, tuple[float, str]]:
    """Return tokens per second and name of the newest run of each kind of training."""
    speeds: dict[str, tuple[float, str]] = {}
    for file in sorted(root.glob("*/run.json"), key=lambda file: file.stat().st_mtime):
        summary = (object_or_none(file) or {}).get("summary") or {}
        with suppress(RecipesError, LookupError, TypeError):  # not finished, or damaged
            speed, device = float(summary["tokens_per_second"]), str(summary["device"])
            card = device if device == "cpu" else card_named(device, 0.0).name
            values = read(file.with_name(RECIPE_FILE)).values
            speeds[_speed_key(values, card, summary["world_size"])] = speed, file.parent.name
    return speeds


def _speed_key(values: Mapping[str, Any], card: str, processes: int) -> str:
    """Return what decides about a training's speed, by its recipe's values."""
    train, lora = values.get("train") or {}, values.get("lora") or {}
    bits = (values.get("quantization") or {}).get("load_in_4bit")
    own = [values["model"]["name_or_path"], lora.get("r"), bool(bits)]
    return hash_of(card.partition("-")[0], processes, own, *map(train.get, _SPEED_KEYS))
