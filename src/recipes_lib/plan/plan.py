"""The plan of one recipe on one kind of card: memory, steps and time, put together.

Time is work over speed: the speed that an earlier training of this model measured on such a card,
else the operations of a token over an assumed share of the card's peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.config.launch import Launch, plan_launch
from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.upstream import build_lora_config
from recipes_lib.core.errors import one_line
from recipes_lib.core.files import hash_of, object_or_none
from recipes_lib.core.project import runs_root
from recipes_lib.models.known import known_config, known_facts
from recipes_lib.models.packaged import is_packaged
from recipes_lib.models.shape import configuration
from recipes_lib.plan.cards import DEFAULT, Card, card_named, cards_here, cpu_card, recognised
from recipes_lib.plan.memory import GIB, Memory, largest_tokens, memory_of
from recipes_lib.plan.steps import RowLengths, Setup, Steps, rows_of, setup_of, steps_of
from recipes_lib.plan.trace import Trace, trace

# Assumed shares of a card's peak (MFU). LoRA: a published bf16 LoRA of Llama-3-8B on an H100 runs
# at 12,473 tokens/s, 40% of its peak with 4N operations. The others: nobody has measured them here.
MFU = {"LoRA": 0.40, "full": 0.40, "QLoRA": 0.25, "LoRA on 8 bits": 0.15}
NETWORK = 25.0  # GB/s per GPU between machines, assumed
AROUND_S = {True: 30.0, False: 120.0}  # start, loading and saving, on a CPU and on a GPU, assumed
# the arms of a study have the same rows, which take longest to count
_counted: dict[str, RowLengths] = {}
_MODEL_KEY = "model.name_or_path"
_CPU_TWINS = {"cpu": "single_gpu", "ddp_cpu": "ddp", "fsdp_cpu": "fsdp"}


@dataclass(frozen=True)
class Plan:
    """What a training needs."""

    recipe: Recipe
    launch: Launch
    card: Card
    config: Any
    setup: Setup
    rows: RowLengths

    @cached_property
    def trace(self) -> Trace:
        """The numbers of the model that is trained.

        Raises:
            RecipeError: LoRA's targets are not in the model.
        """
        lora = None if self.setup.full else build_lora_config(self.recipe)
        try:
            return trace(self.config, lora, self.setup.precision)
        except ValueError as error:
            key = "lora.target_modules" if lora else _MODEL_KEY
            raise self.recipe.error(key, f"{key}: {one_line(error)}") from None

    @cached_property
    def steps(self) -> Steps:
        """Steps, tokens and the largest micro-batch."""
        return steps_of(self.setup, self.rows, self.recipe.train)

    @cached_property
    def memory(self) -> Memory:
        """GiB of one process."""
        return memory_of(self.trace, self.setup, self.steps.largest, self.steps.row)

    @property
    def fits(self) -> bool:
        """Whether the largest micro-batch fits."""
        return self.memory.needed <= self.card.memory_gib

    @property
    def largest_tokens(self) -> int:
        """The largest micro-batch in tokens that fits."""
        return largest_tokens(self.trace, self.setup, self.card, self.steps.row)

    @cached_property
    def speed(self) -> tuple[float, str] | None:
        """Tokens per second of all processes, and where the number is from; None where neither the
        card's peak nor an earlier training is known.
        """
        if measured := measured_speed(self):
            return measured
        if self.card.tflops is None:
            return None
        setup, traced, steps = self.setup, self.trace, self.steps
        passes = (6 if setup.full else 4) + (2 if setup.checkpointing else 0)
        operations = passes * traced.active + 6 * traced.attention * steps.context
        operations += 0 if setup.full else 6 * traced.trained
        share = 1.0 if setup.on_cpu else MFU[setup.method]
        share *= 1.0 if setup.on_cpu or setup.precision.compute_bytes == 2 else 0.25
        computed = steps.computed / steps.steps / setup.world_size
        seconds = computed * operations / (self.card.tflops * 1e12 * share)
        seconds = max(seconds, self._exchange_s)
        speed = steps.tokens / steps.steps / seconds
        if setup.on_cpu:
            return speed, "of one core as SmolLM2-135M showed it on another machine"
        return speed, f"at an assumed {share:.0%} of the card's peak (MFU)"

    @property
    def _exchange_s(self) -> float:
        """Seconds of a step to gather FSDP2's shards and to exchange gradients."""
        setup, traced = self.setup, self.trace
        link = self.card.link if setup.world_size <= setup.per_machine else NETWORK
        share = (setup.world_size - 1) / setup.world_size
        gradients = 4 * traced.trained * (1 if setup.sharded else 2)
        gathers = setup.accumulation * (2 if setup.reshard else 1) if setup.sharded else 0
        return share * (gathers * traced.weight_bytes + gradients) / (link * 1e9)

    @property
    def seconds(self) -> float | None:
        """Seconds from start to end, None where the speed is not known."""
        if self.speed is None:
            return None
        validation = self.steps.validation / (3 if self.setup.full else 2)
        work = (self.steps.tokens + validation) / self.speed[0]
        return work + AROUND_S[self.setup.on_cpu] + self.trace.weight_bytes / GIB

    def change(self, **changes: Any) -> Plan:
        """Return the plan with another setup."""
        return replace(self, setup=replace(self.setup, **changes))


def plan_of(recipe: Recipe, launch: Launch, card: Card, tokens_per_row: int | None = None) -> Plan:
    """Return the plan of a recipe under a launch, on a card.

    Raises:
        RecipeError: an unknown architecture, or a batch that cannot be divided.
        EnvironmentFault: the model's configuration cannot be had.
    """
    config = model_config(recipe)
    own = str(getattr(config.get_text_config(), "dtype", "")).removeprefix("torch.")
    setup = setup_of(recipe, launch, own, on_cpu=card.name == "cpu")
    if setup.on_cpu:
        kind = f"{setup.precision.bits}-bit" if setup.precision.bits == 4 else ""
        kind = kind or ("bf16" if setup.precision.compute_bytes == 2 else "float32")
        card = cpu_card(kind, launch.per_machine)
    values = recipe.to_dict()
    key = hash_of(values["data"], values["model"], setup.max_length, tokens_per_row)
    if key not in _counted:
        _counted[key] = rows_of(recipe, tokens_per_row)
    return Plan(recipe, launch, card, config, setup, _counted[key])


def card_for(launch: Launch, gpu: str | None) -> Card:
    """Return the card of that name; else the processor for a launch without GPUs, this machine's
    smallest GPU that the launch takes, or the table's default.

    Raises:
        RecipeError: unknown card.
    """
    if gpu is None and launch.config.use_cpu:
        return cpu_card()
    if gpu:
        return card_named(gpu)
    here = cards_here()[: launch.per_machine]
    if here:
        return min(here, key=lambda card: card.memory_gib)
    return replace(card_named(DEFAULT), assumed=True)


def launch_for(
    recipe: Recipe, gpu: str | None, gpus: int | None, nodes: int | None, accelerate: str | None
) -> Launch:
    """Return the recipe's launch with flags that win over it: several GPUs for one process mean
    DDP, and a card means no CPU launch.
    """
    own = recipe.launch
    chosen = accelerate or own.accelerate
    if accelerate is None:
        if gpu not in (None, "cpu"):
            chosen = _CPU_TWINS.get(chosen, chosen)
        elif gpu == "cpu" and not chosen.endswith("cpu"):
            twins = {on_gpu: on_cpu for on_cpu, on_gpu in _CPU_TWINS.items()}
            chosen = twins.get(chosen, "fsdp_cpu" if "fsdp" in chosen else "ddp_cpu")
        if (gpus or 1) * (nodes or 1) > 1:
            chosen = {"cpu": "ddp_cpu", "single_gpu": "ddp"}.get(chosen, chosen)
        elif gpus == 1 and (nodes or own.nodes) == 1 and chosen not in ("cpu", "single_gpu"):
            return plan_launch(own, "cpu" if chosen.endswith("cpu") else "single_gpu", 1, None)
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
    values: Mapping[str, Any] | None = known_config(name)
    why = f"'{name}' is not on this machine and not among the known models"
    if values is None and (folder := local_folder(recipe)) is not None:
        values = object_or_none(folder / "config.json")
    elif values is None and not is_packaged(name):
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download(
                name, "config.json", revision=recipe.model.revision, etag_timeout=5
            )
            values = object_or_none(Path(file))
        except Exception as error:  # gated, offline, no such model: each has its own message
            why += f", and the Hub gives no config.json: {one_line(error)}"
    if not values:
        hints = did_you_mean(name, known_facts())
        raise recipe.fault(
            _MODEL_KEY, f"no plan: {why}", *hints, f"online: hf download {name} config.json"
        )
    try:
        return configuration(values)
    except (ValueError, KeyError, TypeError) as error:
        raise recipe.error(_MODEL_KEY, f"no plan: {one_line(error)}") from None


def measured_speed(plan: Plan) -> tuple[float, str] | None:
    """Return the tokens per second of the newest finished training of this model and method on as
    many cards of this kind, and the run's name.
    """
    found = []
    for file in sorted(runs_root().glob("*/run.json")):
        state = object_or_none(file) or {}
        summary = state.get("summary") or {}
        speed, device = summary.get("tokens_per_second"), str(summary.get("device", ""))
        if state.get("state") != "finished" or not speed:
            continue
        name = "cpu" if device.lower().startswith("cpu") else recognised(device, 0.0).name
        if name.partition("-")[0] != plan.card.name.partition("-")[0]:
            continue
        if summary.get("world_size") != plan.setup.world_size:
            continue
        try:
            values = yaml.safe_load((file.parent / "resolved.yaml").read_text(encoding="utf-8"))
            same = values["model"]["name_or_path"] == plan.recipe.model.name_or_path
            same &= _way(values) == _way(plan.recipe.to_dict())
        except (OSError, LookupError, TypeError, yaml.YAMLError):
            continue
        if same:
            found.append((str(state.get("updated", "")), float(speed), file.parent.name))
    if not found:
        return None
    _, speed, run = max(found)
    return speed, f"measured by the run {run}"


def _way(values: Mapping[str, Any]) -> list[object]:
    """Return what of a recipe decides about its speed, besides model and card."""
    train = values.get("train") or {}
    keys = ("bf16", "fp16", "activation_checkpointing", "packing", "per_device_train_batch_size")
    lora, quantization = values.get("lora"), values.get("quantization") or {}
    rank = lora and lora.get("r")
    return [rank, bool(quantization.get("load_in_4bit")), *(train.get(key) for key in keys)]
