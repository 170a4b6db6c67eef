"""How long the rows of a training are, and how many steps and tokens they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes_lib.config.launch import accumulation_steps, planned_steps
from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import MAX_LENGTH
from recipes_lib.core.errors import DataError
from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.rows import BadRows, place
from recipes_lib.data.sources import is_on_hub, listed_sources, read_data
from recipes_lib.weights.load import load_tokenizer

CHARACTERS_PER_TOKEN = 4
# of data that is not on this machine
ASSUMED_ROWS, ASSUMED_TOKENS = 15_000, 200


@dataclass(frozen=True)
class RowLengths:
    """The training rows."""

    tokens: tuple[int, ...] = field(repr=False)  # of a sample of the rows, not cut to `max_length`
    train: int
    validation: int
    source: str  # where the numbers come from, for the reader
    counted: bool = False  # and not estimated


def rows_of(recipe: Recipe) -> RowLengths:
    """Return the rows, tokenised where data and tokenizer are on this machine, else estimated."""
    section, folder = recipe.data, local_folder(recipe)
    if any(map(is_on_hub, listed_sources(section))):
        rows = section.max_examples or ASSUMED_ROWS
        lengths: tuple[int, ...] = (ASSUMED_TOKENS,)
        text = f"assumed: the data are not on this machine, {rows:,} rows of {ASSUMED_TOKENS}"
    elif folder is not None and (folder / "tokenizer_config.json").is_file():
        data = prepare_data(recipe, load_tokenizer(recipe))  # kept for the training
        lengths, validation = tuple(map(len, data.train["input_ids"])), len(data.validation or ())
        rows = len(lengths)
        return RowLengths(lengths, rows, validation, f"tokens of {rows:,} rows", counted=True)
    else:
        try:
            read = read_data(section, BadRows()).rows
        except DataError as error:
            raise place(recipe, error) from None
        lengths = tuple(sum(map(len, row.texts)) // CHARACTERS_PER_TOKEN + 1 for row in read)
        rows = min(len(lengths), section.max_examples or len(lengths))
        text = f"tokens estimated from the characters of {len(lengths):,} rows"
    validation = 0
    if section.split.method != "none":
        validation = round(rows * section.split.validation)
        rows = max(round(rows * (1 - section.split.validation - section.split.test)), 1)
    return RowLengths(lengths, rows, validation, text)


@dataclass(frozen=True)
class Steps:
    """How much a training computes."""

    steps: int
    per_epoch: int
    per_device: int
    accumulation: int
    world_size: int
    tokens: int  # of all steps, without padding
    largest: int  # tokens of the largest micro-batch
    row: int  # tokens of its longest row
    validation: int  # tokens of all validations

    @property
    def examples(self) -> int:
        """Examples of a step."""
        return self.per_device * self.accumulation * self.world_size


def steps_of(recipe: Recipe, world_size: int, rows: RowLengths) -> Steps:
    """Return the steps of a training: whole global batches, as the training makes them."""
    train = recipe.train
    max_length = train.get("max_length", MAX_LENGTH)
    lengths = [min(length, max_length or length) for length in rows.tokens]
    mean, number = sum(lengths) / len(lengths), rows.train
    longest = max(lengths) if rows.counted else max_length or max(lengths)
    packed = bool(train.get("packing")) and max_length
    if packed:
        number = max(1, math.ceil(rows.train * mean / max_length))
        mean, longest = rows.train * mean / number, max_length
    per_device = int(train.get("per_device_train_batch_size", 8))
    accumulation = accumulation_steps(recipe, world_size)
    per_epoch, steps = planned_steps(
        number,
        per_device=per_device,
        accumulation=accumulation,
        world_size=world_size,
        epochs=float(train.get("num_train_epochs", 3)),
        max_steps=int(train.get("max_steps", -1)),
    )
    # an epoch of fewer rows than a step takes has those alone
    in_epoch = min(per_epoch * per_device * accumulation * world_size, number)
    tokens = round(steps / per_epoch * in_epoch * mean)
    validation = round(validations(steps, per_epoch, train) * rows.validation * mean)
    largest = per_device * longest
    joined = bool(packed) or train.get("padding_free") is not False  # one row, end to end
    batch = (per_device, accumulation, world_size)
    row = largest if joined else longest
    return Steps(steps, per_epoch, *batch, tokens, largest, row, validation)


def validations(steps: int, per_epoch: int, train: Mapping[str, Any]) -> int:
    """Return how often the validation set is read."""
    strategy = train.get("eval_strategy", "no")
    if strategy == "no":
        return 0
    every = float(train.get("eval_steps") or train.get("logging_steps") or 10)  # TRL's own 10
    if strategy == "epoch":
        every = per_epoch
    elif every < 1:  # a share of all steps
        every *= steps
    return math.floor(steps / max(every, 1)) + bool(train.get("eval_on_start"))
