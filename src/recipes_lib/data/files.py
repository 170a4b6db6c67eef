"""Rows of data files: JSON Lines, JSON, CSV and TSV, also as .gz, Parquet and Arrow.

Nothing is converted, which is why `datasets` reads no text: its CSV reader turns the answer "NA"
into null and "007" into 7, and its JSON reader names no line. A number stays a number, and is
reported where its column should be text.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from recipes_lib.config.sections import DATA_FORMATS, data_format
from recipes_lib.core.errors import DataError, one_line
from recipes_lib.core.files import Row, refuse_pipe
from recipes_lib.data.rows import BadRow, lone_surrogate, shown_real_path, type_name

ENCODING_HINT = "convert it with iconv, or say what it is: data.encoding (latin-1, cp1252, utf-16)"
Numbered = tuple[int | None, Row | BadRow]


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
    kind, file = data_format(path), shown_real_path(path)
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
