"""Which rows train, and which are held out for validation and test: by a hash of their texts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from recipes_lib.config.recipe import SplitSection
from recipes_lib.data.errors import SettingError
from recipes_lib.data.rows import DataRow

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")


def split_rows(
    rows: Sequence[DataRow], section: SplitSection, least: int = 1
) -> dict[str, list[DataRow]]:
    """Return the rows of each split, in file order; `least` of them have to train."""
    sides, both = [TRAIN] * len(rows), round(section.validation + section.test, 6)
    if section.method == "published":  # two calls, as the original study's script
        from datasets import Dataset

        if not (section.validation and section.test and both < 1):
            raise SettingError("data.split", "published needs validation, test and training rows")
        first = Dataset.from_dict({"row": range(len(rows))}).train_test_split(
            both, seed=section.seed
        )
        tested = math.ceil(round(len(first["test"]) * section.test / both, 6))
        second = first["test"].train_test_split(tested, seed=section.seed)
        for name, part in ((VALIDATION, second["train"]), (TEST, second["test"])):
            for number in part["row"]:
                sides[number] = name
    elif section.method == "hash":
        places = [unit_interval(row.content.hex(), str(section.seed)) for row in rows]
        low, high = section.validation, 1 - section.test
        if low and len({*places}) > 1:  # a small data set has a validation and a test row, too
            low = max(low, math.nextafter(min(places), 1))
        if section.test and len({*places}) > (2 if low else 1):
            high = min(high, max(places))
        sides = [VALIDATION if at < low else TEST if at >= high else TRAIN for at in places]
    divided: dict[str, list[DataRow]] = {name: [] for name in SPLITS}
    for row, side in zip(rows, sides, strict=True):
        divided[side].append(row)
    if (left := len(divided[TRAIN])) < least:
        what = f"{left} rows are left for training, of {len(rows)}; a step needs {least}"
        hint = "lower run.global_batch_size or data.split.validation; raise data.filters.max_tokens"
        raise SettingError("data.split", what, hint)
    return divided


def unit_interval(key: str, salt: str) -> float:
    """Return a number in [0, 1) that depends on the key and the salt alone.

    Example:
        >>> round(unit_interval("row-1", "42"), 3), round(unit_interval("row-1", "43"), 3)
        (0.501, 0.853)
    """
    return int.from_bytes(hashlib.sha256(f"{salt}:{key}".encode()).digest()[:8], "big") / 2**64


def first_in_hash_order(rows: Sequence[DataRow], limit: int | None, seed: int) -> list[DataRow]:
    """Return the `limit` rows that come first in hash order, in file order. The salt is not the
    split's, so that they fall on all sides.
    """
    if limit is None or len(rows) <= limit:
        return list(rows)
    places = [unit_interval(row.content.hex(), f"order:{seed}") for row in rows]
    first = sorted(range(len(rows)), key=places.__getitem__)[:limit]
    return [rows[index] for index in sorted(first)]
