"""Where the rows come from: a local file, a folder, a Hub data set, or a mixture of these. A local
path wins over a Hub id of the same name.

Nothing is converted, which is why `datasets` reads no text: its CSV reader turns the answer "NA"
into null and "007" into 7, and its JSON reader names no line.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.documents import near_file
from recipes_lib.config.sections import DATA_FORMATS, HUB_ID, DataSection, data_format
from recipes_lib.core.errors import DataError, one_line
from recipes_lib.core.files import Row, remembered_hash
from recipes_lib.core.project import shown_path
from recipes_lib.data.rows import BadRow, BadRows, DataRow, SettingError, parsed_json

if TYPE_CHECKING:
    from datasets import Dataset

# What names of files call the splits of a data set.
SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev|eval",
    "test": "test|testing",
}
Numbered = tuple[int | None, Row | BadRow]


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
    if not section.source:
        raise SettingError("data.source", "is empty: name at least one source")
    absent = DataSection(source="")
    for key in ("chat_template", "chat_template_kwargs", "system_prompt", "chat_loss"):
        if section.prompt_format != "chat" and getattr(section, key) != getattr(absent, key):
            what = f"data.{key} acts in prompt_format chat alone, not in {section.prompt_format}"
            raise SettingError(f"data.{key}", what, "remove it, or set data.prompt_format: chat")
    shared = ("subset", "source_split", "revision", "columns")
    whole = Source(source="", **{name: getattr(section, name) for name in shared})
    sources = []
    for entry in [section.source] if isinstance(section.source, str) else section.source:
        keys: dict[str, Any] = {"source": entry} if isinstance(entry, str) else dict(entry)
        keys["columns"] = {**whole.columns, **(keys.get("columns") or {})}
        sources.append(replace(whole, **keys))
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
    rows = map(without_nulls, hub_data_set(source))
    return [DataRow(source.source, None, number, row) for number, row in enumerate(rows, 1)]


def source_files(source: Source) -> list[Path]:
    """Return the files of a local source, or raise an error that names the nearest."""
    path = Path(source.source).expanduser()
    if path.exists():
        return data_files(path, source.source_split) if path.is_dir() else [path]
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
    """Return a folder's data files in name order, of `split` where names tell splits apart."""
    files: list[Path] = []
    for place in (folder, folder / split, folder / "data"):
        # `datasets` writes dataset_info.json beside the rows
        present = [path for path in sorted(place.glob("[!.]*")) if data_format(path)]
        files = files or [path for path in present if not path.name.startswith("dataset_info")]
    if not files:
        what = f"no data file in this folder; known endings: {', '.join(DATA_FORMATS)}"
        raise DataError(what, file=shown_path(folder))

    def of_split(words: str) -> list[Path]:
        name = re.compile(rf"(^|[-_.])({words})([-_.]|$)")
        return [path for path in files if name.search(path.name.lower())]

    named = of_split("|".join(SPLIT_WORDS.values()))
    chosen = of_split(SPLIT_WORDS.get(split, re.escape(split)))
    chosen = chosen or [path for path in files if path not in named]
    if not chosen:
        what = f"{shown_path(folder)} has no file of the split '{split}', only {files[0].name}"
        raise SettingError("data.source_split", what)
    return chosen


def hub_data_set(source: Source) -> Dataset:
    """Return a Hub data set as `datasets` loads it, from its cache where it is offline."""
    import datasets

    name, keys = source.source, {"split": source.source_split, "revision": source.revision}
    try:
        return datasets.load_dataset(name, source.subset, **keys)
    except Exception as error:  # the Hub's client raises many types; each becomes one line
        what = f"cannot load '{name}' from the Hub: {one_line(error)}"
        hint = "check the name and the network; for a private or gated data set: hf auth login"
        if hub_is_away():
            what = f"offline, and '{name}' is not a file or folder, and not in the Hub's cache"
            hint = f"put a file at {name}/train.jsonl, or set data.source to a path"
        raise SettingError("data.source", what, hint) from error


def hub_is_away() -> bool:
    """Return whether no connection to the Hub can or may be made, which its client would try for 46
    seconds. A slow answer, a proxy's or a certificate's refusal is for the client to tell.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=15)
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        is_away = kinds & {"OfflineModeIsEnabled", "ConnectError", "ConnectTimeout"}
        return bool(is_away) and "CERTIFICATE" not in str(error)
    return False


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
            if isinstance(values, BadRow):
                no_rows.add(DataRow(file, line, number, {}), values)
            else:
                rows.append(DataRow(file, line, number, values))
    except Exception as error:  # of a codec, csv, pyarrow or the disk
        raise DataError(f"cannot be read as {kind[1:]}: {one_line(error)}", file=file) from None
    if bad is None and len(no_rows):
        raise no_rows.error()
    return rows


def count_rows(path: Path) -> int:
    """Return how many rows a file has; a text with line ends counts as more in CSV."""
    kind = data_format(path)
    if kind == ".parquet":
        from pyarrow.parquet import read_metadata

        return int(read_metadata(path).num_rows)
    if kind == ".json":
        return len(read_file(path))
    with path.open("rb") as stream:
        return sum(1 for line in stream if line.strip()) - (kind in (".csv", ".tsv"))


def _read_jsonl(path: Path) -> Iterator[Numbered]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _parsed(line)


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
    return ((None, _parsed(row)) for row in rows)


def _parsed(row: Any) -> Row | BadRow:
    """Return a row of JSON, or why it is none."""
    try:
        values: Row = parsed_json(row, dict, "the row")
    except BadRow as reason:
        return reason
    return values


def _read_csv(path: Path) -> Iterator[Numbered]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        sign = "\t" if data_format(path) == ".tsv" else ","
        reader = csv.DictReader(stream, delimiter=sign, strict=True)
        names, start = reader.fieldnames or [], reader.line_num + 1
        if len(names) > len({*names}):
            raise ValueError(f"two columns have one name: {', '.join(names)}")
        for row in reader:
            is_whole = None not in row and None not in row.values()
            what = f"not as many fields as the header has ({len(names)})"
            yield start, row if is_whole else BadRow(what)
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
