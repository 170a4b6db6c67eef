"""Rows of local data files: JSON Lines, JSON, CSV, TSV, also as .gz, Parquet and Arrow.

Text formats are read line by line, not through `datasets`, so that every error names file and line.
Nothing is converted: a number stays one, and is reported where its column should be text.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from recipes_lib.config.sections import DATA_FORMATS, TEXT_FORMATS, data_format
from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import Row, refuse_pipe
from recipes_lib.data.conversations import is_blank
from recipes_lib.data.examples import BadRow, shown_real_path, type_name

COLUMNAR_ROWS = 10_000
BLOCK_BYTES = 1 << 20
ENCODING_HINT = (
    "convert it with iconv; for a recipe's rows, data.encoding may say what the file is instead"
    " (utf-8, latin-1, cp1252, utf-16, ...)"
)
Numbered = Iterator[tuple[int | None, Row | BadRow]]
_SPACE = re.compile(r"[ \t\r\n]*")


class Table:
    """The rows of one file, read anew each time they are iterated: pairs of a line (None without
    lines) and a row, or the reason why it is none.

    Args:
        file: the path as the user would type it, or a Hub id.
        columns: all column names, where the format tells them.
        columnar: whether Arrow holds the rows, which fills in null for keys of other rows.
    """

    def __init__(
        self,
        file: str,
        read: Callable[[], Numbered],
        columns: list[str] | None = None,
        columnar: bool = False,
    ) -> None:
        self.file = file
        self.columnar = columnar
        self._read = read
        self._columns = columns

    def __iter__(self) -> Numbered:
        return self._read()

    @cached_property
    def columns(self) -> list[str]:
        """All column names, in the order of first appearance."""
        if self._columns is not None:
            return self._columns
        rows = (row for _, row in self if not isinstance(row, BadRow))
        return list(dict.fromkeys(name for row in rows for name in row))

    @cached_property
    def numbered_rows(self) -> list[tuple[int | None, Row]]:
        """All rows at once, each with its line.

        Raises:
            DataError: a line is not a row.
        """
        whole = []
        for line, row in self:
            if isinstance(row, BadRow):
                raise DataError(row.what, *filter(None, [row.hint]), file=self.file, line=line)
            whole.append((line, row))
        return whole

    @property
    def rows(self) -> list[Row]:
        """All rows at once, as `numbered_rows`."""
        return [row for _, row in self.numbered_rows]


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
        max_rows: no more than the first of these.
        delimiter: between the columns of .csv and .tsv; None for the ending's own.

    Raises:
        DataError: no such file, or not a known format.
    """
    path = path.expanduser()
    kind, file = data_format(path), shown_real_path(path)
    if kind is None:
        what = "not a data file" if path.exists() else "no such file"
        endings = f"known endings: {', '.join(DATA_FORMATS)}, text formats also with .gz"
        raise DataError(f"{what}; {endings}", file=file)
    refuse_pipe(path, file)
    if kind in (".parquet", ".arrow"):
        with _opened_columnar(path, kind, file) as (names, _):
            _check_once(names, file)

        def read() -> Numbered:
            size = min(COLUMNAR_ROWS, max_rows or COLUMNAR_ROWS)
            with _opened_columnar(path, kind, file, size) as (_, batches):
                rows = ((None, row) for batch in batches for row in batch.to_pylist())
                yield from islice(rows, max_rows)

        return Table(file, read, names, columnar=True)

    def numbered(stream: BinaryIO) -> Numbered:
        if kind in (".csv", ".tsv"):
            return _read_csv(stream, file, encoding, delimiter or _own_delimiter(kind))
        if kind == ".json":
            return _read_json(stream, file, encoding)
        return _read_jsonl(stream, encoding)

    def read_text() -> Numbered:
        last = 0
        try:
            with _open(path) as stream:
                for line, row in islice(numbered(stream), max_rows):
                    last = line or 0
                    yield line, row
        except EOFError:
            raise DataError(
                f"the gzip file is truncated: it ends after line {last}", file=file, line=last + 1
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"not a gzip file, or damaged: {error}", file=file) from None
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", file=file) from None

    return Table(file, read_text)


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
    if kind in (".json", ".arrow"):
        return sum(1 for _ in read_file(path))
    with _open(path) as stream:
        lines, last = 0, b"\n"
        while block := stream.read(BLOCK_BYTES):
            lines, last = lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n") - (kind in (".csv", ".tsv"))


def guessed_delimiter(path: Path) -> str | None:
    """The sign between the columns of a .csv or .tsv file where it is not the ending's own."""
    if (kind := data_format(path)) not in (".csv", ".tsv"):
        return None
    with _open(path) as stream:
        try:
            header = stream.readline(100_000).decode("utf-8", "replace").rstrip("\r\n")
        except (EOFError, gzip.BadGzipFile, zlib.error):  # reading the rows says what is wrong
            return None
    return (
        _other_delimiter(next(csv.reader([header], delimiter=_own_delimiter(kind)), [""])) or None
    )


def guessed_encoding(path: Path) -> str | None:
    """The encoding of a text file that is not UTF-8: latin-1, or cp1252 where bytes are no letters
    there. None for UTF-8, damaged or not, and other formats.
    """
    if data_format(path) not in TEXT_FORMATS:
        return None
    decoder, foreign, controls = codecs.getincrementaldecoder("utf-8")("replace"), False, False
    try:
        with _open(path) as stream:
            while block := stream.read(BLOCK_BYTES):
                text = decoder.decode(block)
                if "\0" in text or re.search(r"[^\x00-\x7f\ufffd]", text):
                    return None
                foreign = foreign or "\ufffd" in text
                controls = controls or bool(re.search(rb"[\x80-\x9f]", block))
    except (EOFError, OSError, zlib.error):  # reading the rows says what is wrong
        return None
    return ("cp1252" if controls else "latin-1") if foreign else None


def _own_delimiter(kind: str) -> str:
    return "\t" if kind == ".tsv" else ","


def _other_delimiter(header: list[str]) -> str:
    """The sign in a header that was read as one column; empty where there is none."""
    return next((sign for sign in ";\t|," if sign in header[0]), "") if len(header) == 1 else ""


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(stream: BinaryIO, encoding: str) -> Iterator[tuple[int, str | BadRow]]:
    """Lines as text with their number, or the reason, with the byte offset, why one is no text."""
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
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line, offset = line.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
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


def _distinct(pairs: list[tuple[str, Any]]) -> Row:
    """An object whose keys are all different: of equal ones, only the last would stay."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


def _reason(error: Exception) -> str:
    """What is wrong with a JSON text, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    # behind a semicolon, advice for programmers
    return "nested too deep" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def _not_json(error: Exception, file: str, line: int = 1) -> DataError:
    line = error.lineno if isinstance(error, json.JSONDecodeError) else line
    return DataError(f"not JSON: {_reason(error)}", file=file, line=line)


def _object(row: Any) -> Row | BadRow:
    if isinstance(row, dict):
        return row
    return BadRow(f"expected an object with columns, found {type_name(row)}")


def _read_jsonl(stream: BinaryIO, encoding: str) -> Numbered:
    for number, line in _lines(stream, encoding):
        if isinstance(line, BadRow):
            yield number, line
        elif line.strip():
            try:
                row = _object(_DECODER.decode(line))
            except (ValueError, RecursionError) as error:
                row = BadRow(f"not a JSON object: {_reason(error)}")
            yield number, row


def _read_json(stream: BinaryIO, file: str, encoding: str) -> Numbered:
    """A list of objects, an object with one list of objects in it, or JSON Lines under the name
    .json.
    """
    text = "".join(line for _, line in _decoded(stream, file, encoding))
    body = text.lstrip(" \t\r\n")
    if body.startswith("["):
        yield from _json_items(text, len(text) - len(body) + 1, file)
    elif not body.startswith("{"):
        if text.strip():
            raise DataError("expected a list of objects", file=file, line=1)
    else:
        try:
            whole = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            if not isinstance(error, json.JSONDecodeError) or error.msg != "Extra data":
                raise _not_json(error, file) from None
            yield from _read_jsonl(io.BytesIO(text.encode()), "utf-8")
            return
        lists = [
            name
            for name, value in whole.items()
            if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if "\n" not in text.strip() and not len(lists) == len(whole) == 1:
            yield 1, whole  # one line: JSON Lines with a single row
            return
        if len(lists) != 1:
            what = "expected a list of objects, or one object with a list of objects in it"
            raise DataError(what, file=file, line=1)
        rows = whole.pop(lists[0])
        if beside := [name for name, value in whole.items() if not is_blank(value)]:
            raise DataError(
                f"beside the list '{lists[0]}' there is {', '.join(beside)}, which would be"
                " ignored",
                f"keep the list alone: jq .{lists[0]} {file} > rows.json",
                file=file,
                line=1,
            )
        yield from ((None, _object(row)) for row in rows)


def _json_items(text: str, position: int, file: str) -> Numbered:
    """The items of a JSON list one by one, so that each has its line."""
    line, counted = 1, 0

    def skip_space(position: int) -> int:
        return _SPACE.match(text, position).end()  # type: ignore[union-attr]

    while not text.startswith("]", position := skip_space(position)):
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _not_json(error, file, line) from None
        yield line, _object(row)
        position = skip_space(position)
        if text.startswith(",", position):
            position += 1
        elif not text.startswith("]", position):
            raise DataError(
                "not JSON: the list ends without a closing bracket",
                file=file,
                line=1 + text.count("\n", 0, position),
            )


def _read_csv(stream: BinaryIO, file: str, encoding: str, delimiter: str) -> Numbered:
    def lines() -> Iterator[str]:
        for number, line in _decoded(stream, file, encoding):
            if "\0" in line:
                what, hint = (
                    "the line contains a NUL character",
                    "is it UTF-16? save the file as UTF-8",
                )
                raise DataError(what, hint, file=file, line=number)
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
            hint = f'say so: data.delimiter: "{other}"'.replace("\t", "\\t")
            raise DataError(what, hint, file=file, line=1)
        _check_once(header, file, 1)
        start = reader.line_num + 1
        for values in reader:
            if len(values) == len(header):
                yield start, dict(zip(header, values, strict=True))
            elif values:
                yield start, BadRow(f"{len(values)} fields, but the header has {len(header)}")
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", file=file, line=start) from None


def _check_once(names: list[str], file: str, line: int | None = None) -> None:
    """Refuse column names of which two are equal: only the last would stay."""
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"column names appear twice: {', '.join(repeated)}", file=file, line=line)


@contextmanager
def _opened_columnar(
    path: Path, kind: str, file: str, size: int = COLUMNAR_ROWS
) -> Iterator[tuple[list[str], Iterable[Any]]]:
    """The column names of a Parquet or Arrow file, or of an Arrow stream, as `datasets` writes it,
    and its rows in parts of at most `size`.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        if kind == ".parquet":
            with ParquetFile(path) as parquet:
                yield list(parquet.schema_arrow.names), parquet.iter_batches(size)
            return
        with pyarrow.memory_map(str(path)) as stream:
            try:
                reader = pyarrow.ipc.open_file(stream)
            except pyarrow.ArrowInvalid:
                stream.seek(0)
                reader = pyarrow.ipc.open_stream(stream)
            table = reader.read_all()
            starts = range(0, table.num_rows, size)
            yield list(table.schema.names), (table.slice(start, size) for start in starts)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"cannot be read as {kind[1:]}: {str(error).splitlines()[0]}"
        raise DataError(what, file=file) from None
