"""What a training reads: its rows with their tokens, and the steps that they make."""

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
from datasets import Dataset
from trl.data_utils import pack_dataset

from recipes_lib.config.launch import planned_steps
from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import DPO, MAX_LENGTH, DataSection, Recipe, accumulation_steps
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import read_rows
from recipes_lib.core.project import project_root
from recipes_lib.data.encoding_pairs import pair_lengths
from recipes_lib.data.errors import BadRows, place
from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.reading import read_data
from recipes_lib.data.rows import PAIR, answer_row
from recipes_lib.data.sources import listed_sources, needs_hub
from recipes_lib.weights.load import load_tokenizer

CHARACTERS_PER_TOKEN = 4
# of data that is not on this machine
ASSUMED_ROWS = 15_000
ASSUMED_TOKENS = 200


@dataclass(frozen=True)
class RowLengths:
    """The training rows; of a pair, both of its rows, padded to the longer one, are one."""

    tokens: tuple[int, ...] = field(repr=False)  # of a sample of the rows, not cut to `max_length`
    train: int
    validation: int
    source: str  # where the numbers come from, for the reader
    counted: bool = False  # and not estimated
    assumed: bool = False  # their lengths, and so the tokens and the time
    number_known: bool = True


@dataclass(frozen=True, kw_only=True)
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
    reference: int = 0  # tokens that the base reads once before the first step


def rows_of(recipe: Recipe) -> RowLengths:
    """Return the rows, tokenised where data and tokenizer are on this machine, else estimated."""
    section = recipe.data
    folder = local_folder(recipe)
    is_assumed = needs_hub(section)
    number_known = True
    if is_assumed:
        number = known_rows(section)
        number_known = number is not None
        rows = number or ASSUMED_ROWS
        lengths = [ASSUMED_TOKENS * _rows_of_one(recipe)]
        text = f"{rows:,} rows of an assumed {ASSUMED_TOKENS}: the data are not on this machine"
        if not number_known:
            text = f"assumed {text}"
    elif folder is not None and (folder / "tokenizer_config.json").is_file():
        data = prepare_data(recipe, load_tokenizer(recipe))  # kept for the training
        if recipe.stage == DPO:
            lengths = pair_lengths(data.train)
        else:
            lengths = list(map(len, data.train["input_ids"]))
        return RowLengths(
            tokens=tuple(lengths),
            train=len(lengths),
            validation=len(data.validation or ()),
            source=f"counted in {len(lengths):,} rows",
            counted=True,
        )
    else:
        try:
            read = read_data(section, BadRows(), recipe.stage).rows
        except DataError as error:
            raise place(recipe, error) from None
        lengths = []
        for row in read:
            sides = [row]
            if recipe.stage == DPO:
                sides = [answer_row(row, name) for name in PAIR]
            sizes = [sum(map(len, side.texts)) // CHARACTERS_PER_TOKEN + 1 for side in sides]
            lengths.append(max(sizes) * len(sizes))
        rows = len(lengths)
        text = f"estimated from the characters of {rows:,} rows"
    validation = 0
    split = section.split
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


def _rows_of_one(recipe: Recipe) -> int:
    """Return how many rows of tokens a row of the data is."""
    return 2 if recipe.stage == DPO else 1


def known_rows(section: DataSection) -> int | None:
    """Return the number of rows of data on the Hub (recipes/datasets.jsonl); None if not known."""
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
    rows_of_one = _rows_of_one(recipe)
    max_length = train.get("max_length", MAX_LENGTH)
    if max_length:
        max_length *= rows_of_one
    packing = train.get("packing") and train.get("packing_strategy", "bfd")
    lengths = list(rows.tokens)
    if max_length and packing not in ("bfd_split", "wrapped"):  # these cut no row off
        lengths = [min(length, max_length) for length in lengths]
    number = rows.train
    mean = sum(lengths) / len(lengths)
    longest = max(lengths)
    if packing:
        # of rows that are not counted, as if every packed row were full
        number = math.ceil(rows.train * mean / max_length)
        if rows.counted:
            ends = [0, *itertools.accumulate(lengths)]
            ids = pyarrow.ListArray.from_arrays(ends, bytes(sum(lengths)))
            dataset = Dataset(pyarrow.table({"input_ids": ids}))
            number = len(pack_dataset(dataset, max_length, packing))  # as TRL packs the rows
        mean = rows.train * mean / number
        longest = max_length
    elif not rows.counted:  # the longest row may be outside the sample
        longest = max_length or longest

    per_device = int(train.get("per_device_train_batch_size", 8))
    accumulation = accumulation_steps(recipe, world_size)
    examples = per_device * accumulation * world_size
    epochs = float(train.get("num_train_epochs", 3))
    per_epoch, steps = planned_steps(number, examples, epochs, int(train.get("max_steps", -1)))
    largest = per_device * longest
    # rows without padding lie end to end in one row
    is_joined = packing or train.get("padding_free") is not False
    reference = 0
    if recipe.stage == DPO:
        is_joined = False
        reference = round((rows.train + rows.validation) * mean)

    validations = 0.0
    strategy = train.get("eval_strategy", "no")
    if strategy != "no":
        # transformers takes logging_steps for eval_steps, and TRL's default of these is 10
        every = float(train.get("eval_steps") or train.get("logging_steps") or 10)
        if strategy == "epoch":
            every = per_epoch
        elif every < 1:  # a share of the training
            every *= steps
        validations = steps // max(every, 1) + bool(train.get("eval_on_start"))
    return Steps(
        steps=steps,
        per_epoch=per_epoch,
        per_device=per_device,
        accumulation=accumulation,
        world_size=world_size,
        examples=examples,
        tokens=round(steps * examples * mean),
        largest=largest,
        row=largest if is_joined else longest // rows_of_one,
        validation=round(rows.validation * mean * validations),
        reference=reference,
    )
