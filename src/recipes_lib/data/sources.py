"""Where the rows come from: a local file, a folder, a Hub data set, or a mixture of these. A local
path wins over a Hub id of the same name. Files are JSON Lines, JSON, CSV and TSV, also as .gz,
Parquet and Arrow.

Nothing is converted, which is why `datasets` reads no text: its CSV reader turns the answer "NA"
into null and "007" into 7, and its JSON reader names no line. A number stays a number, and is
reported where its column should be text.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from recipes_lib.config.documents import near_file
from recipes_lib.config.sections import DATA_FORMATS, HUB_ID, DataSection, data_format
from recipes_lib.core.errors import DataError, one_line
from recipes_lib.core.files import Row, refuse_pipe, remembered_hash
from recipes_lib.core.project import shown_path
from recipes_lib.data.conversations import RESERVED, RESERVED_HINT, without_nulls
from recipes_lib.data.rows import BadRow, BadRows, DataRow, SettingError, parsed_json, type_name

if TYPE_CHECKING:
    from datasets import Dataset

# What names of files call the splits of a data set.
SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev|eval",
    "test": "test|testing",
}
# Files that `datasets` writes beside the rows.
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}
_OF_CHAT = ("chat_template", "chat_template_kwargs", "system_prompt", "chat_loss")
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


def listed_sources(section: DataSection) -> list[Source]:
    """Return the sources that `data.source` names; the keys that they share are checked."""
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
    return sources


def is_on_hub(source: Source) -> bool:
    """Return whether no file or folder has a source's name, and it is not named like a file."""
    is_local = find_path(source.source) is not None or data_format(Path(source.source))
    return not is_local and bool(HUB_ID.fullmatch(source.source))


def find_path(name: str) -> Path | None:
    """Return the file or folder `name`; None where there is none, as for a Hub id."""
    path = Path(name).expanduser()
    return path if path.exists() else None


def load_rows(
    source: Source, bad: BadRows | None = None, max_rows: int | None = None
) -> list[DataRow]:
    """Return the rows of one source, as `read_file` returns them; at most `max_rows` of each
    file.
    """
    if is_on_hub(source):
        return [
            DataRow(source.source, None, number, _without_nulls(row))
            for number, row in enumerate(hub_data_set(source), 1)
        ]
    return [
        row
        for file in source_files(source)
        for row in read_file(
            file, bad, max_rows=max_rows, encoding=source.encoding, delimiter=source.delimiter
        )
    ]


def source_files(source: Source) -> list[Path]:
    """Return the files of a local source, or raise an error that names the nearest."""
    if (path := find_path(source.source)) is not None:
        return [path] if path.is_file() else data_files(path, source.source_split)
    path = Path(source.source).expanduser()
    parent = path.parent.resolve()
    hints = [*near_file(path), f"looked in {shown_path(parent)}"]
    raise SettingError("data.source", f"no such file or folder: {shown_path(path)}", *hints)


def source_hashes(section: DataSection) -> dict[str, str]:
    """Return the SHA-256 of each local file that a recipe's rows come from, by its number and name;
    a data set of the Hub is known by name and revision alone.
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

    def has(path: Path, words: str) -> bool:
        return bool(re.search(rf"(^|[-_.])({words})([-_.]|$)", path.name.lower()))

    of_split = [path for path in files if has(path, SPLIT_WORDS.get(split, re.escape(split)))]
    rest = [path for path in files if not has(path, "|".join(SPLIT_WORDS.values()))]
    if not of_split and not rest:
        what = f"{shown} has no file of the split '{split}', only {files[0].name} and the like"
        raise SettingError("data.source_split", what)
    return of_split or rest


def hub_data_set(source: Source) -> Dataset:
    """Return a Hub data set as `datasets` loads it, from its cache where it is offline."""
    import datasets

    name = source.source
    try:
        return datasets.load_dataset(
            name, source.subset, split=source.source_split, revision=source.revision
        )
    except Exception as error:  # the Hub's client raises many types; each becomes one line
        what = f"cannot load '{name}' from the Hub: {one_line(error)}"
        hint = "check the name and the network; for a private or gated data set: hf auth login"
        if "Repository Not Found" in str(error):
            what = f"the Hub has no data set '{name}', or you have no access to it"
        if offline_by_environment():
            what = f"offline, and '{name}' is not a file or folder, and not in the Hub's cache"
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


def column_names(rows: Iterable[DataRow]) -> list[str]:
    """Return all column names, in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.fields))


def read_file(
    path: Path,
    bad: BadRows | None = None,
    *,
    max_rows: int | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
) -> list[DataRow]:
    """Return the rows of a data file, with its columns.

    Args:
        bad: where lines that are no rows are added; without it, they are an error.
        max_rows: no more than the first of these.
        delimiter: between the columns of .csv and .tsv; None for the ending's own.

    Raises:
        DataError: no such file, not a known format, or damaged; with file and line.
    """
    path = path.expanduser()
    kind, file = data_format(path), shown_path(path)
    if kind is None or not path.exists():
        endings = f"{', '.join(DATA_FORMATS)}, text formats also with .gz"
        what = f"not a data file; known endings: {endings}" if path.exists() else "no such file"
        raise DataError(what, file=file)
    refuse_pipe(path, file)
    try:
        codecs.lookup(encoding)
        csv.reader([], delimiter=delimiter or ",")
    except (LookupError, TypeError) as error:
        key = "data.encoding" if isinstance(error, LookupError) else "data.delimiter"
        raise SettingError(key, f"{key}: {error}") from None
    rows, no_rows = [], BadRows() if bad is None else bad
    try:
        numbered = islice(_numbered(path, kind, encoding, delimiter), max_rows)
        for number, (line, values) in enumerate(numbered, 1):
            row = DataRow(file, line, number, {})
            if isinstance(values, BadRow):
                no_rows.add(row, values)
            else:
                row.fields = values
                rows.append(row)
    except DataError as error:
        error.file = file
        raise
    except Exception as error:  # of gzip, zlib, pyarrow, the disk, or a codec
        raise DataError(f"cannot be read as {kind[1:]}: {one_line(error)}", file=file) from None
    if bad is None and len(no_rows):
        raise no_rows.error()
    return rows


def count_rows(path: Path) -> int:
    """Return how many rows a file has; a CSV text with line ends counts as more."""
    kind = data_format(path)
    if kind == ".parquet":
        from pyarrow.parquet import read_metadata

        return int(read_metadata(path).num_rows)
    if kind in (".json", ".arrow"):
        return len(read_file(path))
    with _open(path, "latin-1") as stream:
        return sum(1 for line in stream if line.strip()) - (kind in (".csv", ".tsv"))


def _numbered(path: Path, kind: str, encoding: str, delimiter: str | None) -> Iterator[Numbered]:
    if kind in (".parquet", ".arrow"):
        yield from _read_columnar(path, kind)
        return
    with _open(path, encoding) as stream:
        if kind == ".json":
            yield from _read_json(stream.read())
        elif kind in (".csv", ".tsv"):
            yield from _read_csv(stream, delimiter or ("\t" if kind == ".tsv" else ","))
        else:
            yield from _read_jsonl(stream)


def _open(path: Path, encoding: str) -> TextIO:
    # Bytes that are no text become lone surrogates, so that only their line is a bad row.
    name = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding=name, errors="surrogateescape", newline="")
    return path.open(encoding=name, errors="surrogateescape", newline="")


def _no_text(line: str) -> BadRow | None:
    """Return the error about a byte that `_open` could not decode."""
    if byte := re.search("[\udc80-\udcff]", line):
        what = f"byte 0x{ord(byte[0]) - 0xDC00:02x} is not UTF-8"
        return BadRow(what, "name the encoding: data.encoding (latin-1, cp1252, utf-16)")
    return None


def _read_jsonl(lines: Iterable[str]) -> Iterator[Numbered]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = _object(parsed_json(line, "the line"))
            except BadRow as reason:
                row = reason
            yield number, _no_text(line) or row


def _read_json(text: str) -> Iterator[Numbered]:
    """Read a list of objects, or JSON Lines under the name .json."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") != "Extra data":
            raise DataError(f"not JSON: {error}", line=getattr(error, "lineno", None)) from None
        yield from _read_jsonl(text.split("\n"))
        return
    if not isinstance(rows, list):
        what = f"expected a list of objects, found {type_name(rows)}"
        raise DataError(what, "keep the list alone, as with jq .data", line=1)
    yield from ((None, _object(row)) for row in rows)


def _object(row: Any) -> Row | BadRow:
    what = f"expected an object with columns, found {type_name(row)}"
    return row if isinstance(row, dict) else BadRow(what)


def _read_csv(stream: TextIO, delimiter: str) -> Iterator[Numbered]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    start = 1
    try:
        header = next(reader, [])
        if other := other_delimiter(header):
            what = f"one column, {header[0]!r}: the columns seem to be separated by {other!r}"
            hint = f'say so: data.delimiter: "{other}"'.replace("\t", "\\t")
            raise DataError(what, hint, line=1)
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"column names appear twice: {', '.join(repeated)}", line=1)
        start = reader.line_num + 1
        for values in reader:
            if len(values) == len(header):
                yield start, _no_text("".join(values)) or dict(zip(header, values, strict=True))
            elif values:
                yield start, BadRow(f"{len(values)} fields, but the header has {len(header)}")
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", line=start) from None


def other_delimiter(header: list[str]) -> str:
    """Return the sign in a header that was read as one column; '' where there is none."""
    return next((sign for sign in ";\t|," if sign in header[0]), "") if len(header) == 1 else ""


def _read_columnar(path: Path, kind: str) -> Iterator[Numbered]:
    import pyarrow
    from pyarrow.parquet import read_table

    if kind == ".parquet":
        table = read_table(path)
    else:
        with pyarrow.memory_map(str(path)) as stream:
            try:
                table = pyarrow.ipc.open_file(stream).read_all()
            except pyarrow.ArrowInvalid:  # `datasets` writes Arrow's stream format
                stream.seek(0)
                table = pyarrow.ipc.open_stream(stream).read_all()
    for batch in table.to_batches():
        yield from ((None, _without_nulls(row)) for row in batch.to_pylist())


def _without_nulls(row: Row) -> Row:
    return {name: without_nulls(value) for name, value in row.items()}
