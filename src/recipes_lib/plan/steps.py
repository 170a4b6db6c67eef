"""How long the rows of a training are, and how many steps and tokens they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes_lib.config.batch import accumulation_steps, planned_steps
from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import MAX_LENGTH
from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.rows import BadRows
from recipes_lib.data.sources import count_rows, find_path, is_on_hub, listed_sources, source_files
from recipes_lib.data.splits import read_data
from recipes_lib.weights.load import load_tokenizer

LARGEST_FILE = 20_000_000  # bytes; of larger data the first rows are read
SAMPLE = 2000  # rows
CHARACTERS_PER_TOKEN = 4
# of data that is not on this machine, where nobody says otherwise
ASSUMED_ROWS, ASSUMED_TOKENS = 15_000, 200


@dataclass(frozen=True)
class RowLengths:
    """The training rows.

    Args:
        tokens: of a sample of the rows, not cut to `max_length`.
        source: where the numbers come from, for the reader.
        counted: whether the tokens are counted and not estimated.
    """

    tokens: tuple[int, ...] = field(repr=False)
    train: int
    validation: int
    source: str
    counted: bool = False


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
    local = all(find_path(source.source) is not None for source in sources)
    files = [file for source in sources if local for file in source_files(source)]
    small = sum(file.stat().st_size for file in files) <= LARGEST_FILE
    folder = local_folder(recipe)
    if local and small and folder is not None and (folder / "tokenizer_config.json").is_file():
        data = prepare_data(recipe, load_tokenizer(recipe))
        lengths = tuple(map(len, data.train[: 10 * SAMPLE]["input_ids"]))
        validation = len(data.validation) if data.validation is not None else 0
        rows = len(data.train)
        return RowLengths(lengths, rows, validation, f"tokens of {rows:,} rows", counted=True)
    if local:
        read = read_data(section, BadRows(), max_rows=SAMPLE).rows[:SAMPLE]
        lengths = tuple(sum(map(len, row.texts)) // CHARACTERS_PER_TOKEN + 1 for row in read)
        rows = min(sum(map(count_rows, files)), section.max_examples or 1 << 40)
        text = f"tokens estimated from the characters of {len(read):,} of about {rows:,} rows"
    else:
        lengths = (tokens_per_row or ASSUMED_TOKENS,)
        rows = section.max_examples or ASSUMED_ROWS
        text = f"assumed: the data are not on this machine, {rows:,} rows of {lengths[0]} tokens"
    split = section.split
    held_out = (split.validation, split.test) if split.method != "none" else (0.0, 0.0)
    train = max(round(rows * (1 - sum(held_out))), 1)
    return RowLengths(lengths, train, round(rows * held_out[0]), text)


@dataclass(frozen=True)
class Steps:
    """How much a training computes.

    Args:
        tokens: of all steps, without padding; `computed` with it.
        largest: tokens of the largest micro-batch; `row` of its longest row.
        joined: whether a micro-batch is one row of examples end to end.
        validation: tokens of all validations.
    """

    steps: int
    per_epoch: int
    per_device: int
    accumulation: int
    world_size: int
    tokens: int
    computed: int
    largest: int
    row: int
    joined: bool
    validation: int

    @property
    def examples(self) -> int:
        """Examples of a step."""
        return self.per_device * self.accumulation * self.world_size


def steps_of(recipe: Recipe, world_size: int, rows: RowLengths) -> Steps:
    """Return the steps of a training: whole global batches, as the training makes them.

    Raises:
        RecipeError: the batch cannot be divided among the processes.
    """
    train = recipe.train
    max_length = train.get("max_length", MAX_LENGTH)
    cut = [min(length, max_length or length) for length in rows.tokens]
    mean, number = sum(cut) / len(cut), rows.train
    longest = max(cut) if rows.counted else max_length or max(cut)
    if train.get("packing") and max_length:
        number = max(1, math.ceil(rows.train * mean / max_length))
        mean, longest = rows.train * mean / number, max_length
    shape = {
        "per_device": int(train.get("per_device_train_batch_size", 8)),
        "accumulation": accumulation_steps(recipe, world_size),
        "world_size": world_size,
    }
    examples, per_device = math.prod(shape.values()), shape["per_device"]
    epochs, most = float(train.get("num_train_epochs", 3)), int(train.get("max_steps", -1))
    per_epoch, steps = planned_steps(number, **shape, epochs=epochs, max_steps=most)
    # where there are fewer rows than a step takes
    tokens = steps / per_epoch * min(per_epoch * examples, number) * mean
    joined = bool(train.get("packing")) or train.get("padding_free") is not False
    padding = 1.0
    if not joined:  # each row is as long as the longest of its micro-batch
        batches = [cut[at : at + per_device] for at in range(0, len(cut), per_device)]
        padding = sum(len(batch) * max(batch) for batch in batches) / sum(cut)
    return Steps(
        steps=steps,
        per_epoch=per_epoch,
        **shape,
        tokens=round(tokens),
        computed=round(tokens * padding),
        largest=per_device * longest,
        row=per_device * longest if joined else longest,
        joined=joined,
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
