"""What a recipe and its launch say about steps and batches, and how long the rows are."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes_lib.config.batch import accumulation_steps, planned_steps, sync_each_batch
from recipes_lib.config.launch import Launch
from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import MAX_LENGTH
from recipes_lib.data.files import count_rows
from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.rows import BadRows
from recipes_lib.data.sources import find_path, is_on_hub, listed_sources, source_files
from recipes_lib.data.splits import read_data
from recipes_lib.plan.trace import Precision

LARGEST_FILE = 20_000_000  # bytes; of larger data the first rows are read
SAMPLE = 2000  # rows
CHARACTERS_PER_TOKEN = 4
# of data that is not on this machine, where nobody says otherwise
ASSUMED_ROWS, ASSUMED_TOKENS = 15_000, 200
TYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Setup:
    """One training in numbers.

    Args:
        selective: whether checkpointing keeps what attention returned.
        flattened: whether a micro-batch is one row of examples end to end.
        masked: whether attention gets a mask of row x row.
        reshard: under FSDP2, whether gathered weights are freed after the forward pass.
        shares_each_batch: under FSDP2, whether gradients are exchanged after every backward pass.
    """

    precision: Precision
    full: bool
    optimizer: str
    checkpointing: bool
    selective: bool
    per_device: int
    accumulation: int
    max_length: int | None
    packing: bool
    flattened: bool
    masked: bool
    world_size: int
    per_machine: int
    sharded: bool
    reshard: bool
    shares_each_batch: bool
    on_cpu: bool

    @property
    def method(self) -> str:
        """The way to train, in a word."""
        if self.full:
            return "full"
        return {4: "QLoRA", 8: "LoRA on 8 bits"}.get(self.precision.bits or 0, "LoRA")


def setup_of(recipe: Recipe, launch: Launch, model_dtype: str | None, on_cpu: bool) -> Setup:
    """Return the setup of a recipe under a launch.

    Args:
        model_dtype: the checkpoint's own precision, for `model.dtype: auto`.

    Raises:
        RecipeError: the batch cannot be divided among the processes.
    """
    train, quantization = recipe.train, recipe.quantization or {}
    bits = 4 if quantization.get("load_in_4bit") else 8 if quantization else None
    half = "float16" if train.get("fp16") else "bfloat16" if train.get("bf16", True) else None
    dtype = next((name for name in (recipe.model.dtype, model_dtype) if name in TYPES), "bfloat16")
    nested = bool(quantization.get("bnb_4bit_use_double_quant"))
    per_device = int(train.get("per_device_train_batch_size", 8))
    attention, packing = recipe.model.attn_implementation or "sdpa", bool(train.get("packing"))
    flattened = packing or train.get("padding_free") is not False
    fsdp = launch.config.fsdp
    sharded = launch.distributed_type == "FSDP" and launch.world_size > 1
    return Setup(
        precision=Precision(str(dtype), half, bits, nested),
        full=recipe.lora is None,
        optimizer=str(train.get("optim", "adamw_torch_fused")),
        checkpointing=bool(
            train.get("activation_checkpointing", train.get("gradient_checkpointing"))
            or fsdp.get("fsdp_activation_checkpointing")
        ),
        selective=bool((train.get("activation_checkpointing_kwargs") or {}).get("selective")),
        per_device=per_device,
        accumulation=accumulation_steps(recipe, launch.world_size),
        max_length=train.get("max_length", MAX_LENGTH),
        packing=packing,
        flattened=flattened,
        # on a CPU, and by kernels that know where a row ends, each example is attended alone
        masked=not on_cpu and per_device > 1 and attention in ("sdpa", "eager"),
        world_size=launch.world_size,
        per_machine=launch.per_machine,
        sharded=sharded,
        reshard=bool(fsdp.get("fsdp_reshard_after_forward", True)),
        shares_each_batch=sync_each_batch(recipe),
        on_cpu=on_cpu,
    )


@dataclass(frozen=True)
class RowLengths:
    """The training rows.

    Args:
        tokens: of a sample of the rows, not cut to `max_length`.
        source: where the numbers come from, for the reader.
        counted: whether they are this data's own.
    """

    tokens: tuple[int, ...] = field(repr=False)
    train: int
    validation: int
    source: str
    counted: bool = True


def rows_of(recipe: Recipe, tokens_per_row: int | None = None) -> RowLengths:
    """Return the rows of a recipe: tokenised where data and tokenizer are here, else estimated from
    characters or assumed, which `source` says.

    Raises:
        RecipeError: a file or folder of the data is not here.
        DataError: the data are here and cannot be used.
    """
    section = recipe.data
    sources = listed_sources(section)
    for source in sources:
        if not is_on_hub(source) and find_path(source.source) is None:
            raise recipe.error("data.source", f"no such file or folder: {source.source}")
    split = section.split
    parts = (split.validation, split.test) if split.method != "none" else (0.0, 0.0)
    if any(find_path(source.source) is None for source in sources):
        assumed = tokens_per_row or ASSUMED_TOKENS
        rows = section.max_examples or ASSUMED_ROWS
        text = f"assumed: the data are not on this machine, {rows:,} rows of {assumed} tokens"
        return _parted((assumed,), rows, parts, text)
    files = [file for source in sources for file in source_files(source)]
    large = sum(file.stat().st_size for file in files) > LARGEST_FILE
    folder = local_folder(recipe)
    if not large and folder is not None and (folder / "tokenizer_config.json").is_file():
        from recipes_lib.weights.load import load_tokenizer

        data = prepare_data(recipe, load_tokenizer(recipe))
        tokens = tuple(len(ids) for ids in data.train[: 10 * SAMPLE]["input_ids"])
        validation = len(data.validation) if data.validation is not None else 0
        return RowLengths(
            tokens, len(data.train), validation, f"tokens of {len(data.train):,} rows"
        )
    read = read_data(section, BadRows(), max_rows=SAMPLE)
    lengths = [sum(map(len, row.texts)) // CHARACTERS_PER_TOKEN + 1 for row in read.rows[:SAMPLE]]
    total = min(sum(map(count_rows, files)), section.max_examples or 1 << 40)
    text = f"tokens estimated from the characters of {len(lengths):,} of about {total:,} rows"
    return _parted(tuple(lengths), total, parts, text)


def _parted(
    tokens: tuple[int, ...], rows: int, parts: tuple[float, float], text: str
) -> RowLengths:
    train, validation = round(rows * (1 - sum(parts))), round(rows * parts[0])
    return RowLengths(tokens, max(train, 1), validation, text, counted=False)


@dataclass(frozen=True)
class Steps:
    """How much a training computes.

    Args:
        tokens: of all steps, without padding; `computed` with it.
        largest: tokens of the largest micro-batch; `row` of its longest row.
        context: tokens of a typical row.
        validation: tokens of all validations.
    """

    steps: int
    per_epoch: int
    examples_per_step: int
    tokens: int
    computed: int
    largest: int
    row: int
    context: float
    validation: int


def steps_of(setup: Setup, rows: RowLengths, train: Mapping[str, Any]) -> Steps:
    """Return the steps of a training: whole global batches, as the training makes them."""
    cut = [min(length, setup.max_length or length) for length in rows.tokens]
    mean, number = sum(cut) / len(cut), rows.train
    longest = max(cut) if rows.counted else setup.max_length or max(cut)
    if setup.packing and setup.max_length:
        number = max(1, math.ceil(rows.train * mean / setup.max_length))
        mean = rows.train * mean / number
        longest = setup.max_length
    examples = setup.per_device * setup.accumulation * setup.world_size
    per_epoch, steps = planned_steps(
        number,
        per_device=setup.per_device,
        accumulation=setup.accumulation,
        world_size=setup.world_size,
        epochs=float(train.get("num_train_epochs", 3)),
        max_steps=int(train.get("max_steps", -1)),
    )
    # the last step of an epoch may have fewer examples than the others
    tokens = steps / per_epoch * min(per_epoch * examples, number) * mean
    padding = 1.0 if setup.flattened else _padding(cut, setup.per_device)
    context = sum(length * length for length in cut) / sum(cut)
    return Steps(
        steps=steps,
        per_epoch=per_epoch,
        examples_per_step=examples,
        tokens=round(tokens),
        computed=round(tokens * padding),
        largest=setup.per_device * longest,
        row=setup.per_device * longest if setup.flattened else longest,
        context=setup.max_length if setup.packing and setup.max_length else context,
        validation=round(validations(steps, per_epoch, train) * rows.validation * mean),
    )


def validations(steps: int, per_epoch: int, train: Mapping[str, Any]) -> int:
    """Return how often the validation set is read. Unset `eval_steps` are `logging_steps`, and
    those TRL's 10.
    """
    strategy = train.get("eval_strategy", "no")
    if strategy == "no":
        return 0
    written = float(train.get("eval_steps") or train.get("logging_steps") or 10)
    every = per_epoch if strategy == "epoch" else written * steps if written < 1 else written
    return math.floor(steps / max(every, 1)) + bool(train.get("eval_on_start"))


def _padding(lengths: list[int], size: int) -> float:
    """Return computed tokens over real ones where rows are padded to the longest of their batch."""
    pool = (lengths * math.ceil(4 * size / len(lengths))) if len(lengths) < 4 * size else lengths
    order = random.Random(0).sample(pool, len(pool))
    batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    return sum(size * max(batch) for batch in batches) / sum(map(sum, batches))
