"""Reading the JSON and JSON-lines files that this project wrote, after a crash too.

A kill or a power cut leaves the end of an appended file cut, full of zeros, or no text: those last
lines were never acknowledged, so they are left out, with one warning. Damage anywhere else is named
by file and line. Files of other programs have readers of their own.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import DataError, EnvironmentFault
from recipes_lib.core.terminal import warn

Row = dict[str, Any]
BLOCK = 2**16
_INVALID = re.compile("[\ud800-\udfff\x00]")
_warn_once = functools.cache(warn)  # a file is often read several times by one command


def utc_now() -> str:
    """Return the time as our files note it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def valid_text(text: str) -> str:
    """Return a text that every later reader takes: lone surrogates and NUL become the replacement
    character.

    Example:
        >>> valid_text("a\\ud800b") == "a\\ufffdb"
        True
    """
    return _INVALID.sub("\ufffd", text)


def valid_texts(value: Any) -> Any:
    """Return a JSON value with `valid_text` in place of every text."""
    if isinstance(value, dict):
        return {valid_text(key): valid_texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [valid_texts(item) for item in value]
    return valid_text(value) if isinstance(value, str) else value


class DamagedFile(DataError):
    """A file of ours that is not what was written to it."""


def refuse_pipe(path: Path, shown: str | Path | None = None) -> None:
    """Refuse a pipe or a device where a file is wanted: reading it may never end, and most files
    are read more than once.

    Raises:
        DataError: it is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(
            "is a pipe or a device, not a file",
            "write its content to a file first",
            file=shown or path,
        )


def read_object(path: Path, remedy: str = "restore it, or run the step again that wrote it") -> Row:
    """Return a JSON object; an absent file is an empty one.

    Args:
        remedy: what to do about a damaged file.

    Raises:
        DamagedFile: the file is not a JSON object.
        EnvironmentFault: it cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        what = "is empty" if not path.stat().st_size else f"is damaged, not JSON: {error}"
        raise DamagedFile(what, remedy, file=path) from None
    except OSError as error:
        raise EnvironmentFault(f"cannot be read: {error.strerror}", file=path) from None
    if not isinstance(value, dict):
        raise DamagedFile(f"holds {type(value).__name__}, not an object", remedy, file=path)
    return value


def read_rows(path: Path, skip_damaged: bool = False) -> Iterator[Row]:
    """Yield the objects of a JSON-lines file, line by line; an absent file has none. Lines that a
    crash damaged at its end are left out.

    Args:
        skip_damaged: leave out damaged lines in the middle too, each with a warning: for logs,
            where a line less changes no result.

    Raises:
        DamagedFile: a line before the end is damaged, or a line is not an object.
    """
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for _, _, row in numbered_rows(stream, path, skip_damaged=skip_damaged):
            yield row


def numbered_rows(
    lines: Iterable[bytes],
    path: Path,
    first: int = 1,
    what: str = "a JSON object",
    remedy: str = "",
    skip_damaged: bool = False,
    appended: bool = False,
) -> Iterator[tuple[int, int, Row]]:
    """Yield number, end (bytes from the start of `lines`) and object of each line; `read_rows` says
    what happens to damaged ones.

    Args:
        lines: with their line ends, as a file opened in binary gives them.
        path: for messages.
        first: number of the first line.
        what: a line holds, for messages.
        remedy: what to do about a damaged line that is not at the end.
        skip_damaged: as for `read_rows`.
        appended: lines are appended to this file, so a last line without a line end was cut, even
            where it is whole JSON.
    """
    end, number, damaged, any_row = 0, first - 1, 0, first > 1

    def error(what: str, line: int) -> DamagedFile:
        return DamagedFile(what, *([remedy] if remedy else []), file=path, line=line)

    for number, line in enumerate(lines, first):
        end += len(line)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8", "surrogatepass"))
            if b"\\u" in line or b"\xed" in line:  # an escape, or the first byte of a surrogate
                row = valid_texts(row)
            whole = line.endswith(b"\n") or not appended
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            damaged = damaged or number
            continue
        if damaged and not skip_damaged:
            raise error(f"this line is damaged: not {what}", damaged)
        if damaged:
            _warn_once(f"{path}:{damaged}: this line is damaged and left out")
        if not isinstance(row, dict):
            raise error(f"this line holds {type(row).__name__}, not {what}", number)
        damaged, any_row = 0, True
        yield number, end, row
    if damaged and not any_row and number > damaged:
        raise error(f"this line is damaged: not {what}", damaged)
    if damaged:
        _warn_once(
            f"{path}:{damaged}: the end of the file is damaged, as a crash leaves it; it is"
            " left out"
        )


def rows_from_the_end(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield end (in bytes) and object of each whole line, the last one first; damaged lines are
    left out. An absent file has none.
    """
    if not path.is_file():
        return
    with path.open("rb") as stream:
        start = stream.seek(0, os.SEEK_END)  # of `block` in the file
        block, stop = b"", 0  # block[:stop] is still to be read
        while start or stop:
            line_start = block.rfind(b"\n", 0, max(stop - 1, 0)) + 1
            if line_start == 0 and start:  # the line begins before the block
                size = min(start, max(BLOCK, stop))
                start = stream.seek(start - size)
                block = stream.read(size) + block[:stop]
                stop = len(block)
                continue
            line, end, stop = block[line_start:stop], start + stop, line_start
            if not line.endswith(b"\n"):
                continue
            try:
                row = json.loads(line.decode("utf-8", "surrogatepass"))
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield end, row


def object_or_none(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
