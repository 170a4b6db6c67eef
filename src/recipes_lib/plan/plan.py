"""The plan of one recipe on one kind of card: memory, steps and time, put together.

Time is tokens over speed: the speed that an earlier training of this model measured on such a card,
else the operations of a token over an assumed share of the card's peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import psutil
import torch
from transformers import AutoConfig

from recipes_lib.config.batch import sync_each_batch
from recipes_lib.config.documents import did_you_mean, read
from recipes_lib.config.launch import Launch, plan_launch
from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.upstream import build_lora_config
from recipes_lib.core.errors import RecipesError, one_line
from recipes_lib.core.files import hash_of, object_or_none
from recipes_lib.core.project import runs_root
from recipes_lib.models.known import known_config, known_configs
from recipes_lib.models.shape import configuration
from recipes_lib.plan.cards import DEFAULT, Card, card_named
from recipes_lib.plan.steps import RowLengths, Steps, rows_of, steps_of
from recipes_lib.plan.trace import Precision, Trace, trace

# Assumed shares of a card's peak (MFU). LoRA: a published bf16 LoRA of Llama-3-8B on an H100 runs
# at 12,473 tokens/s, 40% of its peak with 4N operations. The others: nobody has measured them here.
MFU = {"LoRA": 0.40, "full": 0.40, "QLoRA": 0.25, "LoRA on 8 bits": 0.15}
# TFLOP/s of a core with AVX512-BF16 in a LoRA training of SmolLM2-135M, by bytes of an activation
CORE_TFLOPS = {2: 0.18, 4: 0.083}
AROUND_S = {True: 30.0, False: 120.0}  # start, loading and saving, on a CPU and on a GPU, assumed
GIB = 2**30
CONTEXT_GIB, NCCL_GIB, GAPS = 0.6, 0.5, 0.05
# Python with torch, transformers and datasets beside the model: 0.6 to 0.9 in three runs
CPU_PROCESS_GIB = 0.8
TILE = 128  # tokens of the loss whose logits are there at once
TYPES = ("float32", "float16", "bfloat16")
# the arms of a study have the same rows, which take longest to count
_counted: dict[str, RowLengths] = {}
_MODEL_KEY = "model.name_or_path"
_ON_GPUS = {"cpu": "single_gpu", "ddp_cpu": "ddp", "fsdp_cpu": "fsdp"}
_ON_CPU = {on_gpu: on_cpu for on_cpu, on_gpu in _ON_GPUS.items()}


@dataclass(frozen=True)
class Memory:
    """GiB of one process.

    Args:
        weights: of the base; the shard under FSDP2.
        gathered: FSDP2's whole layers beside the shards.
        activations: kept for the backward pass.
        temporary: logits, or what one block needs while it is computed again and differentiated.
        context: CUDA, communication and gaps of the allocator.
    """

    weights: float
    trained: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    temporary: float
    context: float = 0.0

    @property
    def needed(self) -> float:
        """What the card must have."""
        return sum(asdict(self).values())

    @property
    def peak(self) -> float:
        """What `torch.cuda.max_memory_allocated` will show."""
        return self.needed - self.context


@dataclass(frozen=True)
class Plan:
    """What a training needs."""

    recipe: Recipe
    launch: Launch
    card: Card
    config: Any
    rows: RowLengths

    @property
    def on_cpu(self) -> bool:
        """Whether no GPU is used."""
        return self.card.name == "cpu"

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shares the weights out."""
        return self.launch.distributed_type == "FSDP"

    @property
    def checkpointing(self) -> bool:
        """Whether the blocks are computed again in the backward pass."""
        train, fsdp = self.recipe.train, self.launch.config.fsdp_config
        asked = train.get("activation_checkpointing", train.get("gradient_checkpointing"))
        return bool(asked or fsdp.get("fsdp_activation_checkpointing"))

    @cached_property
    def precision(self) -> Precision:
        """The types it computes in."""
        train, quantization = self.recipe.train, self.recipe.quantization or {}
        bits = 4 if quantization.get("load_in_4bit") else 8 if quantization else None
        half = "float16" if train.get("fp16") else "bfloat16" if train.get("bf16", True) else None
        own = str(getattr(self.config.get_text_config(), "dtype", "")).removeprefix("torch.")
        dtype = next((name for name in (self.recipe.model.dtype, own) if name in TYPES), TYPES[-1])
        nested = bool(quantization.get("bnb_4bit_use_double_quant"))
        return Precision(str(dtype), half, bits, nested)

    @property
    def method(self) -> str:
        """The way to train, in a word."""
        if self.recipe.lora is None:
            return "full"
        return {4: "QLoRA", 8: "LoRA on 8 bits"}.get(self.precision.bits or 0, "LoRA")

    @cached_property
    def trace(self) -> Trace:
        """The numbers of the model that is trained.

        Raises:
            RecipeError: LoRA's targets are not in the model.
        """
        lora = build_lora_config(self.recipe)
        try:
            return trace(self.config, lora, self.precision)
        except ValueError as error:
            key = "lora.target_modules" if lora else _MODEL_KEY
            raise self.recipe.error(key, f"{key}: {one_line(error)}") from None

    @cached_property
    def steps(self) -> Steps:
        """Steps, tokens and the largest micro-batch."""
        return steps_of(self.recipe, self.launch.world_size, self.rows)

    @cached_property
    def memory(self) -> Memory:
        """GiB of one process."""
        return self.memory_for(self.steps.largest, self.steps.row)

    def memory_for(self, tokens: int, row: int) -> Memory:
        """Return the memory for a micro-batch of `tokens` tokens in rows of `row`."""
        traced, train, full = self.trace, self.recipe.train, self.recipe.lora is None
        wide, processes = self.precision.compute_bytes, self.launch.world_size
        shards = processes if self.sharded else 1
        trained, base = traced.trained_bytes, traced.weight_bytes
        if full:
            base -= trained
            if self.sharded and self.precision.half:
                trained = 4 * traced.trained  # FSDP2 under autocast keeps them in float32
        gradients = trained / shards
        several = self.steps.accumulation > 1
        if self.sharded and several and not sync_each_batch(self.recipe):
            gradients = 4 * traced.trained  # whole until the step's last backward pass
        elif processes > 1 and not self.sharded:
            gradients *= 2  # DDP's buckets hold a copy
        kept, block = traced.per_token, traced.block
        attention = self.recipe.model.attn_implementation or "sdpa"
        # on a CPU, and by kernels that know where a row ends, each example is attended alone
        alone = self.on_cpu or self.steps.per_device == 1
        if not alone and attention in ("sdpa", "eager"):
            # sdpa makes its mask anew in each block and keeps it
            kept, block = kept + traced.layers * row * wide, block + row * wide
        activations = tokens * kept + traced.constant
        at_work = float(tokens * (4 + 2 * wide) * traced.hidden)
        if self.checkpointing:
            activations = tokens * traced.checkpointed
            at_work += tokens * block + traced.constant / traced.layers
        # a tile of logits with its gradient; in float32 the gradients of the head's input and of it
        logits = TILE * traced.vocabulary * (wide + 8) + 4 * tokens * traced.hidden
        logits += 4 * traced.vocabulary * traced.hidden if full and not self.sharded else 0
        per_weight = _optimizer_bytes(str(train.get("optim", "")), trained / traced.trained)
        memory = Memory(
            weights=base / shards / GIB,
            trained=trained / shards / GIB,
            gradients=gradients / GIB,
            optimizer=traced.trained / shards * per_weight / GIB,
            gathered=self._gathered() / GIB if self.sharded else 0.0,
            activations=activations / GIB,
            temporary=max(logits, at_work) / GIB,
        )
        context = CONTEXT_GIB + NCCL_GIB * (processes > 1) + GAPS * memory.needed
        return replace(memory, context=CPU_PROCESS_GIB if self.on_cpu else context)

    def _gathered(self) -> float:
        """Bytes of whole layers under FSDP2: embeddings and head, and this block and the next, or
        all without resharding. Full fine-tuning adds gradients that are not shared out yet.
        """
        traced = self.trace
        blocks = traced.parameters - traced.outside
        if self.launch.config.fsdp_config.get("fsdp_reshard_after_forward", True):
            blocks = min(2 * traced.largest_layer, blocks)
        whole = blocks * traced.weight_bytes / traced.parameters
        whole += traced.outside * self.precision.compute_bytes
        own = 4 * (traced.largest_layer + traced.outside)
        return whole + (own if self.recipe.lora is None else 0)

    @property
    def fits(self) -> bool:
        """Whether the largest micro-batch fits."""
        return self.memory.needed <= self.card.memory_gib

    @property
    def largest_tokens(self) -> int:
        """The largest micro-batch in tokens that fits."""
        low, high = 0, 1 << 24
        while low < high:
            middle = (low + high + 1) // 2
            row = middle if self.steps.joined else min(self.steps.row, middle)
            memory = self.memory_for(middle, row)
            fits = memory.needed <= self.card.memory_gib
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    @cached_property
    def speed(self) -> tuple[float, str] | None:
        """Tokens per second of all processes, and where the number is from; None where neither the
        card's peak nor an earlier training is known.
        """
        if measured := measured_speed(self):
            return measured
        passes = (6 if self.recipe.lora is None else 4) + (2 if self.checkpointing else 0)
        operations = passes * self.trace.active * self.steps.computed / self.steps.tokens
        processes = self.launch.world_size
        if self.on_cpu:
            cores = torch.get_num_threads() * CORE_TFLOPS[self.precision.compute_bytes]
            where = "of one core as SmolLM2-135M showed it on another machine"
            return cores * 1e12 / operations, where
        if self.card.tflops is None:
            return None
        share = MFU[self.method]
        speed = self.card.tflops * 1e12 * share * processes / operations
        return speed, f"at an assumed {share:.0%} of the card's peak (MFU)"

    @property
    def seconds(self) -> float | None:
        """Seconds from start to end, None where the speed is not known."""
        if self.speed is None:
            return None
        validation = self.steps.validation / (3 if self.recipe.lora is None else 2)
        work = (self.steps.tokens + validation) / self.speed[0]
        return work + AROUND_S[self.on_cpu] + self.trace.weight_bytes / GIB


def _optimizer_bytes(name: str, trained_bytes: float) -> float:
    """Return the optimizer's state in bytes per trained weight; an unknown name counts as AdamW."""
    if "sgd" in name or "adafactor" in name:
        return 0.1
    moments = 1 if "lion" in name or "rmsprop" in name else 2
    if "8bit" in name:
        return 1.05 * moments
    return moments * (4.0 if "paged" in name or "bnb" in name else trained_bytes)


def plan_of(recipe: Recipe, launch: Launch, card: Card, tokens_per_row: int | None = None) -> Plan:
    """Return the plan of a recipe under a launch, on a card.

    Raises:
        RecipeError: an unknown architecture, or a batch that cannot be divided.
        EnvironmentFault: the model's configuration cannot be had.
    """
    config = model_config(recipe)
    if card.name == "cpu":
        card = replace(card, memory_gib=card.memory_gib / launch.per_machine)
    values = recipe.to_dict()
    key = hash_of(values["data"], values["model"], recipe.train.get("max_length"), tokens_per_row)
    if key not in _counted:
        _counted[key] = rows_of(recipe, tokens_per_row)
    return Plan(recipe, launch, card, config, _counted[key])


def card_for(launch: Launch, gpu: str | None) -> Card:
    """Return the card of that name; else the processor for a launch without GPUs, this machine's
    smallest GPU that the launch takes, or the table's default.

    Raises:
        RecipeError: unknown card.
    """
    if gpu == "cpu" or (gpu is None and launch.config.use_cpu):
        return Card("cpu", psutil.virtual_memory().available / GIB)
    if gpu:
        return card_named(gpu)
    if cards := cards_here()[: launch.per_machine]:
        return min(cards, key=lambda card: card.memory_gib)
    return replace(card_named(DEFAULT), assumed=True)


def cards_here() -> list[Card]:
    """Return the GPUs that a training may use here, as CUDA numbers them."""
    count = torch.cuda.device_count()
    devices = [torch.cuda.get_device_properties(number) for number in range(count)]
    return [card_named(device.name, device.total_memory / GIB) for device in devices]


def launch_for(
    recipe: Recipe, gpu: str | None, gpus: int | None, nodes: int | None, accelerate: str | None
) -> Launch:
    """Return the recipe's launch with flags that win over it: a card means no CPU launch, and
    several processes mean DDP where the recipe has one.
    """
    own = recipe.launch
    chosen = accelerate or own.accelerate
    if accelerate is None and gpu:
        chosen = (_ON_CPU if gpu == "cpu" else _ON_GPUS).get(chosen, chosen)
    if accelerate is None and (gpus or 1) * (nodes or 1) > 1:
        chosen = {"cpu": "ddp_cpu", "single_gpu": "ddp"}.get(chosen, chosen)
    if chosen == own.accelerate:
        return plan_launch(own, None, gpus, nodes)
    return plan_launch(own, chosen, gpus or own.gpus, nodes)


def model_config(recipe: Recipe) -> Any:
    """Return the configuration of a recipe's model: a folder's, a known model's, or the Hub's.

    Raises:
        RecipeError: no model at this path, or an architecture that transformers does not know.
        EnvironmentFault: nothing is known of the name, and the Hub does not answer.
    """
    name = recipe.model.name_or_path
    values = known_config(name)
    if values is None and (folder := local_folder(recipe)) is not None:
        values = object_or_none(folder / "config.json")
        if values is None:
            raise recipe.error(_MODEL_KEY, f"no plan: {folder} has no readable config.json")
    try:
        if values is not None:
            return configuration(values)
        return AutoConfig.from_pretrained(name, revision=recipe.model.revision)
    except OSError as error:  # gated, offline, no such model: each has its own message
        why = f"no plan: '{name}' is not on this machine and not among the known models"
        hints = [*did_you_mean(name, known_configs()), f"online: hf download {name} config.json"]
        what = f"{why}, and the Hub says: {one_line(error)}"
        raise recipe.fault(_MODEL_KEY, what, *hints) from None
    except (ValueError, KeyError, TypeError) as error:
        raise recipe.error(_MODEL_KEY, f"no plan: {one_line(error)}") from None


def measured_speed(plan: Plan) -> tuple[float, str] | None:
    """Return the tokens per second of the newest finished training of this model and method on as
    many cards of this kind, and the run's name.
    """
    own, measured = _decides_speed(plan.recipe.to_dict()), []
    for file in sorted(runs_root().glob("*/run.json")):
        state = object_or_none(file) or {}
        summary = state.get("summary") or {}
        speed, device = summary.get("tokens_per_second"), str(summary.get("device"))
        card = device if device == "cpu" else card_named(device, 0.0).name
        of_this_kind = card.partition("-")[0] == plan.card.name.partition("-")[0]
        if not speed or not of_this_kind or summary["world_size"] != plan.launch.world_size:
            continue
        try:
            same = _decides_speed(read(file.with_name("resolved.yaml")).values) == own
        except (RecipesError, LookupError, TypeError):
            continue
        if same:
            measured.append((str(state.get("updated")), float(speed), file.parent.name))
    if not measured:
        return None
    _, speed, run = max(measured)
    return speed, f"measured by the run {run}"


def _decides_speed(values: Mapping[str, Any]) -> list[object]:
    """Return what of a recipe decides about its speed on a card."""
    train, lora = values.get("train") or {}, values.get("lora") or {}
    keys = ("bf16", "fp16", "activation_checkpointing", "packing", "per_device_train_batch_size")
    bits = (values.get("quantization") or {}).get("load_in_4bit")
    name = values["model"]["name_or_path"]
    return [name, lora.get("r"), bool(bits), *(train.get(key) for key in keys)]
