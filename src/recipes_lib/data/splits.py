"""Which rows train, and which are held out for validation and test: by a hash of their texts, of
pairs by that of their prompts.
"""

import hashlib
import math
from collections.abc import Sequence

from recipes_lib.config.recipe import SplitSection
from recipes_lib.data.errors import SettingError
from recipes_lib.data.rows import DataRow

TRAIN = "train"
VALIDATION = "validation"
TEST = "test"


def split_rows(
    rows: Sequence[DataRow], section: SplitSection, least: int = 1
) -> dict[str, list[DataRow]]:
    """Return the rows of each split, in file order; `least` of them have to train."""
    sides = [TRAIN] * len(rows)
    if section.method == "published":  # two calls, as the original study's script
        from datasets import Dataset

        both = round(section.validation + section.test, 6)
        if not (section.validation and section.test and both < 1):
            raise SettingError("data.split", "published needs validation, test and training rows")
        numbers = Dataset.from_dict({"row": range(len(rows))})
        held_out = numbers.train_test_split(both, seed=section.seed)["test"]
        num_test = math.ceil(round(len(held_out) * section.test / both, 6))
        halves = held_out.train_test_split(num_test, seed=section.seed)
        for number in halves["train"]["row"]:
            sides[number] = VALIDATION
        for number in halves["test"]["row"]:
            sides[number] = TEST
    elif section.method == "hash":
        positions = [unit_interval(row.split_key.hex(), str(section.seed)) for row in rows]
        num_positions = len(set(positions))
        low = section.validation
        high = 1 - section.test
        # a small data set has a validation and a test row, too; equal texts have one position
        if low and num_positions > 1:
            low = max(low, math.nextafter(min(positions), 1))
        if section.test and num_positions > (2 if low else 1):
            high = min(high, max(positions))
        for number, position in enumerate(positions):
            if position < low:
                sides[number] = VALIDATION
            elif position >= high:
                sides[number] = TEST
    divided: dict[str, list[DataRow]] = {TRAIN: [], VALIDATION: [], TEST: []}
    for row, side in zip(rows, sides, strict=True):
        divided[side].append(row)
    left = len(divided[TRAIN])
    if left < least:
        what = f"{left} rows are left for training, of {len(rows)}; a step needs {least}"
        hint = "lower run.global_batch_size or data.split.validation; raise data.filters.max_tokens"
        raise SettingError("data.split", what, hint)
    return divided


def unit_interval(key: str, salt: str) -> float:
    """Return a number in [0, 1) that depends on the key and the salt alone."""
    digest = hashlib.sha256(f"{salt}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def first_in_hash_order(rows: Sequence[DataRow], limit: int | None, seed: int) -> list[DataRow]:
    """Return the `limit` rows that come first in hash order, in file order. The salt is not the
    split's, so that they fall on all sides.
    """
    if limit is None or len(rows) <= limit:
        return list(rows)
    positions = [unit_interval(row.content.hex(), f"order:{seed}") for row in rows]
    first = sorted(range(len(rows)), key=positions.__getitem__)[:limit]
    return [rows[number] for number in sorted(first)]
