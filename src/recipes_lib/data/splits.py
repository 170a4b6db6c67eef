"""Which rows train, which validate, which test; and what happens to duplicates.

The hash split looks at one example at a time (its explicit id, else its content), so the side an example falls on depends
neither on the order of the file, nor on the other rows, nor on anything else in the recipe than fractions and seed.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipes_lib.data.examples import Example, SettingError
from recipes_lib.recipe.sections import SplitSection

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")


@dataclass
class Splits:
    """The examples of each split in file order, and what was found out about duplicates.

    Args:
        rows: split name -> examples.
        exact_groups: groups of ids with the same normalised content.
        across: those groups that reached more than one split before anything was moved.
        moved: ids that were moved into training for that reason.
        near_groups: groups of ids that differ only in case and white space.
    """

    rows: dict[str, list[Example]]
    exact_groups: list[list[str]]
    across: list[list[str]]
    moved: list[str]
    near_groups: list[list[str]]


def unit_interval(key: str, salt: str) -> float:
    """A number in [0, 1) that depends on the key and the salt alone.

    Example:
        >>> 0 <= unit_interval("row-1", "42") < 1 and unit_interval("row-1", "42") == unit_interval("row-1", "42")
        True
    """
    return int.from_bytes(hashlib.sha256(f"{salt}:{key}".encode()).digest()[:8], "big") / 2**64


def first_in_hash_order(examples: Sequence[Example], limit: int | None, seed: int) -> list[Example]:
    """The `limit` examples that come first in hash order, returned in file order.

    The salt differs from the split's, so that the chosen rows fall on all sides.
    """
    if limit is None or len(examples) <= limit:
        return list(examples)
    order = sorted(range(len(examples)), key=lambda i: (unit_interval(examples[i].split_key, f"order:{seed}"), examples[i].id))
    return [examples[i] for i in sorted(order[:limit])]


def split_examples(examples: Sequence[Example], section: SplitSection) -> Splits:
    """Divide the examples, and keep exact duplicates on one side.

    Duplicates with different ids that the hash split separates are moved into training. The published split only reports them:
    its sizes are part of what it repeats.

    Raises:
        SettingError: the fractions leave no training rows.
    """
    if section.method != "none" and section.validation + section.test >= 1:
        what = f"validation {section.validation} + test {section.test} leaves no training rows; the sum must be below 1"
        raise SettingError("data.split", what)
    sides = {"hash": _by_hash, "published": _as_published, "none": lambda rows, _: [TRAIN] * len(rows)}[section.method](examples, section)
    groups = _groups(example.content for example in examples)
    across = [group for group in groups if len({sides[i] for i in group}) > 1]
    moved = []
    if section.method == "hash":
        for group in across:
            moved += [examples[i].id for i in group if sides[i] != TRAIN]
            for i in group:
                sides[i] = TRAIN
        _fill_empty(sides, examples, section)
    rows = {name: [example for example, side in zip(examples, sides, strict=True) if side == name] for name in SPLITS}
    if not rows[TRAIN]:
        hint = "lower data.split.validation and test, or use data.split.method none"
        raise SettingError("data.split", f"the split leaves 0 of {len(examples)} rows for training", hint)

    def ids(indices: Sequence[int]) -> list[str]:
        return [examples[i].id for i in indices]

    near = [group for group in _groups(map(_loose_key, examples)) if len({examples[i].content for i in group}) > 1]
    return Splits(rows, list(map(ids, groups)), list(map(ids, across)), moved, list(map(ids, near)))


def _by_hash(examples: Sequence[Example], section: SplitSection) -> list[str]:
    sides = []
    for example in examples:
        position = unit_interval(example.split_key, str(section.seed))
        sides.append(TEST if position < section.test else VALIDATION if position < section.test + section.validation else TRAIN)
    return sides


def _fill_empty(sides: list[str], examples: Sequence[Example], section: SplitSection) -> None:
    """A small data set may have no row below the threshold: then the training row nearest to it is taken."""
    for name, fraction in ((VALIDATION, section.validation), (TEST, section.test)):
        if fraction > 0 and name not in sides and len({example.content for example in examples}) > 2:
            content = Counter(example.content for example in examples)
            alone = [i for i, side in enumerate(sides) if side == TRAIN and content[examples[i].content] == 1]
            if alone:
                sides[min(alone, key=lambda i: unit_interval(examples[i].split_key, str(section.seed)))] = name


def _as_published(examples: Sequence[Example], section: SplitSection) -> list[str]:
    """Two calls of `train_test_split` with one seed: first validation and test together, then divided.

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
        both = rest.train_test_split(test_size=_rows_up(len(rest), section.test / held_out), seed=section.seed)
        parts = {VALIDATION: both["train"], TEST: both["test"]}
    for name, part in parts.items():
        for index in part["index"]:
            sides[index] = name
    return sides


def _rows_up(rows: int, fraction: float) -> int:
    """`train_test_split` rounds a fraction of the rows up; a sum like 0.1 + 0.2 must not add a row to that."""
    return math.ceil(round(rows * fraction, 6))


def _groups(keys: Any) -> list[list[int]]:
    """Positions that share a key, for keys that appear more than once."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        places[key].append(index)
    return [group for group in places.values() if len(group) > 1]


def _loose_key(example: Example) -> str:
    """Text as compared for near duplicates: no case, one space between words."""
    parts = []
    for name, value in example.fields.items():
        text = value if isinstance(value, str) else "\n".join(f"{m['role']}: {m['content']}" for m in value)
        parts.append(f"{name} {text}")
    return " ".join("\n".join(parts).casefold().split())
