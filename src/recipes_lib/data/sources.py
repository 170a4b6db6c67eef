"""Where the rows come from: a local file, a folder, a Hub data set, or a mixture of these. A local
path wins over a Hub id of the same name.

Nothing is converted, which is why `datasets` reads no text: its CSV reader turns the answer "NA"
into null and "007" into 7, and its JSON reader names no line.
"""

from __future__ import annotations

import codecs
import csv
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
from recipes_lib.core.files import Row, remembered_hash
from recipes_lib.core.project import shown_path
from recipes_lib.data.conversations import without_nulls
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
    """One source of a mixture; a single `data.source` is a mixture of one."""

    source: str
    subset: str | None = None
    source_split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str]
    encoding: str = "utf-8"
    delimiter: str | None = None
    max_examples: int | None = None
    weight: float = 1  # times that an epoch has its training rows; below 1, the share that is read


def listed_sources(section: DataSection) -> list[Source]:
    """Return the sources that `data.source` names; the keys that they share are checked."""
    if not section.source:
        raise SettingError("data.source", "is empty: name at least one source")
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
    """Return the rows of one source, as `read_file` returns them; at most `max_rows` of a file."""
    if is_on_hub(source):
        return [
            DataRow(source.source, None, number, without_nulls(row))
            for number, row in enumerate(hub_data_set(source), 1)
        ]
    keys: dict[str, Any] = {"encoding": source.encoding, "delimiter": source.delimiter}
    files = source_files(source)
    return [row for file in files for row in read_file(file, bad, max_rows=max_rows, **keys)]


def source_files(source: Source) -> list[Path]:
    """Return the files of a local source, or raise an error that names the nearest."""
    if (path := find_path(source.source)) is not None:
        return [path] if path.is_file() else data_files(path, source.source_split)
    path = Path(source.source).expanduser()
    parent = path.parent.resolve()
    hints = [*near_file(path), f"looked in {shown_path(parent)}"]
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
    shown = shown_path(folder)
    files: list[Path] = []
    for place in (folder, folder / split, folder / "data"):
        paths = sorted(place.glob("[!.]*"))
        files = files or [path for path in paths if data_format(path) and path.name not in NOT_DATA]
    if not files:
        what = f"no data file in this folder; known endings: {', '.join(DATA_FORMATS)}"
        raise DataError(what, file=shown)

    def of_split(words: str) -> list[Path]:
        name = re.compile(rf"(^|[-_.])({words})([-_.]|$)")
        return [path for path in files if name.search(path.name.lower())]

    named = of_split("|".join(SPLIT_WORDS.values()))
    chosen = of_split(SPLIT_WORDS.get(split, re.escape(split)))
    chosen = chosen or [path for path in files if path not in named]
    if not chosen:
        what = f"{shown} has no file of the split '{split}', only {files[0].name} and the like"
        raise SettingError("data.source_split", what)
    return chosen


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
        delimiter: between the columns of .csv and .tsv; None for the ending's own.
    """
    path = path.expanduser()
    kind, file = data_format(path), shown_path(path)
    if kind is None or not path.is_file():  # or a pipe, which may never end
        what = f"not a data file; known endings: {', '.join(DATA_FORMATS)}"
        raise DataError(what if path.exists() else "no such file", file=file)
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
            if isinstance(values, BadRow):
                no_rows.add(DataRow(file, line, number, {}), values)
            else:
                rows.append(DataRow(file, line, number, values))
    except DataError as error:
        error.file = file
        raise
    except Exception as error:  # of pyarrow, the disk, or a codec
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
    if kind == ".json":
        return len(read_file(path))
    with path.open("rb") as stream:
        return sum(1 for line in stream if line.strip()) - (kind in (".csv", ".tsv"))


def _numbered(path: Path, kind: str, encoding: str, delimiter: str | None) -> Iterator[Numbered]:
    if kind == ".parquet":
        from pyarrow.parquet import read_table

        for batch in read_table(path).to_batches():
            yield from ((None, without_nulls(row)) for row in batch.to_pylist())
        return
    # Bytes that are no text become lone surrogates, so that only their line is a bad row.
    name = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    with path.open(encoding=name, errors="surrogateescape", newline="") as stream:
        if kind == ".json":
            yield from _read_json(stream.read())
        elif kind in (".csv", ".tsv"):
            yield from _read_csv(stream, delimiter or ("\t" if kind == ".tsv" else ","))
        else:
            yield from _read_jsonl(stream)


def _no_text(line: str) -> BadRow | None:
    """Return the error about a byte that could not be decoded."""
    if byte := re.search("[\udc80-\udcff]", line):
        what = f"byte 0x{ord(byte[0]) - 0xDC00:02x} is not UTF-8"
        return BadRow(what, "save it as UTF-8, or set data.encoding (latin-1, cp1252, utf-16)")
    return None


def _read_jsonl(lines: Iterable[str]) -> Iterator[Numbered]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = _object(parsed_json(line.rstrip(), "the line"))
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
        if len(header) == 1 and (other := next((s for s in ";\t|," if s in header[0]), "")):
            what = f"one column, {header[0]!r}: the columns seem to be separated by {other!r}"
            hint = f'write commas, or set data.delimiter: "{other}"'.replace("\t", "\\t")
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
