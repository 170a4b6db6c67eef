"""The rows of a recipe: read from all its sources, named, chosen, and divided into those that
train, validate and test.

The hash split looks at the content of one row alone: equal rows fall on one side, and the side does
not depend on ids, on the place of a source in a mixture, or on other rows. Validation rows come
from the low end of the hash and test rows from the high end, so that a test split that is added
later, or a larger validation split, takes its rows from training.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import DataSection, OwnRows, SplitSection
from recipes_lib.core.errors import DataError
from recipes_lib.core.project import shown_path
from recipes_lib.data.rows import (
    BadRows,
    DataRow,
    SettingError,
    column_names,
    formats_for,
    map_columns,
    message_texts,
    place,
)
from recipes_lib.data.sources import (
    Source,
    data_files,
    is_on_hub,
    listed_sources,
    load_rows,
    read_file,
)

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
NUM_CHECKED = 20_000


@dataclass
class Rows:
    """The usable rows of all sources in file order."""

    rows: list[DataRow] = field(default_factory=list)  # their ids are unique
    sources: list[tuple[Source, int]] = field(default_factory=list)  # with number of usable rows
    num_read: int = 0  # rows in the files, those that cannot be used included
    unused: dict[str, list[str]] = field(default_factory=dict)  # columns by file


def read_data(
    section: DataSection, bad: BadRows, *, max_rows: int | None = None, only_local: bool = False
) -> Rows:
    """Read, check and name the rows of all sources; those that cannot be used go to `bad`."""
    data = Rows()
    for number, source in enumerate(listed_sources(section)):
        if only_local and is_on_hub(source):
            continue
        num_bad = len(bad)
        read = load_rows(source, bad, max_rows)
        data.num_read += len(read) + len(bad) - num_bad
        if not read:
            empty = SettingError("data.source", f"0 rows in {source.source}")
            raise bad.error() if len(bad) else empty
        rows, unused = map_columns(read, section, source.columns, bad)
        if unused:
            data.unused[read[0].file] = unused
        for row in rows:
            row.source, row.content = number, content_hash(row.fields)
        taken = round(min(len(rows), source.max_examples or len(rows)) * min(source.weight, 1))
        taken = max(taken, 1)
        data.sources.append((source, len(rows)))
        data.rows += first_in_hash_order(rows, taken, section.split.seed)
    times = Counter[str]()
    for row in data.rows:  # ids are labels: the file's or a hash, numbered where they repeat
        row.id = row.id or row.content[:8].hex()
        times[row.id] += 1
        row.id += f"#{times[row.id]}" if times[row.id] > 1 else ""
    return data


def split_rows(rows: Sequence[DataRow], section: SplitSection) -> dict[str, list[DataRow]]:
    """Return the rows of each split, in file order."""
    sides = [TRAIN] * len(rows)
    if section.method == "published":
        sides = _published_sides(len(rows), section)
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
    if not divided[TRAIN]:
        what = f"the split leaves 0 of {len(rows)} rows for training"
        hint = "lower data.split.validation and test, or use data.split.method none"
        raise SettingError("data.split", what, hint)
    return divided


def _published_sides(num_rows: int, section: SplitSection) -> list[str]:
    """Divide as the original study's script: two calls of `datasets`' train_test_split, which draws
    a permutation, with one seed.
    """
    import numpy as np

    def drawn(rows: np.ndarray, fraction: float) -> np.ndarray:
        # A fraction of the rows is rounded up; a sum like 0.1 + 0.2 must not add a row to that.
        size = math.ceil(round(len(rows) * fraction, 6))
        return rows[np.random.default_rng(section.seed).permutation(len(rows))[:size]]

    sides, held_out = np.full(num_rows, TRAIN, dtype=object), section.validation + section.test
    if held_out:
        rows = drawn(np.arange(num_rows), held_out)
        sides[rows] = VALIDATION
        sides[drawn(rows, section.test / held_out)] = TEST
    return list(sides)


def training_rows(section: DataSection) -> list[DataRow]:
    """Return the usable rows that train, without a tokenizer, and so before `max_tokens`."""
    rows = read_data(section, BadRows()).rows
    rows = first_in_hash_order(rows, section.max_examples, section.split.seed)
    return split_rows(rows, section.split)[TRAIN]


def recorded_rows(
    section: DataSection, splits: Mapping[str, Any], fingerprint: str
) -> list[DataRow] | None:
    """Return the rows that a run was trained on, None where they are not what is read now."""
    by_id = {row.id: row for row in read_data(section, BadRows()).rows}
    try:
        parts = {name: [by_id[id] for id in splits[name]["ids"]] for name in SPLITS}
    except KeyError:
        return None
    is_same = fingerprint_of(parts) == fingerprint
    return list({row.id: row for row in parts[TRAIN]}.values()) if is_same else None


def fingerprint_of(parts: Mapping[str, Sequence[DataRow]]) -> str:
    """Return a SHA-256 over split, id and content of all rows, in order."""
    digest = hashlib.sha256()
    for name in SPLITS:
        for row in parts[name]:
            digest.update(f"{name}\t{row.id}\t{row.content.hex()}\n".encode())
    return digest.hexdigest()


def check_rows(recipe: Recipe, full: bool = False) -> list[DataError]:
    """Return what is wrong with the first `NUM_CHECKED` rows of local files (all in `full`),
    without a tokenizer.
    """
    bad, max_rows = BadRows(), None if full else NUM_CHECKED
    try:
        rows = read_data(recipe.data, bad, max_rows=max_rows, only_local=True)
        if len(bad) and (recipe.data.on_bad_row == "error" or not rows.rows):
            raise bad.error(rows.num_read)
    except DataError as error:
        return [place(recipe, error)]
    return []


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


def content_hash(fields: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 of a row's texts, whatever the prompt format and the order of columns;
    empty fields leave no trace.
    """
    parts: list[Any] = []
    for name, value in sorted(fields.items()):
        if isinstance(value, str):
            text = _normalised(value)
            parts += [[name, text]] if text else []
            continue
        turns = []
        for message in value:
            turn = [message["role"], *map(_normalised, message_texts(message))]
            turns.append([*turn, 0] if "weight" in message else turn)
        parts.append([name, turns])
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).digest()


def _normalised(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def look_at(data: Path) -> OwnRows:
    """Return what can read a file, or a folder's first training file, by its first row."""
    data = data.expanduser()
    file = data_files(data, "train")[0] if data.is_dir() else data
    names = column_names(read_file(file, max_rows=1))
    formats = formats_for({}, names)
    if not formats:
        what = f"columns {', '.join(names)} are not understood" if names else "0 rows"
        hint = "start without --data and set data.source and data.columns yourself"
        raise DataError(what, hint, file=shown_path(file), line=1)
    return OwnRows(data, formats)
