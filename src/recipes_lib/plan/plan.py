"""The plan of one recipe on one kind of card: rows, steps, memory and time; and what to change."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import torch
from datasets import Dataset
from transformers import AutoConfig
from trl.data_utils import pack_dataset

from recipes_lib.config.documents import read
from recipes_lib.config.launch import Launch, plan_launch, planned_steps
from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import (
    MAX_LENGTH,
    RECIPE_FILE,
    DataSection,
    Recipe,
    accumulation_steps,
    load_recipe,
    sync_each_batch,
)
from recipes_lib.config.upstream import build_lora_config
from recipes_lib.core.errors import DataError, RecipesError, one_line
from recipes_lib.core.files import object_or_none, read_rows
from recipes_lib.core.project import project_root, runs_root
from recipes_lib.core.terminal import aligned, shown_duration
from recipes_lib.data.errors import BadRows, place
from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.reading import read_data
from recipes_lib.data.sources import listed_sources, needs_hub
from recipes_lib.models.families import known_config
from recipes_lib.plan.cards import DEFAULT, Card, card_named
from recipes_lib.plan.trace import Trace, trace
from recipes_lib.weights.load import explain_load_failure, load_tokenizer

# Assumed shares of a card's peak (MFU). LoRA: a published bf16 LoRA of Llama-3-8B on an H100 runs
# at 12,473 tokens/s, 40% of its peak with 4N operations. The others: nobody has measured them here.
MFU = {"LoRA": 0.40, "full": 0.40, "QLoRA": 0.25, "LoRA on 8 bits": 0.15}
AROUND_S = 120.0  # start, loading and saving, assumed
GIB = 2**30
CONTEXT_GIB, NCCL_GIB, GAPS = 0.6, 0.5, 0.05
# Python with torch, transformers and datasets beside the model: 0.6 to 0.9 in three runs
CPU_PROCESS_GIB = 0.8
TILE = 128  # tokens of the loss whose logits are there at once
# Bytes of a 4-bit weight: the scale of each block of 64 is a float32, or with double quantization a
# byte and a float32 for 256 scales.
NF4, NF4_NESTED = 0.5 + 4 / 64, 0.5 + (1 + 4 / 256) / 64
CHARACTERS_PER_TOKEN = 4
ASSUMED_ROWS, ASSUMED_TOKENS = 15_000, 200  # of data that is not on this machine
# bytes of an optimizer's state for each trained weight, by its name in `train.optim`; else AdamW's
OPTIMIZERS = {"ademamix_8bit": 3.1, "ademamix": 12, "lion_8bit": 1.1, "lion": 4, "8bit": 2.1}
OPTIMIZERS |= {"rmsprop": 4, "adagrad": 4, "paged": 8, "bnb": 8, "sgd": 0.1, "adafactor": 0.1}
FOUR_BITS = [
    "quantization.load_in_4bit=true",
    "quantization.bnb_4bit_quant_type=nf4",
    "quantization.bnb_4bit_use_double_quant=true",
    "quantization.bnb_4bit_compute_dtype=bfloat16",
    "quantization.bnb_4bit_quant_storage=bfloat16",  # FSDP2 shares out no other
]
_ON_GPUS = {"cpu": "single_gpu", "ddp_cpu": "ddp", "fsdp_cpu": "fsdp"}
_SPEED_KEYS = ["bf16", "fp16", "activation_checkpointing", "packing", "padding_free"]
_SPEED_KEYS += ["per_device_train_batch_size", "torch_compile"]


@dataclass(frozen=True)
class RowLengths:
    """The training rows."""

    tokens: tuple[int, ...] = field(repr=False)  # of a sample of the rows, not cut to `max_length`
    train: int
    validation: int
    source: str  # where the numbers come from, for the reader
    counted: bool = False  # and not estimated
    assumed: bool = False  # their lengths, and so the tokens and the time
    number_known: bool = True


@dataclass(frozen=True)
class Steps:
    """How much a training computes."""

    steps: int
    per_epoch: int
    per_device: int
    accumulation: int
    world_size: int
    examples: int  # of a step
    tokens: int  # of all steps, without padding
    largest: int  # tokens of the largest micro-batch
    row: int  # tokens of its longest row
    validation: int  # tokens of all validations


@dataclass(frozen=True)
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
        return _memory(self)

    @property
    def load_peak(self) -> float:
        """GiB while the base is loaded: bitsandbytes makes a quantized one whole on every card, and
        FSDP2 takes its shards of that (accelerate 1.15, fsdp_utils.py: `fsdp2_prepare_model`).
        """
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
    train, quantization, lora = recipe.train, recipe.quantization or {}, build_lora_config(recipe)

    # the model: its types, and what a pass keeps
    config, dtype = model_config(recipe), str(recipe.model.dtype)
    if dtype == "auto":
        own = str(getattr(config.get_text_config(), "dtype", "")).removeprefix("torch.")
        dtype = own if own in ("float32", "float16") else "bfloat16"
    half = "float16" if train.get("fp16") else "bfloat16" if train.get("bf16", True) else None
    method, packed = "LoRA" if lora else "full", None
    if quantization.get("load_in_4bit"):
        nested = quantization.get("bnb_4bit_use_double_quant")
        method, packed = "QLoRA", NF4_NESTED if nested else NF4
    elif quantization:
        method, packed = "LoRA on 8 bits", 1.0
    try:
        traced = trace(config, lora, dtype, half, packed)
    except ValueError as error:
        key = "lora.target_modules" if lora else "model.name_or_path"
        raise recipe.error(key, f"{key}: {one_line(error)}") from None
    except Exception as error:  # of a class whose steps depend on the tokens' values
        what = f"no plan: a pass of {config.model_type} cannot be followed without its weights"
        hint = "train a few steps: run.json says what they needed (peak_memory_gib)"
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise recipe.error("model.name_or_path", f"{what} ({reason})", hint) from None
    width = getattr(torch, half or dtype).itemsize

    # the rows and the speed
    rows = rows or rows_of(recipe)
    steps = steps_of(recipe, launch.world_size, rows)
    asked = train.get("activation_checkpointing", train.get("gradient_checkpointing"))
    again = bool(asked or launch.config.fsdp_config.get("fsdp_activation_checkpointing"))
    speed, source = _measured_speed(recipe, card, launch) or (None, "not known for this card")
    if speed is None and card.tflops is not None:
        operations = ((4 if lora else 6) + (2 if again else 0)) * traced.active
        speed = card.tflops * 1e12 * MFU[method] * launch.world_size / operations
        source = f"at an assumed {MFU[method]:.0%} of the card's peak (MFU)"
    work = steps.tokens + steps.validation / (2 if lora else 3)  # without a backward pass
    seconds = work / speed + AROUND_S + traced.weight_bytes / GIB if speed else None
    of_run = (rows, traced, steps, speed, source, seconds)
    return Plan(recipe, launch, card, method, width, again, *of_run)


def _memory(plan: Plan) -> dict[str, float]:
    recipe, launch, traced, steps = plan.recipe, plan.launch, plan.trace, plan.steps
    full, sharded, width = recipe.lora is None, launch.distributed_type == "FSDP", plan.width
    shards = launch.world_size if sharded else 1

    # weights and what is kept for each
    trained, base = traced.trained_bytes, traced.weight_bytes
    if full:
        base -= trained
        if sharded:
            trained = 4 * traced.trained  # FSDP2 keeps them in float32 for autocast
    name = str(recipe.train.get("optim", ""))
    known = (of_each for word, of_each in OPTIMIZERS.items() if word in name)
    optimizer = next(known, 2 * trained / traced.trained) * traced.trained
    if full and "8bit" in name:  # bitsandbytes keeps that of embeddings in float32
        optimizer *= 1 + 2.8 * traced.vocabulary * traced.hidden / traced.trained
    gradients = trained / shards
    if sharded and steps.accumulation > 1 and not sync_each_batch(recipe):
        gradients = 4 * traced.trained  # whole until the step's last backward pass
    elif launch.world_size > 1 and not sharded:
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
    # each block keeps a mask of sdpa; on a CPU, with an example at a time, those with a window
    on_cpu = plan.card.name == "cpu"
    is_masked = steps.per_device > 1 or bool(recipe.train.get("packing"))
    masked = traced.windows if on_cpu else traced.layers * is_masked
    if masked and (recipe.model.attn_implementation or "sdpa") in ("sdpa", "eager"):
        kept, block = kept + masked * steps.row * width, block + steps.row * width
    activations = tokens * kept + traced.constant
    at_work = tokens * (4.0 + 2 * width) * traced.hidden
    if plan.checkpointing:
        activations = tokens * traced.checkpointed
        at_work += tokens * block + traced.constant / traced.layers
    # a tile of logits with its gradient; in float32 the gradients of the head's input and of it
    logits = TILE * traced.vocabulary * (width + 8) + 4 * tokens * traced.hidden
    logits += 4 * traced.vocabulary * traced.hidden * (full and not sharded)
    memory = {
        "weights": base / shards / GIB,
        "trained": trained / shards / GIB,
        "gradients": gradients / GIB,
        "optimizer": optimizer / shards / GIB,
        "gathered": gathered / GIB,
        "activations": activations / GIB,
        "temporary": max(logits, at_work) / GIB,
    }
    context = CONTEXT_GIB + NCCL_GIB * (launch.world_size > 1) + GAPS * sum(memory.values())
    return memory | {"context": CPU_PROCESS_GIB if on_cpu else context}


# ---- rows and steps ----


def rows_of(recipe: Recipe) -> RowLengths:
    """Return the rows, tokenised where data and tokenizer are on this machine, else estimated."""
    section, folder = recipe.data, local_folder(recipe)
    is_assumed, number_known = needs_hub(section), True
    if is_assumed:
        known = known_rows(section)
        number_known = known is not None
        rows, lengths = known or ASSUMED_ROWS, [ASSUMED_TOKENS]
        text = f"{rows:,} rows of an assumed {ASSUMED_TOKENS}: the data are not on this machine"
        if not number_known:
            text = f"assumed {text}"
    elif folder is not None and (folder / "tokenizer_config.json").is_file():
        data = prepare_data(recipe, load_tokenizer(recipe))  # kept for the training
        lengths = [*map(len, data.train["input_ids"])]
        text, validation = f"counted in {len(lengths):,} rows", len(data.validation or ())
        return RowLengths(tuple(lengths), len(lengths), validation, text, counted=True)
    else:
        try:
            texts = [row.texts for row in read_data(section, BadRows()).rows]
        except DataError as error:
            raise place(recipe, error) from None
        lengths = [sum(map(len, parts)) // CHARACTERS_PER_TOKEN + 1 for parts in texts]
        rows = len(lengths)
        text = f"estimated from the characters of {rows:,} rows"
    validation, split = 0, section.split
    if split.method != "none":
        validation = round(rows * split.validation)
        rows = max(round(rows * (1 - split.validation - split.test)), 1)
    return RowLengths(
        tokens=tuple(lengths),
        train=rows,
        validation=validation,
        source=text,
        assumed=is_assumed,
        number_known=number_known,
    )


def known_rows(section: DataSection) -> int | None:
    """Return the number of rows of data on the Hub, from `recipes/datasets.jsonl`, cut off at
    `max_examples`; None where it is not known.
    """
    numbers: dict[tuple[str, str], int] = {}
    for folder in (project_root() / "recipes", Path("recipes")):
        for row in read_rows(folder / "datasets.jsonl"):
            numbers[row["source"], row["split"]] = row["rows"]
    total = 0.0
    for part in listed_sources(section):
        number = numbers.get((part.source, str(part.source_split)))
        if number is None or part.subset is not None:
            return section.max_examples
        total += min(number, part.max_examples or number) * part.weight
    return round(min(total, section.max_examples or total))


def steps_of(recipe: Recipe, world_size: int, rows: RowLengths) -> Steps:
    """Return the steps of a training: whole global batches, as the training makes them."""
    train = recipe.train
    max_length = train.get("max_length", MAX_LENGTH)
    packing = train.get("packing") and train.get("packing_strategy", "bfd")
    limit = None if packing in ("bfd_split", "wrapped") else max_length  # else rows are cut
    lengths = [min(length, limit or length) for length in rows.tokens]
    mean, number = sum(lengths) / len(lengths), rows.train
    longest = max(lengths) if rows.counted else max_length or max(lengths)
    if packing:
        number = math.ceil(rows.train * mean / max_length)
        number = _num_packed(lengths, max_length, packing) if rows.counted else number
        mean, longest = rows.train * mean / number, max_length
    per_device = int(train.get("per_device_train_batch_size", 8))
    batch = (per_device, accumulation_steps(recipe, world_size), world_size)
    epochs, max_steps = float(train.get("num_train_epochs", 3)), int(train.get("max_steps", -1))
    per_epoch, steps = planned_steps(number, math.prod(batch), epochs, max_steps)
    strategy = train.get("eval_strategy", "no")
    every = float(train.get("eval_steps") or train.get("logging_steps") or 10)  # TRL's own 10
    every = per_epoch if strategy == "epoch" else every * steps if every < 1 else every
    validations = steps // max(every, 1) + bool(train.get("eval_on_start"))
    largest = per_device * longest
    joined = packing or train.get("padding_free") is not False  # one row, end to end
    return Steps(
        steps,
        per_epoch,
        *batch,
        math.prod(batch),
        tokens=round(steps * math.prod(batch) * mean),
        largest=largest,
        row=largest if joined else longest,
        validation=round(rows.validation * mean * validations) if strategy != "no" else 0,
    )


def _num_packed(lengths: Sequence[int], size: int, strategy: str) -> int:
    ids = pyarrow.ListArray.from_arrays([0, *itertools.accumulate(lengths)], bytes(sum(lengths)))
    return len(pack_dataset(Dataset(pyarrow.table({"input_ids": ids})), size, strategy))


# ---- what is planned for ----


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
    name, folder = recipe.model.name_or_path, local_folder(recipe)
    try:
        if folder is None and (known := known_config(name)) is not None:
            return known
        return AutoConfig.from_pretrained(folder or name, revision=recipe.model.revision)
    except OSError as error:
        raise explain_load_failure(recipe.model, error) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = one_line(error).partition(" Should contain ")[0]  # without all types that are known
        raise recipe.error("model.name_or_path", f"no plan: {why}") from None


def _measured_speed(recipe: Recipe, card: Card, launch: Launch) -> tuple[float | None, str] | None:
    """Return tokens per second, and whose they are, of the newest run that trained alike."""
    is_fsdp, files = launch.distributed_type == "FSDP", runs_root().glob("*/run.json")
    asked = [card.name, launch.world_size, is_fsdp, *_decides_speed(recipe.to_dict())]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        with suppress(RecipesError, LookupError, TypeError):  # not finished, or damaged
            state = object_or_none(file) or {}
            summary, kind = state["summary"], state["guard"]["launch.distribution"]
            device = card_named(summary["device"], card.memory_gib).name
            own = _decides_speed(read(file.with_name(RECIPE_FILE)).values)
            if asked == [device, summary["world_size"], kind == "FSDP", *own]:
                speed = float(summary["tokens_per_second"])
                return speed, f"measured by the run {file.parent.name}"
    return None


def _decides_speed(values: Mapping[str, Any]) -> list[Any]:
    """Return what decides about a training's speed, of its recipe's values."""
    sections = [values.get(name) for name in ("model", "lora", "quantization")]
    return sections + [values["train"].get(key) for key in _SPEED_KEYS]


# ---- what to change, and what is said ----

Advice = tuple[str, str, Plan]  # words to type, why, and the plan with them


def changed_plans(plan: Plan, overrides: Sequence[str] = ()) -> Iterator[Advice]:
    """Yield every change that can be trained, smallest first."""
    for words, why in _ways(plan):
        try:
            recipe = load_recipe(plan.recipe.path, [*overrides, *words])
            launches = any(word.startswith("launch.") for word in words)
            launch = plan_launch(recipe.launch) if launches else plan.launch
            yield shlex.join(words), why, plan_of(recipe, launch, plan.card, plan.rows)
        except RecipesError:
            continue


def _ways(plan: Plan) -> Iterator[tuple[list[str], str]]:
    """Yield words that change a recipe but no step's examples, smallest change first, and why."""
    recipe, steps, world_size = plan.recipe, plan.steps, plan.launch.world_size

    def batch(size: int, processes: int) -> list[str]:
        words = [f"train.per_device_train_batch_size={size}"]
        if recipe.run.global_batch_size is None:
            accumulation = steps.examples // (size * processes)
            words.append(f"train.gradient_accumulation_steps={accumulation}")
        return words

    smaller = [
        size for size in (4, 2, 1) if size < steps.per_device and steps.per_device % size == 0
    ]
    if plan.fits and plan.checkpointing:
        off = "train.activation_checkpointing=false"
        yield [off], "activations fit without computing every block twice"
        for size in smaller:
            words = [off, *batch(size, world_size)]
            yield words, "activations of fewer examples fit without computing every block twice"
    for size in smaller:
        yield batch(size, world_size), "smaller micro-batches of the same step"
    again = [] if plan.checkpointing else ["train.activation_checkpointing=true"]
    if again:
        words = [*again, *batch(1, world_size)]
        yield words, "stores only the blocks' inputs and computes each block twice"
    if plan.launch.distributed_type == "MULTI_GPU" and plan.card.name != "cpu":
        for size in (steps.per_device, *smaller):
            words = [*_sharded_alike(plan.launch), *batch(size, world_size)]
            yield words, f"weights and optimizer sharded over the same {world_size} GPUs"
    again = [] if plan.fits else again
    for count in (2, 4, 8) if plan.card.name != "cpu" else ():
        if count > world_size and steps.examples % count == 0:
            size = math.gcd(steps.per_device, steps.examples // count) if plan.fits else 1
            words = ["launch.accelerate=fsdp", f"launch.gpus={count}", *batch(size, count), *again]
            yield words, f"weights and optimizer sharded over {count} GPUs"
    if recipe.lora is not None and recipe.quantization is None:
        words = [*FOUR_BITS, *again, *([] if plan.fits else batch(1, world_size))]
        yield words, "QLoRA, the base in 4 bits; a different experiment"


def _sharded_alike(launch: Launch) -> list[str]:
    """Return the words that shard a model over the GPUs of a launch with DDP."""
    words = ["launch.accelerate=fsdp", f"launch.gpus={launch.per_machine}"]
    if launch.machines > 1:
        words = ["launch.accelerate=fsdp_multi_node", *words[1:], f"launch.nodes={launch.machines}"]
    return words


def advise(plan: Plan, overrides: Sequence[str] = ()) -> Advice | None:
    """Return the first change that fits; for what fits, only to keep activations."""
    if plan.fits and not plan.checkpointing:
        return None
    for change in changed_plans(plan, overrides):
        made = change[2]
        if plan.fits and made.checkpointing:
            continue
        if made.fits and made.memory != plan.memory:
            return change
    return None


def table(plan: Plan, overrides: Sequence[str] = ()) -> list[str]:
    """Return what every change does, a line for each."""
    time = "time of 1,000 rows" if plan.rows.assumed else "time"
    lines = [("GiB", "fits", time, "change")]
    for words, why, made in changed_plans(plan, overrides):
        time = "-" if made.seconds is None else shown_duration(made.seconds)
        if made.rows.assumed and made.seconds_per_1000_rows:
            time = shown_duration(made.seconds_per_1000_rows)
        fits = "yes" if made.fits else "no"
        lines.append((f"{made.needed:.1f}", fits, time, f"{words}  ({why})"))
    return aligned(lines)


def rows_shown(plan: Plan, advice: Advice | None) -> list[tuple[str, str, dict[str, Any]]]:
    """Return label, text (empty: not shown) and the values for `--json` of at most 15 rows."""
    steps, traced, card, name = plan.steps, plan.trace, plan.card, plan.recipe.model.name_or_path
    kind = {"NO": "one process", "FSDP": "FSDP2"}.get(plan.launch.distributed_type, "DDP")
    training = f"{plan.recipe.name}: {plan.method} on {steps.world_size} x {card.name}, {kind}"
    batch = f"{steps.per_device} per device x {steps.accumulation} x {steps.world_size}"
    number = f"{steps.steps:,} of {steps.examples} examples ({batch})"
    if not plan.steps_known:
        per_1000 = 1000 / steps.examples
        number = f"{per_1000:,.1f} per 1,000 rows, of {steps.examples} examples ({batch})"
    parts = ", ".join(f"{part} {size:.1f}" for part, size in plan.memory.items() if size >= 0.05)
    memory = {
        "memory_gib": plan.memory,
        "peak_gib": plan.needed - plan.memory["context"],
        "needed_gib": plan.needed,
    }
    room, source = f"the card has {card.memory_gib:.1f} GiB", plan.speed_source
    if card.name == "cpu":
        room = f"{card.memory_gib:.1f} GiB of this machine's memory are free for each process"
    time, seconds = (
        "not estimated: no run here measured it, and this device's peak is unknown",
        None,
    )
    if plan.seconds is not None and plan.rows.assumed:
        of_1000 = shown_duration(plan.seconds_per_1000_rows or 0.0)
        time = f"about {of_1000} per 1,000 rows of {ASSUMED_TOKENS} tokens (assumed); "
    elif plan.seconds is not None:
        seconds = plan.seconds
        time = f"about {shown_duration(seconds)}; "
    if plan.seconds is not None:
        time += f"{plan.speed:,.0f} tokens/s, {source}"
    speed = {"tokens_per_second": plan.speed, "speed": source, "seconds": seconds}
    speed |= {"seconds_per_1000_rows": plan.seconds_per_1000_rows}
    tokens = plan.rows.source if plan.rows.assumed else f"{steps.tokens:,} ({plan.rows.source})"
    loading = ""
    if plan.load_peak > sum(plan.memory.values()):
        loading = f"loading: {plan.load_peak:.1f} GiB, the whole base in 4 bits on every card first"
    change = "" if plan.fits else "no known change of this recipe makes it fit: use more memory"
    if advice is not None:
        words, why, other = advice
        change = f"{words}  ({why}; {other.needed:.1f} GiB)"
    of_card = {"method": plan.method, "card": card.name, "card_gib": card.memory_gib}
    text = f"{name}, {traced.parameters:,} parameters, {traced.trained:,} trained"
    return [
        ("training", training, of_card),
        ("model", text, {"model": name, **asdict(traced)}),
        ("steps", number, asdict(steps) | ({} if plan.steps_known else {"steps": None})),
        ("tokens", tokens, {"rows": plan.rows.source}),
        ("memory", f"{plan.needed:.1f} GiB: {parts}", memory),
        ("", loading, {"load_peak_gib": plan.load_peak}),
        ("", "an upper estimate: layers with a state" if traced.carries_state else "", {}),
        ("fits" if plan.fits else "DOES NOT FIT", room, {"fits": plan.fits}),
        ("time", time, speed),
        ("try", change, {"advice": advice and advice[0]}),
    ]
