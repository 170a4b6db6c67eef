"""Which rows train, which validate, which test; and what happens to duplicates.

The hash split looks at one example at a time (its explicit id, else its content), so the side an
example falls on depends neither on the order of the file, nor on the other rows, nor on anything
else in the recipe than fractions and seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from recipes_lib.config.sections import SplitSection
from recipes_lib.data.examples import SettingError
from recipes_lib.data.rows import Rows, unit_interval

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


def split_rows(rows: Rows, section: SplitSection) -> Splits:
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
    sides = {
        "hash": _by_hash,
        "published": _as_published,
        "none": lambda rows, _: [TRAIN] * len(rows),
    }[section.method](rows, section)
    groups = _groups(rows.contents())
    across = [group for group in groups if len({sides[i] for i in group}) > 1]
    moved = []
    if section.method == "hash":
        for group in across:
            moved += [rows.ids[i] for i in group if sides[i] != TRAIN]
            for i in group:
                sides[i] = TRAIN
        _fill_empty(sides, rows, groups, section)
    divided: dict[str, list[int]] = {name: [] for name in SPLITS}
    for index, side in enumerate(sides):
        divided[side].append(index)
    if not divided[TRAIN]:
        hint = "lower data.split.validation and test, or use data.split.method none"
        raise SettingError(
            "data.split", f"the split leaves 0 of {len(rows)} rows for training", hint
        )

    def ids(indices: Sequence[int]) -> list[str]:
        return [rows.ids[i] for i in indices]

    near = [group for group in _groups(rows.looses()) if len({rows.content(i) for i in group}) > 1]
    return Splits(
        divided, list(map(ids, groups)), list(map(ids, across)), moved, list(map(ids, near))
    )


def _by_hash(rows: Rows, section: SplitSection) -> list[str]:
    sides = []
    for index in range(len(rows)):
        position = unit_interval(rows.split_key(index), str(section.seed))
        sides.append(
            TEST
            if position < section.test
            else VALIDATION
            if position < section.test + section.validation
            else TRAIN
        )
    return sides


def _fill_empty(
    sides: list[str], rows: Rows, groups: Sequence[Sequence[int]], section: SplitSection
) -> None:
    """A small data set may have no row below the threshold: then the training row nearest to it is
    taken.
    """
    repeated = {i for group in groups for i in group}
    for name, fraction in ((VALIDATION, section.validation), (TEST, section.test)):
        if fraction > 0 and name not in sides and len(rows) - len(repeated) + len(groups) > 2:
            alone = [i for i, side in enumerate(sides) if side == TRAIN and i not in repeated]
            if alone:
                sides[
                    min(alone, key=lambda i: unit_interval(rows.split_key(i), str(section.seed)))
                ] = name


def _as_published(examples: Rows, section: SplitSection) -> list[str]:
    """Two calls of `train_test_split` with one seed: first validation and test together, then
    divided.

    Source: the training script of the original study.
    """
    import datasets

    sides = [TRAIN] * len(examples)
    held_out = section.validation + section.test
    if not held_out:
        return sides
    rows = datasets.Dataset.from_dict({"index": range(len(examples))})
    rest = rows.train_test_split(test_size=_rows_up(len(rows), held_out), seed=section.seed)["test"]
    parts: dict[str, Any] = {VALIDATION: rest} if not section.test else {TEST: rest}
    if section.test and section.validation:
        both = rest.train_test_split(
            test_size=_rows_up(len(rest), section.test / held_out), seed=section.seed
        )
        parts = {VALIDATION: both["train"], TEST: both["test"]}
    for name, part in parts.items():
        for index in part["index"]:
            sides[index] = name
    return sides


def _rows_up(rows: int, fraction: float) -> int:
    """`train_test_split` rounds a fraction of the rows up; a sum like 0.1 + 0.2 must not add a row
    to that.
    """
    return math.ceil(round(rows * fraction, 6))


def _groups(keys: Iterable[bytes]) -> list[list[int]]:
    """Positions that share a key, for keys that appear more than once, in the order of their first
    positions.
    """
    first: dict[bytes, int] = {}
    groups: dict[int, list[int]] = {}
    for index, key in enumerate(keys):
        if (earlier := first.setdefault(key, index)) != index:
            groups.setdefault(earlier, [earlier]).append(index)
    return [groups[index] for index in sorted(groups)]
