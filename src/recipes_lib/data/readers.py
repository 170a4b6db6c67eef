"""Data files as rows with the columns of the file; errors name rows by file and line.

Values are not converted, so `datasets` reads no text: its CSV reader turns the answer "NA" into
null and "007" into 7, and its JSON reader names no line.
"""

import codecs
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes_lib.config.recipe import DATA_FORMATS, data_format
from recipes_lib.core.errors import DataError, one_line
from recipes_lib.core.project import shown_path
from recipes_lib.data.errors import BadRow, BadRows
from recipes_lib.data.rows import DataRow
from recipes_lib.data.values import NOT_UTF8, parsed_json

_BEFORE_JSON = codecs.BOM_UTF8 + b" \t\r\n"
Numbered = tuple[int | None, Any]  # a row, its JSON text, or why it is none


def read_file(path: Path, bad: BadRows | None = None) -> list[DataRow]:
    """Return the rows of a data file with its columns. Lines that are no rows are added to `bad`;
    without it, they are an error.
    """
    path = path.expanduser()
    kind = data_format(path)
    file = shown_path(path)
    if kind is None or not path.is_file():  # or a pipe, which may never end
        what = f"not a data file; known endings: {', '.join(DATA_FORMATS)}"
        raise DataError(what if path.exists() else "no such file", file=file)
    rows = []
    no_rows = BadRows() if bad is None else bad
    try:
        for number, (line, values) in enumerate(_READERS[kind](path), 1):
            row = DataRow(file if line else f"{file} row {number}", line, {})
            try:
                if isinstance(values, BadRow):
                    raise values
                row.fields = parsed_json(values, dict, "the row")
                rows.append(row)
            except BadRow as reason:
                no_rows.add(row, reason)
    except DataError as error:
        error.file = file
        raise
    except ModuleNotFoundError:  # pyarrow, which an extra brings
        raise
    except Exception as error:  # of a codec, csv, pyarrow or the disk
        hints = [NOT_UTF8] if isinstance(error, UnicodeDecodeError) else []
        what = f"cannot be read as {kind[1:]}: {one_line(error)}"
        raise DataError(what, *hints, file=file) from None
    if bad is None and len(no_rows):
        raise no_rows.error()
    return rows


def _read_jsonl(path: Path) -> Iterator[Numbered]:
    with path.open("rb") as lines:
        first = lines.readline().strip(_BEFORE_JSON)
        # a list of numbers may be one bad row; of a list of objects, the first one or its "[" is
        # here, and every line would be an error
        if first.startswith(b"[") and (b"{" in first or not first.endswith(b"]")):
            what = "a JSON list, where each line has to be an object of its own"
            raise DataError(what, "give the file the ending .json")
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


def _read_json(path: Path) -> Iterator[Numbered]:
    """Read a list of objects, or JSON Lines under the name .json."""
    content = path.read_bytes()
    if not content.lstrip(_BEFORE_JSON).startswith(b"["):
        return _read_jsonl(path)
    return ((None, row) for row in json.loads(content))


def _read_csv(path: Path) -> Iterator[Numbered]:
    csv.field_size_limit(sys.maxsize)  # Python's own is 131,072 characters
    with path.open(encoding="utf-8-sig", newline="") as stream:
        sign = "\t" if data_format(path) == ".tsv" else ","
        reader = csv.DictReader(stream, delimiter=sign, strict=True)
        names = list(reader.fieldnames or [])
        for other in (";", ",", "\t", "|"):
            if len(names) == 1 and other in names[0]:
                what = f"the header has one column, {names[0]!r}: fields are separated by {sign!r}"
                raise DataError(what, "save the file with commas as .csv, or with tabs as .tsv")
        start = reader.line_num + 1
        for row in reader:
            is_whole = None not in row and None not in row.values()
            yield start, row if is_whole else BadRow(f"not {len(names)} fields like the header")
            start = reader.line_num + 1


def _read_parquet(path: Path) -> Iterator[Numbered]:
    from pyarrow.parquet import read_table

    for batch in read_table(path).to_batches():
        yield from ((None, without_nulls(row)) for row in batch.to_pylist())


def without_nulls(value: Any) -> Any:
    """Return the value without the keys that Arrow fills in with null, as another row has them."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
