"""Rows of local data files: JSON Lines, JSON, CSV, TSV, Parquet, Arrow, each also compressed as .gz
where it is text.

Text formats are read here line by line, not through `datasets`, so that every error names file and
line. Nothing is converted: a number stays a number and is reported later, when its column turns out
to be a text column.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import Row, refuse_pipe
from recipes_lib.data.conversations import is_blank
from recipes_lib.data.examples import BadRow, shown_real_path, type_name

TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
DATA_FORMATS = (*TEXT_FORMATS, ".parquet", ".arrow")
BOM = b"\xef\xbb\xbf"
COLUMNAR_ROWS = 10_000
BLOCK_BYTES = 1 << 20
ENCODING_HINT = (
    "set data.encoding to what the file is (utf-8, latin-1, cp1252, utf-16, ...), or convert it"
    " with iconv"
)


Numbered = Iterator[tuple[int | None, Row | BadRow]]


class Table:
    """The rows of one file, read anew each time they are iterated: pairs of a line (None without
    lines) and a row.

    A line that is no row stands there as the reason.

    Args:
        file: the path as the user would type it, or a Hub id.
        read: starts to read the rows.
        columns: all column names, where the format tells them.
    """

    def __init__(
        self, file: str, read: Callable[[], Numbered], columns: list[str] | None = None
    ) -> None:
        self.file = file
        self._read = read
        self._columns = columns

    def __iter__(self) -> Numbered:
        return self._read()

    @cached_property
    def columns(self) -> list[str]:
        """All column names, in the order of first appearance."""
        return (
            columns_of(row for _, row in self if not isinstance(row, BadRow))
            if self._columns is None
            else self._columns
        )

    @cached_property
    def rows(self) -> list[Row]:
        """All rows at once.

        Raises:
            DataError: a line is no row.
        """
        return [row for _, row in self._whole]

    @cached_property
    def lines(self) -> list[int] | None:
        """The line of each row, counted from 1; None where the format has no lines."""
        lines = [line for line, _ in self._whole]
        return None if None in lines else lines  # type: ignore[return-value]

    @cached_property
    def _whole(self) -> list[tuple[int | None, Row]]:
        whole = []
        for line, row in self:
            if isinstance(row, BadRow):
                raise DataError(row.what, *filter(None, [row.hint]), file=self.file, line=line)
            whole.append((line, row))
        return whole


def data_format(path: Path) -> str | None:
    """The format's extension (`.jsonl`, ...), looking through .gz; None if it is not a
    data file.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == ".gz":
        return suffixes[0] if len(suffixes) == 2 and suffixes[0] in TEXT_FORMATS else None
    return suffixes[-1] if suffixes and suffixes[-1] in DATA_FORMATS else None


def read_file(
    path: Path,
    max_rows: int | None = None,
    *,
    encoding: str = "utf-8",
    delimiter: str | None = None,
) -> Table:
    """The rows of a data file, read when they are iterated; then a damaged file is a DataError with
    file and line.

    Args:
        max_rows: no more than these, counted from the start.
        encoding: of text formats.
        delimiter: between the columns of .csv and .tsv; None for the ending's own.

    Raises:
        DataError: not a known format.
    """
    kind, file = data_format(path), shown_real_path(path)
    if kind is None:
        raise DataError(
            f"not a data file; known endings: {', '.join(DATA_FORMATS)}, text formats also"
            " with .gz",
            file=file,
        )
    refuse_pipe(path, file)
    if kind in (".parquet", ".arrow"):
        return _columnar(path, kind, file, max_rows)

    def text() -> Numbered:
        reader: Any = _read_json if kind == ".json" else _read_jsonl
        if kind in (".csv", ".tsv"):
            reader = partial(_read_csv, delimiter=delimiter or ("\t" if kind == ".tsv" else ","))
        last = 0
        try:
            with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
                for last, row in islice(reader(stream, file, encoding), max_rows):
                    yield last, row
        except EOFError:
            raise DataError(
                f"the gzip file is truncated: it ends after line {last}", file=file, line=last + 1
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"not a gzip file, or damaged: {error}", file=file) from None
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", file=file) from None

    return Table(file, text)


def count_rows(path: Path) -> int:
    """How many rows a file has: what its format says, lines where a row is one (a text with line
    ends counts as more), else by reading.

    Raises:
        DataError: the file is damaged.
    """
    kind = data_format(path)
    if kind == ".parquet":
        from pyarrow.parquet import read_metadata

        return int(read_metadata(path).num_rows)
    if kind not in TEXT_FORMATS or kind == ".json":
        return sum(1 for _ in read_file(path))
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        lines, last = 0, b"\n"
        while block := stream.read(BLOCK_BYTES):
            lines, last = lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n") - (kind in (".csv", ".tsv"))


def columns_of(rows: Iterable[Row]) -> list[str]:
    """All column names of the rows, in the order of first appearance."""
    columns: dict[str, None] = {}
    previous = None
    for row in rows:
        if (keys := row.keys()) != previous:
            columns.update(dict.fromkeys(keys))
            previous = keys
    return list(columns)


def _distinct(pairs: list[tuple[str, Any]]) -> Row:
    """An object whose keys are all different: of equal ones, all but the last would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(name for name in names if names.count(name) > 1)!r} appears twice in"
            " one object"
        )
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


def _reason(error: Exception) -> str:
    """What is wrong with a JSON text, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return (
        "nested too deep" if isinstance(error, RecursionError) else str(error).partition(";")[0]
    )  # behind it, advice for programmers


def _not_json(error: Exception, file: str, line: int = 1) -> DataError:
    return DataError(
        f"not JSON: {_reason(error)}",
        file=file,
        line=error.lineno if isinstance(error, json.JSONDecodeError) else line,
    )


def _lines(stream: BinaryIO, encoding: str) -> Iterator[tuple[int, str | BadRow]]:
    """Lines as text with their number; the reason for bytes that are not text names the byte
    offset.
    """
    offset, codec = 0, codecs.lookup(encoding)
    if codec.name.startswith(("utf-16", "utf-32")):  # line ends are not single bytes there
        number = 0
        try:
            for number, text in enumerate(io.TextIOWrapper(stream, encoding, newline=""), 1):
                yield number, text
        except UnicodeError as error:
            yield number + 1, BadRow(f"not {encoding}: {str(error).splitlines()[0]}", ENCODING_HINT)
        return
    for number, line in enumerate(stream, 1):
        if number == 1 and line.startswith(BOM):
            line, offset = line[len(BOM) :], len(BOM)
        try:
            yield number, codec.decode(line)[0]
        except UnicodeDecodeError as error:
            name = "UTF-8" if codec.name == "utf-8" else encoding
            what = f"byte {offset + error.start} (0x{line[error.start]:02x}) is not {name}"
            yield number, BadRow(what, ENCODING_HINT)
        offset += len(line)


def _decoded(stream: BinaryIO, file: str, encoding: str) -> Iterator[tuple[int, str]]:
    """The same for formats in which a bad line spoils the rest."""
    for number, line in _lines(stream, encoding):
        if isinstance(line, BadRow):
            raise DataError(line.what, line.hint, file=file, line=number)
        yield number, line


def _read_jsonl(stream: BinaryIO, file: str, encoding: str) -> Numbered:
    del file
    for number, line in _lines(stream, encoding):
        if isinstance(line, BadRow):
            yield number, line
        elif line.strip():
            try:
                row = _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                yield number, BadRow(f"not a JSON object: {_reason(error)}")
                continue
            yield (
                number,
                (
                    row
                    if isinstance(row, dict)
                    else BadRow(f"expected an object with columns, found {type_name(row)}")
                ),
            )


def _read_json(stream: BinaryIO, file: str, encoding: str) -> Numbered:
    """A list of objects, an object with one list of objects in it, or JSON Lines under the name
    .json.
    """
    text = "".join(line for _, line in _decoded(stream, file, encoding))
    start = _skip_space(text, 0)
    if text.startswith("{", start):
        try:
            whole = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            if not isinstance(error, json.JSONDecodeError) or error.msg != "Extra data":
                raise _not_json(error, file) from None
            yield from _read_jsonl(io.BytesIO(text.encode()), file, "utf-8")
            return
        tables = [
            value
            for value in whole.values()
            if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if "\n" not in text.strip() and not (len(tables) == 1 and len(whole) == 1):
            yield 1, whole  # one line: JSON Lines with a single row
        elif len(tables) == 1:
            if beside := [
                name
                for name, value in whole.items()
                if value is not tables[0] and not is_blank(value)
            ]:
                name = next(name for name, value in whole.items() if value is tables[0])
                what = (
                    f"beside the list '{name}' there is {', '.join(beside)}, which would be ignored"
                )
                raise DataError(
                    what, f"keep the list alone: jq .{name} {file} > rows.json", file=file, line=1
                )
            for row in tables[0]:
                yield None, _object(row)
        else:
            raise DataError(
                "expected a list of objects, or one object with a list of objects in it",
                file=file,
                line=1,
            )
        return
    if not text.startswith("[", start):
        if text.strip():
            raise DataError("expected a list of objects", file=file, line=1)
        return
    yield from _json_items(text, start + 1, file)


def _json_items(text: str, position: int, file: str) -> Numbered:
    """The items of a JSON list one by one, so that each has its line."""
    line, counted = 1, 0
    while True:
        position = _skip_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            return
        try:
            row, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _not_json(error, file, line) from None
        yield line, _object(row)
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position += 1
        elif not text.startswith("]", position):
            raise DataError(
                "not JSON: the list ends without a closing bracket",
                file=file,
                line=1 + text.count("\n", 0, position),
            )


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _object(row: Any) -> Row | BadRow:
    return (
        row
        if isinstance(row, dict)
        else BadRow(f"expected an object with columns, found {type_name(row)}")
    )


def _read_csv(stream: BinaryIO, file: str, encoding: str, delimiter: str) -> Numbered:
    def lines() -> Iterator[str]:
        for number, line in _decoded(stream, file, encoding):
            if "\0" in line:
                raise DataError(
                    "the line contains a NUL character",
                    "is it UTF-16? save the file as UTF-8",
                    file=file,
                    line=number,
                )
            yield line

    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    start = 1
    try:
        header = next(reader, None)
        if header is None:
            return
        if other := _other_delimiter(header):
            what = f"one column, {header[0]!r}: the columns seem to be separated by {other!r}"
            raise DataError(
                what, f'say so: data.delimiter: "{other}"'.replace("\t", "\\t"), file=file, line=1
            )
        _once(header, file, 1)
        start = reader.line_num + 1
        for values in reader:
            if len(values) == len(header):
                yield start, dict(zip(header, values, strict=True))
            elif values:
                yield start, BadRow(f"{len(values)} fields, but the header has {len(header)}")
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", file=file, line=start) from None


def _once(names: list[str], file: str, line: int | None = None) -> list[str]:
    """Column names, each of which stands there once: of equal ones, all but the last
    would be lost.
    """
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"column names appear twice: {', '.join(repeated)}", file=file, line=line)
    return names


def _other_delimiter(header: list[str]) -> str:
    """The sign that separates the columns of a header that was read as one column; empty where
    there is none.
    """
    return next((sign for sign in ";\t|," if sign in header[0]), "") if len(header) == 1 else ""


def guessed_delimiter(path: Path) -> str | None:
    """The sign that separates the columns of a .csv or .tsv file where it is not the
    ending's own.
    """
    if data_format(path) not in (".csv", ".tsv"):
        return None
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        try:
            header = stream.readline(100_000).decode("utf-8", "replace").rstrip("\r\n")
        except (EOFError, gzip.BadGzipFile, zlib.error):  # reading the rows says what is wrong
            return None
    own = "\t" if data_format(path) == ".tsv" else ","
    return _other_delimiter(next(csv.reader([header], delimiter=own), [""])) or None


def _columnar(path: Path, kind: str, file: str, max_rows: int | None) -> Table:
    import pyarrow

    def batches() -> Iterator[pyarrow.RecordBatch]:
        if kind == ".parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(path) as parquet:
                yield from parquet.iter_batches(COLUMNAR_ROWS)
            return
        with pyarrow.memory_map(str(path)) as stream:
            try:
                reader = pyarrow.ipc.open_file(stream)
                yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:
                stream.seek(0)
                yield from pyarrow.ipc.open_stream(stream)

    def rows() -> Numbered:
        left = max_rows
        try:
            for batch in batches():
                for start in range(0, len(batch), COLUMNAR_ROWS):
                    part = batch.slice(
                        start, COLUMNAR_ROWS if left is None else min(left, COLUMNAR_ROWS)
                    )
                    yield from ((None, row) for row in part.to_pylist())
                    left = None if left is None else left - len(part)
                    if left == 0:
                        return
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"cannot be read as {kind[1:]}: {str(error).splitlines()[0]}", file=file
            ) from None

    try:
        if kind == ".parquet":
            from pyarrow.parquet import read_schema

            return Table(file, rows, _once(list(read_schema(path).names), file))
        with pyarrow.memory_map(str(path)) as stream:
            try:
                return Table(
                    file, rows, _once(list(pyarrow.ipc.open_file(stream).schema.names), file)
                )
            except pyarrow.ArrowInvalid:
                stream.seek(0)
                return Table(
                    file, rows, _once(list(pyarrow.ipc.open_stream(stream).schema.names), file)
                )
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"cannot be read as {kind[1:]}: {str(error).splitlines()[0]}", file=file
        ) from None
