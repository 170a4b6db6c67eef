"""The rows of a recipe: read from a local file, a folder, a Hub data set, or a mixture of these (a
local path wins over a Hub id of the same name), named, chosen, and divided into those that train,
validate and test.

Nothing is converted, which is why `datasets` reads no text: its CSV reader turns the answer "NA"
into null and "007" into 7, and its JSON reader names no line.

The hash split looks at the content of one row alone: equal rows fall on one side, and the side does
not depend on ids, on the place of a source in a mixture, or on other rows. Validation rows come
from the low end of the hash and test rows from the high end, so that a test split that is added
later, or a larger validation split, takes its rows from training.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.documents import near_file
from recipes_lib.config.recipe import (
    DATA_FORMATS,
    HUB_ID,
    DataSection,
    Recipe,
    SplitSection,
    data_format,
)
from recipes_lib.core.errors import DataError, one_line
from recipes_lib.core.files import remembered_hash
from recipes_lib.core.project import shown_path
from recipes_lib.data.rows import (
    BadRow,
    BadRows,
    DataRow,
    SettingError,
    column_names,
    fields_by_format,
    map_columns,
    message_texts,
    parsed_json,
    place,
)

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
NUM_CHECKED = 20_000
Numbered = tuple[int | None, Any]  # a row, its JSON text, or why it is none


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of a mixture; a single `data.source` is a mixture of one."""

    source: str
    subset: str | None = None
    source_split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str]
    max_examples: int | None = None
    weight: float = 1  # times that an epoch has its training rows; below 1, the share that is read


def listed_sources(section: DataSection) -> list[Source]:
    """Return the sources that `data.source` names; the keys that they share are checked."""
    for key in ("chat_template", "chat_template_kwargs", "system_prompt", "chat_loss"):
        is_set = getattr(section, key) != DataSection.model_fields[key].default
        if is_set and section.prompt_format != "chat":
            what = f"data.{key} acts in prompt_format chat alone, not in {section.prompt_format}"
            raise SettingError(f"data.{key}", what, "remove it, or set data.prompt_format: chat")
    shared = section.model_dump(include={"subset", "source_split", "revision"})
    sources = []
    for entry in [section.source] if isinstance(section.source, str) else section.source:
        keys: Any = {"source": entry} if isinstance(entry, str) else entry
        columns = {**section.columns, **(keys.get("columns") or {})}
        sources.append(Source(**{**shared, **keys, "columns": columns}))
    return sources


def is_on_hub(source: Source) -> bool:
    """Return whether no file or folder has a source's name, and it is not named like a file."""
    path = Path(source.source).expanduser()
    is_local = path.exists() or data_format(path)
    return not is_local and bool(HUB_ID.fullmatch(source.source))


def load_rows(
    source: Source, bad: BadRows | None = None, max_rows: int | None = None
) -> list[DataRow]:
    """Return the rows of one source, as `read_file` returns them; at most `max_rows` of a file."""
    if not is_on_hub(source):
        return [row for file in source_files(source) for row in read_file(file, bad, max_rows)]
    rows = enumerate(map(without_nulls, hub_data_set(source)), 1)
    return [DataRow(f"{source.source} row {number}", None, row) for number, row in rows]


def source_files(source: Source) -> list[Path]:
    """Return the files of a local source, or raise an error that names the nearest."""
    path = Path(source.source).expanduser()
    if path.exists():
        return [path] if path.is_file() else data_files(path, source.source_split)
    hints = [*near_file(path), f"looked in {shown_path(path.parent.resolve())}"]
    raise SettingError("data.source", f"no such file or folder: {shown_path(path)}", *hints)


def source_hashes(section: DataSection) -> dict[str, str]:
    """Return the SHA-256 of each local file of a recipe's rows, by its number and name."""
    return {
        f"data {number} {file.name}": remembered_hash(file)
        for number, source in enumerate(listed_sources(section), 1)
        if not is_on_hub(source)
        for file in source_files(source)
    }


def data_files(folder: Path, split: str) -> list[Path]:
    """Return a folder's data files of a split, as `datasets` tells them by their names."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    place, kinds = str(folder.resolve()), list(DATA_FORMATS)
    try:
        patterns = get_data_patterns(place)
        files = DataFilesDict.from_patterns(patterns, place, allowed_extensions=kinds)
    except OSError:  # there is none
        files = {}
    by_split = {str(name): sorted(map(Path, paths)) for name, paths in files.items() if paths}
    if split not in by_split:
        what = f"no data file of the split '{split}' in this folder"
        hint = f"splits: {', '.join(by_split) or 'none'}; known endings: {', '.join(kinds)}"
        raise DataError(what, hint, file=shown_path(folder))
    return by_split[split]


def hub_data_set(source: Source) -> Dataset:
    """Return a Hub data set as `datasets` loads it, from its cache where it is offline."""
    import datasets
    from huggingface_hub import is_offline_mode

    name, keys = source.source, {"split": source.source_split, "revision": source.revision}
    try:
        return datasets.load_dataset(name, source.subset, **keys)
    except Exception as error:  # the Hub's client raises many types; each becomes one line
        what = f"cannot load '{name}' from the Hub: {one_line(error)}"
        hint = "check the name; for a private or gated data set: hf auth login"
        if is_offline_mode():
            what = f"offline, and '{name}' is no file or folder, and not in the Hub's cache"
            hint = f"put a file at {name}/train.jsonl, or set data.source to a path"
        raise SettingError("data.source", what, hint) from error


# ---- files ----


def read_file(path: Path, bad: BadRows | None = None, max_rows: int | None = None) -> list[DataRow]:
    """Return the rows of a data file with its columns. Lines that are no rows are added to `bad`;
    without it, they are an error.
    """
    path = path.expanduser()
    kind, file = data_format(path), shown_path(path)
    if kind is None or not path.is_file():  # or a pipe, which may never end
        what = f"not a data file; known endings: {', '.join(DATA_FORMATS)}"
        raise DataError(what if path.exists() else "no such file", file=file)
    rows, no_rows = [], BadRows() if bad is None else bad
    try:
        numbered = islice(_READERS[kind](path), max_rows)
        for number, (line, values) in enumerate(numbered, 1):
            row = DataRow(file if line else f"{file} row {number}", line, {})
            try:
                if isinstance(values, BadRow):
                    raise values
                row.fields = parsed_json(values, dict, "the row")
                rows.append(row)
            except BadRow as reason:
                no_rows.add(row, reason)
    except Exception as error:  # of a codec, csv, pyarrow or the disk
        raise DataError(f"cannot be read as {kind[1:]}: {one_line(error)}", file=file) from None
    if bad is None and len(no_rows):
        raise no_rows.error()
    return rows


def _read_jsonl(path: Path) -> Iterator[Numbered]:
    with path.open("rb") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _read_json(path: Path) -> Iterator[Numbered]:
    """Read a list of objects, or JSON Lines under the name .json."""
    try:
        rows = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return _read_jsonl(path)
    if not isinstance(rows, list):
        raise TypeError("expected a list of objects, and nothing around it")
    return ((None, row) for row in rows)


def _read_csv(path: Path) -> Iterator[Numbered]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        sign = "\t" if data_format(path) == ".tsv" else ","
        reader = csv.DictReader(stream, delimiter=sign, strict=True)
        names, start = reader.fieldnames or [], reader.line_num + 1
        for row in reader:
            is_whole = None not in row and None not in row.values()
            yield start, row if is_whole else BadRow(f"not {len(names)} fields, as the header has")
            start = reader.line_num + 1


def _read_parquet(path: Path) -> Iterator[Numbered]:
    from pyarrow.parquet import read_table

    for batch in read_table(path).to_batches():
        yield from ((None, without_nulls(row)) for row in batch.to_pylist())


def without_nulls(value: Any) -> Any:
    """Return the value without the keys that Arrow fills in with null, as another row has them."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


_READERS = {
    **dict.fromkeys((".jsonl", ".ndjson"), _read_jsonl),
    ".json": _read_json,
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    ".parquet": _read_parquet,
}


# ---- rows ----


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
        data.num_read -= len(bad)
        read = load_rows(source, bad, max_rows)
        data.num_read += len(read) + len(bad)
        if not read:
            raise bad.error() if bad else SettingError("data.source", f"0 rows in {source.source}")
        rows, unused = map_columns(read, section, source.columns, bad)
        if unused:
            data.unused[shown_path(Path(source.source))] = unused
        for row in rows:
            row.source, row.content = number, content_hash(row.fields)
        taken = round(min(len(rows), source.max_examples or len(rows)) * min(source.weight, 1))
        data.sources.append((source, len(rows)))
        data.rows += first_in_hash_order(rows, max(taken, 1), section.split.seed)
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
    pairs = [*zip(rows, sides, strict=True)]
    divided = {name: [row for row, side in pairs if side == name] for name in SPLITS}
    if not divided[TRAIN]:
        what = f"the split leaves 0 of {len(rows)} rows for training"
        hint = "lower data.split.validation and test, or use data.split.method none"
        raise SettingError("data.split", what, hint)
    return divided


def _published_sides(num_rows: int, section: SplitSection) -> list[str]:
    """Divide as the original study's script: two calls of `datasets`' train_test_split, which takes
    the first rows of a permutation, with one seed.
    """
    import numpy as np

    sides, rows, left = [TRAIN] * num_rows, np.arange(num_rows), 1.0
    for side, share in ((VALIDATION, section.validation + section.test), (TEST, section.test)):
        # A fraction of the rows is rounded up; a sum like 0.1 + 0.2 must not add a row to that.
        size = math.ceil(round(len(rows) * share / (left or 1), 6))
        rows = rows[np.random.default_rng(section.seed).permutation(len(rows))[:size]]
        for row in rows:
            sides[row] = side
        left = share
    return sides


def train_rows(section: DataSection) -> list[DataRow]:
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
            parts += [[name, text]] if (text := _normalised(value)) else []
            continue
        turns = [[message["role"], *map(_normalised, message_texts(message))] for message in value]
        for turn, message in zip(turns, value, strict=True):
            turn += [0] if "weight" in message else []
        parts.append([name, turns])
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).digest()


def _normalised(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def formats_of(data: Path) -> tuple[str, ...]:
    """Return the prompt formats that can read the first row of a file or folder, best first."""
    file = source_files(Source(source=str(data), columns={}))[0]
    names = column_names(read_file(file, max_rows=1))
    formats = tuple(fields_by_format({}, names)[1])
    if not formats:
        what = f"columns {', '.join(names)} are not understood" if names else "0 rows"
        hint = "start without --data and set data.source and data.columns yourself"
        raise DataError(what, hint, file=shown_path(file), line=1)
    return formats
