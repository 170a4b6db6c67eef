"""The plan of one recipe on one kind of card: rows, steps, memory and time."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import psutil
import torch
from transformers import AutoConfig

from recipes_lib.config.documents import read
from recipes_lib.config.launch import Launch, plan_launch
from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import RECIPE_FILE, Recipe
from recipes_lib.config.upstream import build_lora_config
from recipes_lib.core.errors import RecipesError, one_line
from recipes_lib.core.files import object_or_none
from recipes_lib.core.project import runs_root
from recipes_lib.models.families import known_config
from recipes_lib.plan.cards import DEFAULT, Card, card_named
from recipes_lib.plan.memory import CONTEXT_GIB, GIB, NCCL_GIB, NF4, NF4_NESTED, memory_of
from recipes_lib.plan.steps import RowLengths, Steps, rows_of, steps_of
from recipes_lib.plan.trace import Trace, trace
from recipes_lib.weights.load import explain_load_failure

# Assumed shares of a card's peak (MFU). LoRA: a published bf16 LoRA of Llama-3-8B on an H100 runs
# at 12,473 tokens/s, 40% of its peak with 4N operations. The others: nobody has measured them here.
MFU = {"LoRA": 0.40, "full": 0.40, "QLoRA": 0.25, "LoRA on 8 bits": 0.15}
AROUND_S = 120.0  # start, loading and saving, assumed; a second more for each GiB of weights
_ON_GPUS = {"cpu": "single_gpu", "ddp_cpu": "ddp", "fsdp_cpu": "fsdp"}
# of `train`: what decides how long a step takes
_SPEED_KEYS = ["bf16", "fp16", "activation_checkpointing", "packing", "padding_free"]
_SPEED_KEYS += ["per_device_train_batch_size", "torch_compile"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training needs."""

    recipe: Recipe
    launch: Launch
    card: Card  # of a CPU, the memory is the process's share
    method: str  # full, LoRA, QLoRA or LoRA on 8 bits
    width: int  # bytes of an activation that a matrix product makes
    checkpointing: bool  # whether the blocks are computed again in the backward pass
    rows: RowLengths
    trace: Trace
    steps: Steps
    speed: float | None  # tokens per second of all processes, None where it is not known
    speed_source: str
    seconds: float | None  # from start to end, if the rows were those that are assumed

    @cached_property
    def memory(self) -> dict[str, float]:
        """GiB of one process, by what it is for."""
        return memory_of(self)

    @property
    def load_peak(self) -> float:
        """GiB while the base is loaded, where that is more than a card keeps of it."""
        # bitsandbytes makes a quantized one whole on every card, and FSDP2 takes its shards of that
        # (accelerate 1.15, fsdp_utils.py: `fsdp2_prepare_model`)
        is_sharded = self.launch.distributed_type == "FSDP"
        if not is_sharded or self.recipe.quantization is None or self.card.name == "cpu":
            return 0.0
        return self.trace.weight_bytes / GIB + CONTEXT_GIB + NCCL_GIB

    @property
    def needed(self) -> float:
        """GiB that the card must have."""
        return max(sum(self.memory.values()), self.load_peak)

    @property
    def steps_known(self) -> bool:
        """Whether the number of steps does not rest on an assumed number of rows."""
        return self.rows.number_known or int(self.recipe.train.get("max_steps", -1)) > 0

    @property
    def seconds_per_1000_rows(self) -> float | None:
        """Of training alone, with the rows' mean length."""
        if not self.speed:
            return None
        return 1000 * self.steps.tokens / (self.steps.steps * self.steps.examples) / self.speed

    @property
    def fits(self) -> bool:
        """Whether the largest micro-batch fits."""
        return self.needed <= self.card.memory_gib


def plan_of(recipe: Recipe, launch: Launch, card: Card, rows: RowLengths | None = None) -> Plan:
    """Return the plan of a recipe under a launch, on a card; `rows` if they are counted already."""
    train = recipe.train
    config = model_config(recipe)
    dtype = str(recipe.model.dtype)
    if dtype == "auto":
        saved = str(getattr(config.get_text_config(), "dtype", "")).removeprefix("torch.")
        dtype = saved if saved in ("float32", "float16") else "bfloat16"
    half = None  # autocast's type
    if train.get("fp16"):
        half = "float16"
    elif train.get("bf16", True):
        half = "bfloat16"
    method = "full" if recipe.lora is None else "LoRA"
    packed = None  # bytes of a weight in quantized layers
    quantization = recipe.quantization or {}
    if quantization.get("load_in_4bit"):
        method = "QLoRA"
        packed = NF4
        if quantization.get("bnb_4bit_use_double_quant"):
            packed = NF4_NESTED
    elif quantization:
        method = "LoRA on 8 bits"
        packed = 1.0
    traced = _traced(recipe, config, dtype, half, packed)

    rows = rows or rows_of(recipe)
    steps = steps_of(recipe, launch.world_size, rows)
    recomputes = train.get("activation_checkpointing", train.get("gradient_checkpointing"))
    recomputes = recomputes or launch.config.fsdp_config.get("fsdp_activation_checkpointing")

    speed, source = _measured_speed(recipe, card, launch) or (None, "not known for this card")
    if speed is None and card.tflops is not None:
        # for each parameter and token: 2 operations forward, 2 for the gradients of activations, 2
        # for those of weights (LoRA's base has none), and 2 where a block is computed again
        operations = 6 if recipe.lora is None else 4
        if recomputes:
            operations += 2
        peak = card.tflops * 1e12 * MFU[method] * launch.world_size
        speed = peak / (operations * traced.active)
        source = f"at an assumed {MFU[method]:.0%} of the card's peak (MFU)"
    seconds = None
    if speed:
        # a validation and a reference have no backward pass: a third of the operations, of LoRA a
        # half
        share = 3 if recipe.lora is None else 2
        tokens = steps.tokens + (steps.validation + steps.reference) / share
        seconds = tokens / speed + AROUND_S + traced.weight_bytes / GIB
    return Plan(
        recipe=recipe,
        launch=launch,
        card=card,
        method=method,
        width=getattr(torch, half or dtype).itemsize,
        checkpointing=bool(recomputes),
        rows=rows,
        trace=traced,
        steps=steps,
        speed=speed,
        speed_source=source,
        seconds=seconds,
    )


def _traced(
    recipe: Recipe, config: Any, dtype: str, half: str | None, packed: float | None
) -> Trace:
    """Return what a pass of the model keeps; an error of the recipe where it cannot be traced."""
    lora = build_lora_config(recipe)
    try:
        return trace(config, lora, dtype, half, packed)
    except ValueError as error:
        key = "lora.target_modules" if lora else "model.name_or_path"
        raise recipe.error(key, f"{key}: {one_line(error)}") from None
    except Exception as error:  # of a class whose steps depend on the tokens' values
        what = f"no plan: a pass of {config.model_type} cannot be followed without its weights"
        hint = "train a few steps: run.json says what they needed (peak_memory_gib)"
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise recipe.error("model.name_or_path", f"{what} ({reason})", hint) from None


def launch_and_card(recipe: Recipe, gpu: str | None, **flags: Any) -> tuple[Launch, Card]:
    """Return the launch with `flags` (a card means no CPU launch), and the card that is meant."""
    if flags.get("accelerate") is None and gpu not in (None, "cpu"):
        flags["accelerate"] = _ON_GPUS.get(recipe.launch.accelerate)
        flags["gpus"] = flags.get("gpus") or recipe.launch.gpus
    launch = plan_launch(recipe.launch, **flags)
    if gpu == "cpu" or (gpu is None and launch.config.use_cpu):
        free = psutil.virtual_memory().available / GIB
        return launch, Card("cpu", free / launch.per_machine)
    if gpu or not torch.cuda.device_count():
        return launch, card_named(gpu or DEFAULT)
    device = torch.cuda.get_device_properties(0)
    return launch, card_named(device.name, device.total_memory / GIB)


def model_config(recipe: Recipe) -> Any:
    """Return the configuration of a recipe's model: a folder's, a known model's, or the Hub's."""
    name = recipe.model.name_or_path
    folder = local_folder(recipe)
    try:
        if folder is None:
            config = known_config(name)
            if config is not None:
                return config
        return AutoConfig.from_pretrained(folder or name, revision=recipe.model.revision)
    except OSError as error:
        raise explain_load_failure(recipe.model, error) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = one_line(error).partition(" Should contain ")[0]  # without all types that are known
        raise recipe.error("model.name_or_path", f"no plan: {why}") from None


def _measured_speed(recipe: Recipe, card: Card, launch: Launch) -> tuple[float, str] | None:
    """Return tokens per second, and whose they are, of the newest run that trained alike."""
    is_fsdp = launch.distributed_type == "FSDP"
    wanted = [card.name, launch.world_size, is_fsdp] + _decides_speed(recipe.to_dict())
    files = list(runs_root().glob("*/run.json"))
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        with suppress(RecipesError, LookupError, TypeError):  # not finished, or damaged
            state = object_or_none(file) or {}
            summary = state["summary"]
            device = card_named(summary["device"], card.memory_gib).name
            was_fsdp = state["guard"]["launch.distribution"] == "FSDP"
            values = _decides_speed(read(file.with_name(RECIPE_FILE)).values)
            if wanted == [device, summary["world_size"], was_fsdp] + values:
                source = f"measured by the run {file.parent.name}"
                return float(summary["tokens_per_second"]), source
    return None


def _decides_speed(values: Mapping[str, Any]) -> list[Any]:
    """Return what decides about a training's speed, of its recipe's values."""
    sections = [values.get(name) for name in ("model", "lora", "quantization")]
    return sections + [values["train"].get(key) for key in _SPEED_KEYS]
