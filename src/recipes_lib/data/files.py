"""Rows of local data files: JSON Lines, JSON, CSV, TSV, Parquet, Arrow, each also compressed as .gz where it is text.

Text formats are read here line by line, not through `datasets`, so that every error names file and line. Nothing is
converted: a number stays a number and is reported later, when its column turns out to be a text column.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from recipes_lib.data.examples import shown_path, type_name
from recipes_lib.errors import DataError

TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
DATA_FORMATS = (*TEXT_FORMATS, ".parquet", ".arrow")
BOM = b"\xef\xbb\xbf"


@dataclass(slots=True)
class Table:
    """The rows of one file.

    Args:
        file: the path as the user would type it, or a Hub id.
        rows: one mapping per row.
        lines: line of each row, counted from 1; None where the format has no lines.
        columns: all column names, in the order of first appearance.
    """

    file: str
    rows: list[dict[str, Any]]
    lines: list[int] | None
    columns: list[str]


def data_format(path: Path) -> str | None:
    """The format's extension (`.jsonl`, ...), looking through .gz; None if it is not a data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == ".gz":
        return suffixes[0] if len(suffixes) == 2 and suffixes[0] in TEXT_FORMATS else None
    return suffixes[-1] if suffixes and suffixes[-1] in DATA_FORMATS else None


def read_file(path: Path, max_rows: int | None = None) -> Table:
    """Read the rows of a data file.

    Args:
        max_rows: no more than these, counted from the start.

    Raises:
        DataError: not a known format, or the file is damaged; with file and line.
    """
    kind, file = data_format(path), shown_path(path)
    if kind is None:
        raise DataError(f"not a data file; known endings: {', '.join(DATA_FORMATS)}, text formats also with .gz", file=file)
    if kind in (".parquet", ".arrow"):
        return _read_columnar(path, kind, file, max_rows)
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    reader = {".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}.get(kind, _read_jsonl)
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            for line, row in islice(reader(stream, file), max_rows):  # type: ignore[arg-type]
                rows.append(row)
                lines.append(line)
    except EOFError:
        raise DataError(f"the gzip file is truncated: it ends after {len(rows)} rows", file=file, line=(lines or [0])[-1] + 1) from None
    except gzip.BadGzipFile as error:
        raise DataError(f"not a gzip file, or damaged: {error}", file=file) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=file) from None
    return Table(file, rows, lines, columns_of(rows))


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """All column names of the rows, in the order of first appearance."""
    columns: dict[str, None] = {}
    previous = None
    for row in rows:
        if (keys := row.keys()) != previous:
            columns.update(dict.fromkeys(keys))
            previous = keys
    return list(columns)


def _decoded(stream: BinaryIO, file: str) -> Iterator[tuple[int, str]]:
    """Lines as text with their number; the error for bytes that are not UTF-8 names line and byte offset."""
    offset = 0
    for number, line in enumerate(stream, 1):
        if number == 1 and line.startswith(BOM):
            line, offset = line[len(BOM) :], len(BOM)
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"byte {offset + error.start} (0x{line[error.start]:02x}) is not UTF-8",
                f"if the file is Latin-1: iconv -f LATIN1 -t UTF-8 {file} > new{Path(file).suffix}",
                file=file,
                line=number,
            ) from None
        offset += len(line)


def _read_jsonl(stream: BinaryIO, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _decoded(stream, file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"not a JSON object: {error.msg} at column {error.colno}", file=file, line=number) from None
        yield number, _object(row, file, number)


def _read_json(stream: BinaryIO, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """A list of objects, an object with one list of objects in it, or JSON Lines under the name .json."""
    text = "".join(line for _, line in _decoded(stream, file))
    start = _skip_space(text, 0)
    if text.startswith("{", start):
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise DataError(f"not JSON: {error.msg} at column {error.colno}", file=file, line=error.lineno) from None
            yield from _read_jsonl(io.BytesIO(text.encode()), file)
            return
        tables = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if "\n" not in text.strip() and not (len(tables) == 1 and len(whole) == 1):
            yield 1, whole  # one line: JSON Lines with a single row
        elif len(tables) == 1:
            for row in tables[0]:
                yield 1, _object(row, file, 1)
        else:
            raise DataError("expected a list of objects, or one object with a list of objects in it", file=file, line=1)
        return
    if not text.startswith("[", start):
        if text.strip():
            raise DataError("expected a list of objects", file=file, line=1)
        return
    yield from _json_items(text, start + 1, file)


def _json_items(text: str, position: int, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The items of a JSON list one by one, so that each has its line."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    while True:
        position = _skip_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {error.msg} at column {error.colno}", file=file, line=error.lineno) from None
        yield line, _object(row, file, line)
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position += 1
        elif not text.startswith("]", position):
            raise DataError("not JSON: the list ends without a closing bracket", file=file, line=1 + text.count("\n", 0, position))


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _object(row: Any, file: str, line: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"expected an object with columns, found {type_name(row)}", file=file, line=line)
    return row


def _read_csv(stream: BinaryIO, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    def lines() -> Iterator[str]:
        for number, line in _decoded(stream, file):
            if "\0" in line:
                raise DataError("the line contains a NUL character", "is it UTF-16? save the file as UTF-8", file=file, line=number)
            yield line

    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in Path(file).suffixes else ","
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    start = 1
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(header) == 1 and (other := next((sign for sign in ";\t|" if sign in header[0]), "")):
            what = f"one column, {header[0]!r}: the columns seem to be separated by {other!r}"
            raise DataError(what, "save it with commas, or with tabs under the name .tsv", file=file, line=1)
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"column names appear twice: {', '.join(repeated)}", file=file, line=1)
        start = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(header):
                raise DataError(f"{len(values)} fields, but the header has {len(header)}", file=file, line=start)
            if values:
                yield start, dict(zip(header, values, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", file=file, line=start) from None


def _read_columnar(path: Path, kind: str, file: str, max_rows: int | None) -> Table:
    import pyarrow

    try:
        if kind == ".parquet":
            import pyarrow.parquet

            parquet = pyarrow.parquet.ParquetFile(path)
            if max_rows is None:
                table = parquet.read()
            else:
                table = pyarrow.Table.from_batches(islice(parquet.iter_batches(max_rows), 1), parquet.schema_arrow)
        else:
            with pyarrow.memory_map(str(path)) as stream:
                try:
                    table = pyarrow.ipc.open_file(stream).read_all()
                except pyarrow.ArrowInvalid:
                    stream.seek(0)
                    table = pyarrow.ipc.open_stream(stream).read_all()
        return Table(file, table.slice(0, max_rows).to_pylist(), None, table.column_names)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as {kind[1:]}: {str(error).splitlines()[0]}", file=file) from None
