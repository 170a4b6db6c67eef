"""Which rows train, which validate, which test; and what happens to duplicates.

The hash split looks at one example at a time (its explicit id, else its content): its side depends
on fractions and seed, not on the order of the file or on other rows.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from recipes_lib.config.sections import DataSection, SplitSection
from recipes_lib.data.examples import BadRows, Example, SettingError
from recipes_lib.data.rows import (
    Rows,
    filter_rows,
    first_in_hash_order,
    read_data,
    unit_interval,
)

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")


@dataclass
class Splits:
    """The rows of each split in file order, and what was found out about duplicates.

    Args:
        rows: split name -> positions of its rows.
        exact_groups: groups of ids with the same normalised content.
        across: those groups that reached more than one split before anything was moved.
        moved: ids that were moved into training for that reason.
        near_groups: groups of ids that differ only in case and white space.
    """

    rows: dict[str, list[int]]
    exact_groups: list[list[str]]
    across: list[list[str]]
    moved: list[str]
    near_groups: list[list[str]]


def split_rows(examples: Sequence[Example], section: SplitSection) -> Splits:
    """Divide the rows, and keep exact duplicates on one side.

    Duplicates with different ids that the hash split separates are moved into training. The
    published split only reports them: its sizes are part of what it repeats.

    Raises:
        SettingError: the fractions leave no training rows.
    """
    if section.method != "none" and section.validation + section.test >= 1:
        what = (
            f"validation {section.validation} + test {section.test} leaves no training rows; the"
            " sum must be below 1"
        )
        raise SettingError("data.split", what)
    groups = _groups([example.content for example in examples])
    sides = [TRAIN] * len(examples)
    if section.method == "published":
        _publish(sides, section)
    positions: list[float] = []
    if section.method == "hash":
        positions = [unit_interval(example.split_key, str(section.seed)) for example in examples]
        held_out = section.test + section.validation
        sides = [
            TEST if position < section.test else VALIDATION if position < held_out else TRAIN
            for position in positions
        ]
    across = [group for group in groups if len({sides[i] for i in group}) > 1]
    moved = []
    if section.method == "hash":
        for group in across:
            moved += [examples[i].id for i in group if sides[i] != TRAIN]
            for i in group:
                sides[i] = TRAIN
        _fill_empty(sides, positions, groups, section)
    divided = {name: [i for i, side in enumerate(sides) if side == name] for name in SPLITS}
    if not divided[TRAIN]:
        what = f"the split leaves 0 of {len(examples)} rows for training"
        hint = "lower data.split.validation and test, or use data.split.method none"
        raise SettingError("data.split", what, hint)

    def ids(groups: Iterable[Sequence[int]]) -> list[list[str]]:
        return [[examples[i].id for i in group] for group in groups]

    near = _groups([example.loose for example in examples])
    near = [group for group in near if len({examples[i].content for i in group}) > 1]
    return Splits(divided, ids(groups), ids(across), moved, ids(near))


class SplitPart(TypedDict):
    """One split in splits.json; `without_supervision` are the ids that nothing is learnt from."""

    count: int
    ids: list[str]
    without_supervision: list[str]


class SplitRecord(TypedDict):
    """splits.json; of the rows before those without supervised tokens are dropped."""

    method: str
    seed: int
    fractions: dict[str, float]
    train: SplitPart
    validation: SplitPart
    test: SplitPart
    duplicates_across: list[list[str]]
    duplicates_moved: list[str]


def training_rows(section: DataSection) -> Rows:
    """Return the usable rows that a training on this section learns from, without a tokenizer:
    those that `filters.max_tokens` leaves out are among them.

    Raises:
        DataError: a source is missing or damaged, or no row is left.
    """
    bad = BadRows()
    rows, _ = filter_rows(read_data(section, bad), section, bad)
    rows = rows.take(first_in_hash_order(rows.examples, section.max_examples, section.split.seed))
    return rows.take(split_rows(rows.examples, section.split).rows[TRAIN])


def recorded_rows(section: DataSection, splits: Mapping[str, Any], fingerprint: str) -> Rows | None:
    """Return the rows that a run was trained on, or None where they are not what is read now.

    Args:
        splits: the run's splits.json.
        fingerprint: of its data, as it was recorded.

    Raises:
        DataError: the data is not there, or damaged.
    """
    rows = read_data(section, BadRows())
    position = {example.id: index for index, example in enumerate(rows.examples)}
    try:
        parts = {name: [position[id] for id in splits[name]["ids"]] for name in SPLITS}
    except KeyError:
        return None
    same = fingerprint_of(rows, parts) == fingerprint
    return rows.take(list(dict.fromkeys(parts[TRAIN]))) if same else None


def fingerprint_of(rows: Rows, parts: Mapping[str, Sequence[int]]) -> str:
    """sha256 over split, id and content of all rows used, in order."""
    digest = hashlib.sha256()
    for name in SPLITS:
        for index in parts[name]:
            digest.update(f"{name}\t{rows[index].id}\t{rows[index].content.hex()}\n".encode())
    return digest.hexdigest()


def _fill_empty(
    sides: list[str],
    positions: Sequence[float],
    groups: Sequence[Sequence[int]],
    section: SplitSection,
) -> None:
    """Where no row is below a threshold, take the training row nearest to it."""
    repeated = {i for group in groups for i in group}
    for name, fraction in ((VALIDATION, section.validation), (TEST, section.test)):
        if fraction > 0 and name not in sides and len(sides) - len(repeated) + len(groups) > 2:
            alone = [i for i, side in enumerate(sides) if side == TRAIN and i not in repeated]
            if alone:
                sides[min(alone, key=positions.__getitem__)] = name


def _publish(sides: list[str], section: SplitSection) -> None:
    """Two calls of `train_test_split` with one seed: first validation and test together.

    Source: the training script of the original study.
    """
    import datasets

    held_out = section.validation + section.test
    if not held_out:
        return

    def part(rows: datasets.Dataset, fraction: float) -> datasets.DatasetDict:
        # a fraction of the rows is rounded up; a sum like 0.1 + 0.2 must not add a row to that
        size = math.ceil(round(len(rows) * fraction, 6))
        return rows.train_test_split(test_size=size, seed=section.seed)

    rows = datasets.Dataset.from_dict({"index": range(len(sides))})
    rest = part(rows, held_out)["test"]
    parts = {TEST if section.test else VALIDATION: rest}
    if section.test and section.validation:
        both = part(rest, section.test / held_out)
        parts = {VALIDATION: both["train"], TEST: both["test"]}
    for name, rows in parts.items():
        for index in rows["index"]:
            sides[index] = name


def _groups(keys: Sequence[bytes]) -> list[list[int]]:
    """Positions that share a key, in the order of the first of them."""
    groups: dict[bytes, list[int]] = {key: [] for key, n in Counter(keys).items() if n > 1}
    for index, key in enumerate(keys):
        if key in groups:
            groups[key].append(index)
    return list(groups.values())
