"""Where the rows come from: a local file, a folder, a Hub data set, or a mixture of these. A local
path wins over a Hub id of the same name. Files are JSON Lines, JSON, CSV and TSV, also as .gz,
Parquet and Arrow.

Nothing is converted, which is why `datasets` reads no text: its CSV reader turns the answer "NA"
into null and "007" into 7, and its JSON reader names no line. A number stays a number, and is
reported where its column should be text.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from recipes_lib.config.documents import near_file
from recipes_lib.config.sections import DATA_FORMATS, HUB_ID, DataSection, data_format
from recipes_lib.core.errors import DataError, one_line
from recipes_lib.core.files import Row, refuse_pipe, remembered_hash
from recipes_lib.core.project import shown_path
from recipes_lib.data.conversations import RESERVED, RESERVED_HINT
from recipes_lib.data.rows import (
    BadRow,
    SettingError,
    listed,
    lone_surrogate,
    type_name,
)

if TYPE_CHECKING:
    from datasets import Dataset

SPLIT_IN_NAME = re.compile(
    r"(?:^|[-_.])(train|training|test|testing|validation|valid|val|dev|eval)(?=[-_.]|$)"
)
SPLIT_NAMES = {
    "training": "train",
    "testing": "test",
    **dict.fromkeys(("valid", "val", "dev", "eval"), "validation"),
}
# Files that `datasets` writes beside the rows.
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}
_OF_CHAT = ("chat_template", "chat_template_kwargs", "system_prompt", "chat_loss")
ENCODING_HINT = "convert it with iconv, or say what it is: data.encoding (latin-1, cp1252, utf-16)"
Numbered = tuple[int | None, Row | BadRow]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of a mixture; a single `data.source` is a mixture of one.

    Args:
        weight: how often an epoch has its training rows; below 1, the share of its rows that is
            read at all.
    """

    source: str
    subset: str | None = None
    source_split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str]
    encoding: str = "utf-8"
    delimiter: str | None = None
    max_examples: int | None = None
    weight: float = 1

    def num_taken(self, num_rows: int) -> int:
        """Return how many of its rows are used.

        Example:
            >>> Source(source="a", columns={}, weight=0.5, max_examples=30).num_taken(100)
            15
        """
        return round(min(num_rows, self.max_examples or num_rows) * min(self.weight, 1))


def listed_sources(section: DataSection) -> list[Source]:
    """Return the sources that `data.source` names.

    Raises:
        SettingError: no source, an unknown encoding, or a key that only `chat` reads is set with
            another prompt format.
    """
    if not section.source:
        raise SettingError("data.source", "is empty: name at least one source")
    for name in sorted(RESERVED & section.chat_template_kwargs.keys()):
        key = "data.chat_template_kwargs"
        raise SettingError(key, f"{key}: {name} is no template argument", RESERVED_HINT)
    absent = DataSection(source="")
    for key in _OF_CHAT if section.prompt_format != "chat" else ():
        if getattr(section, key) != getattr(absent, key):
            what = f"data.{key} acts in prompt_format chat alone, not in {section.prompt_format}"
            raise SettingError(f"data.{key}", what, "remove it, or set data.prompt_format: chat")
    shared = ("subset", "source_split", "revision", "columns", "encoding", "delimiter")
    whole = Source(source="", **{name: getattr(section, name) for name in shared})
    sources = []
    for entry in [section.source] if isinstance(section.source, str) else section.source:
        keys: dict[str, Any] = {"source": entry} if isinstance(entry, str) else dict(entry)
        keys["columns"] = {**whole.columns, **(keys.get("columns") or {})}
        sources.append(replace(whole, **keys))
    for source in sources:
        try:
            "".encode(source.encoding)
        except (LookupError, ValueError):
            what = f"data.encoding: Python knows no text encoding {source.encoding!r}"
            hint = "common ones: utf-8, latin-1, cp1252, utf-16"
            raise SettingError("data.encoding", what, hint) from None
        if source.delimiter is not None and len(source.delimiter) != 1:
            what = f"data.delimiter: expected one character, found {source.delimiter!r}"
            raise SettingError("data.delimiter", what)
    return sources


def is_on_hub(source: Source) -> bool:
    """Return whether no file or folder has a source's name, and it is not named like a file."""
    is_local = find_path(source.source) is not None or data_format(Path(source.source))
    return not is_local and bool(HUB_ID.fullmatch(source.source))


def find_path(name: str) -> Path | None:
    """Return the file or folder `name`; None where there is none, as for a Hub id."""
    path = Path(name).expanduser()
    return path if path.exists() else None


def load_tables(source: Source, max_rows: int | None = None) -> list[Table]:
    """Return the rows of one source, at most `max_rows` of each file.

    Raises:
        DataError: the file, folder or data set is missing or damaged, or its files have different
            columns.
    """
    if is_on_hub(source):
        rows = [(None, dict(row)) for row in hub_data_set(source)]
        return [Table(source.source, list(rows), columnar=True)]
    tables = [
        read_file(file, max_rows, encoding=source.encoding, delimiter=source.delimiter)
        for file in source_files(source)
    ]
    first = tables[0]
    for table in tables[1:]:
        if table.columns and first.columns and {*table.columns} != {*first.columns}:
            what = f"columns are {', '.join(table.columns)}, but {', '.join(first.columns)}"
            hint = "give files of other columns as sources of their own: data.source: [...]"
            raise DataError(f"{what} in {first.file}", hint, file=table.file)
    return tables


def source_files(source: Source) -> list[Path]:
    """Return the files of a local source.

    Raises:
        DataError: there is nothing of this name, or no data file of the split in the folder.
    """
    if (path := find_path(source.source)) is not None:
        return [path] if path.is_file() else data_files(path, source.source_split)
    path = Path(source.source).expanduser()
    parent = path.parent.resolve()
    hints = [*near_file(path), f"looked in {shown_path(parent)}"]
    raise SettingError("data.source", f"no such file or folder: {shown_path(path)}", *hints)


def source_hashes(section: DataSection) -> dict[str, str]:
    """Return the SHA-256 of each local file that a recipe's rows come from, by its number and name;
    a data set of the Hub is known by name and revision alone.

    Raises:
        DataError: a source is missing.
    """
    return {
        f"data {number} {file.name}": remembered_hash(file)
        for number, source in enumerate(listed_sources(section), 1)
        if not is_on_hub(source)
        for file in source_files(source)
    }


def data_files(folder: Path, split: str) -> list[Path]:
    """Return the data files of a folder in name order; those of `split` where names tell splits
    apart.

    Raises:
        DataError: the folder has no data file, or none of this split.
    """
    shown = shown_path(folder)
    refuse_pipe(folder, shown)
    files: list[Path] = []
    for place in (folder, folder / split, folder / "data"):
        paths = sorted(place.glob("[!.]*"))
        files = files or [path for path in paths if data_format(path) and path.name not in NOT_DATA]
    if not files:
        what = f"no data file in this folder; known endings: {', '.join(DATA_FORMATS)}"
        raise DataError(what, file=shown)
    splits = {
        path: SPLIT_NAMES.get(match.group(1), match.group(1))
        for path in files
        if (match := SPLIT_IN_NAME.search(path.name.lower()))
    }
    wanted = [path for path in files if splits.get(path) == SPLIT_NAMES.get(split, split)]
    rest = [path for path in files if path not in splits]
    if not wanted and not rest:
        splits_listed = listed(sorted(set(splits.values())))
        what = f"{shown} has no file of the split '{split}'; splits: {splits_listed}"
        raise SettingError("data.source_split", what)
    return wanted or rest


def hub_data_set(source: Source) -> Dataset:
    """Return a Hub data set as `datasets` loads it, from its cache where it is offline.

    Raises:
        SettingError: it is neither on the Hub nor in the cache, or not open to the user.
    """
    import datasets

    name = source.source
    try:
        return datasets.load_dataset(
            name, source.subset, split=source.source_split, revision=source.revision
        )
    except Exception as error:  # the Hub's client raises many types; each becomes one line
        what = f"cannot load '{name}' from the Hub: {one_line(error)}"
        hint = "check the name and the network; for a private or gated data set: hf auth login"
        is_missing = isinstance(error, datasets.exceptions.DatasetNotFoundError)
        if is_missing or "Repository Not Found" in str(error):
            what = f"the Hub has no data set '{name}', or it is not open to you"
        if offline_by_environment():
            what = f"offline, and '{name}' is no file or folder here and not in the Hub's cache"
            hint = f"put a file at {name}/train.jsonl, or set data.source to a path"
        raise SettingError("data.source", what, hint) from error


def offline_by_environment() -> bool:
    """Return whether a variable tells the Hub's libraries to stay offline."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names)


def hub_answers() -> bool:
    """Return False only where no connection to the Hub can be made, which its client would try for
    46 seconds. A slow answer, a proxy's or a certificate's refusal is for the client to tell.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=15)
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        return not kinds & {"ConnectError", "ConnectTimeout"} or "CERTIFICATE" in str(error)
    return True


# ---- files ----


@dataclass
class Table:
    """The rows of one file.

    Args:
        file: the path as the user would type it, or a Hub id.
        numbered: pairs of a line (None without lines) and a row, or the reason why it is none.
        columnar: whether Arrow held the rows, which fills in null for keys of other rows.
    """

    file: str
    numbered: list[Numbered]
    columnar: bool = False

    @cached_property
    def columns(self) -> list[str]:
        """All column names, in the order of first appearance."""
        rows = (row for _, row in self.numbered if not isinstance(row, BadRow))
        return list(dict.fromkeys(name for row in rows for name in row))

    @property
    def numbered_rows(self) -> list[tuple[int | None, Row]]:
        """All rows, each with its line.

        Raises:
            DataError: a line is not a row.
        """
        rows = []
        for line, row in self.numbered:
            if isinstance(row, BadRow):
                raise DataError(row.what, *filter(None, [row.hint]), file=self.file, line=line)
            rows.append((line, row))
        return rows

    @property
    def rows(self) -> list[Row]:
        """All rows, as `numbered_rows`."""
        return [row for _, row in self.numbered_rows]


def read_file(
    path: Path,
    max_rows: int | None = None,
    *,
    encoding: str = "utf-8",
    delimiter: str | None = None,
) -> Table:
    """Return the rows of a data file.

    Args:
        max_rows: no more than the first of these.
        delimiter: between the columns of .csv and .tsv; None for the ending's own.

    Raises:
        DataError: no such file, not a known format, or damaged; with file and line.
    """
    path = path.expanduser()
    kind, file = data_format(path), shown_path(path)
    if kind is None:
        what = "not a data file" if path.exists() else "no such file"
        endings = f"known endings: {', '.join(DATA_FORMATS)}, text formats also with .gz"
        raise DataError(f"{what}; {endings}", file=file)
    refuse_pipe(path, file)
    if kind in (".parquet", ".arrow"):
        return Table(file, _read_columnar(path, kind, file, max_rows), columnar=True)
    rows: list[Numbered] = []
    try:
        with _open(path, encoding) as stream:
            rows.extend(islice(_read_text(stream, kind, file, delimiter), max_rows))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"the gzip file is truncated or damaged after row {len(rows)}: {error}"
        raise DataError(what, file=file) from None
    except UnicodeError as error:
        line = len(rows) + 1
        raise DataError(f"not {encoding}: {error}", ENCODING_HINT, file=file, line=line) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=file) from None
    return Table(file, rows)


def count_rows(path: Path) -> int:
    """Return how many rows a file has; a CSV text with line ends counts as more."""
    kind = data_format(path)
    if kind == ".parquet":
        from pyarrow.parquet import read_metadata

        return int(read_metadata(path).num_rows)
    if kind in (".json", ".arrow"):
        return len(read_file(path).numbered)
    with _open(path, "latin-1") as stream:
        return sum(1 for line in stream if line.strip()) - (kind in (".csv", ".tsv"))


def _open(path: Path, encoding: str) -> TextIO:
    # Bytes that are not UTF-8 become lone surrogates, so that only their line is a bad row.
    utf8 = encoding.lower().replace("_", "-") in ("utf-8", "utf8")
    name, errors = ("utf-8-sig", "surrogateescape") if utf8 else (encoding, "strict")
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding=name, errors=errors, newline="")
    return path.open(encoding=name, errors=errors, newline="")


def _read_text(stream: TextIO, kind: str, file: str, delimiter: str | None) -> Iterator[Numbered]:
    if kind in (".csv", ".tsv"):
        return _read_csv(stream, file, delimiter or ("\t" if kind == ".tsv" else ","))
    return _read_json(stream.read(), file) if kind == ".json" else _read_jsonl(stream)


def _read_jsonl(lines: Iterable[str]) -> Iterator[Numbered]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _object(json.loads(line))
        except (ValueError, RecursionError) as error:
            row = BadRow(f"not a JSON object: {_reason(error)}")
        if what := lone_surrogate(line):
            row = BadRow(what, ENCODING_HINT)
        yield number, row


def _read_json(text: str, file: str) -> Iterator[Numbered]:
    """Read a list of objects, or JSON Lines under the name .json."""
    try:
        rows = json.loads(text or "[]")
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") != "Extra data":
            line = getattr(error, "lineno", 1)
            raise DataError(f"not JSON: {_reason(error)}", file=file, line=line) from None
        yield from _read_jsonl(text.splitlines())
        return
    if isinstance(rows, dict) and "\n" not in text.strip():
        yield 1, rows  # JSON Lines with a single row
    elif isinstance(rows, list):
        yield from ((None, _object(row)) for row in rows)
    else:
        what = f"expected a list of objects, found {type_name(rows)}"
        hint = f"keep the list alone, as with jq .data {file} > rows.json"
        raise DataError(what, hint, file=file, line=1)


def _object(row: Any) -> Row | BadRow:
    if isinstance(row, dict):
        return row
    return BadRow(f"expected an object with columns, found {type_name(row)}")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def _read_csv(stream: TextIO, file: str, delimiter: str) -> Iterator[Numbered]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    start = 1
    try:
        header = next(reader, [])
        if other := other_delimiter(header):
            what = f"one column, {header[0]!r}: the columns seem to be separated by {other!r}"
            hint = f'say so: data.delimiter: "{other}"'.replace("\t", "\\t")
            raise DataError(what, hint, file=file, line=1)
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            what = f"column names appear twice: {', '.join(repeated)}"
            raise DataError(what, file=file, line=1)
        start = reader.line_num + 1
        for values in reader:
            if len(values) == len(header):
                yield start, dict(zip(header, values, strict=True))
            elif values:
                yield start, BadRow(f"{len(values)} fields, but the header has {len(header)}")
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", file=file, line=start) from None


def other_delimiter(header: list[str]) -> str:
    """Return the sign in a header that was read as one column; '' where there is none."""
    return next((sign for sign in ";\t|," if sign in header[0]), "") if len(header) == 1 else ""


def _read_columnar(path: Path, kind: str, file: str, max_rows: int | None) -> list[Numbered]:
    import pyarrow
    from pyarrow.parquet import read_table

    try:
        if kind == ".parquet":
            table = read_table(path)
        else:
            with pyarrow.memory_map(str(path)) as stream:
                try:
                    table = pyarrow.ipc.open_file(stream).read_all()
                except pyarrow.ArrowInvalid:  # `datasets` writes Arrow's stream format
                    stream.seek(0)
                    table = pyarrow.ipc.open_stream(stream).read_all()
        return [(None, row) for row in table.slice(0, max_rows).to_pylist()]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as {kind[1:]}: {one_line(error)}", file=file) from None
