"""Files that are either whole or absent, and the one reader and writer of JSON and JSON lines.

A rename reaches the disk before the bytes it names, unless those were flushed first: after a power
cut the name is there and the file is full of zeros. So whatever gets its final name by a rename
gets it here, from `write_bytes` or `publish`.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import DataError, EnvironmentFault
from recipes_lib.core.terminal import warn

Row = dict[str, Any]
_NOT_TEXT = re.compile("[\ud800-\udfff\x00]")
_warn_once = functools.cache(warn)  # a file is often read several times by one command


class DamagedFile(DataError):
    """A file of ours that is not what was written to it."""


# Writing


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing
    between.

    Raises:
        OSError: the disk is full or not writable; it names the file. The old file is untouched and
            no temporary file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        # created as any file is, so that the user's umask decides who may read it
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a write that fails does not say it
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically, keys in the order given, one final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def publish(scratch: Path, final: Path, replace: bool = True) -> None:
    """Give a finished folder its final name, once everything in it is on the disk.

    A crash leaves the old folder, the new one, or neither, never a mixture; the next `publish`
    removes what it left behind.

    Args:
        scratch: the folder, beside `final` on the same file system.
        final: its name; an empty folder of that name is replaced in any case.
        replace: whether a folder that has something in it is replaced too.

    Raises:
        OSError: the disk is full or not writable, or `final` is not empty and not to be replaced.
    """
    sync_tree(scratch)
    old = final.with_name(f".{final.name}.replaced")
    if replace:
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.replace(final, old)
    os.replace(scratch, final)
    sync(final.parent)
    if replace:
        shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush every file and every folder below `folder`, and `folder` itself, to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Hashes


def hash_of(*parts: Any) -> str:
    """Return the SHA-256 of JSON-ready values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files below `folder` by name."""
    return {name: file_hash(folder / name) for name in names}


# Reading


def utc_now() -> str:
    """Return the time as our files note it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def refuse_pipe(path: Path, shown: str | Path | None = None) -> None:
    """Refuse a pipe or a device where a file is wanted: reading it may never end.

    Raises:
        DataError: it is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        what, remedy = "is a pipe or a device, not a file", "write its content to a file first"
        raise DataError(what, remedy, file=shown or path)


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


def object_or_none(path: Path) -> Row | None:
    """Return a JSON object, or None if the file is missing or damaged."""
    try:
        return read_object(path) if path.is_file() else None
    except (DamagedFile, EnvironmentFault):
        return None


def read_rows(path: Path, skip_damaged: bool = False) -> Iterator[Row]:
    """Yield the objects of a JSON-lines file; an absent file has none. Lines that a crash damaged
    at its end are left out, with one warning.

    Args:
        skip_damaged: leave out damaged lines in the middle too, each with a warning: for logs,
            where a line less changes no result.

    Raises:
        DamagedFile: a line before the end is damaged, or a line is not an object.
    """
    if path.is_file():
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
        what: what a line holds, for messages.
        remedy: what to do about a damaged line that is not at the end.
        skip_damaged: as for `read_rows`.
        appended: lines are appended to this file, so a last line without a line end was cut, even
            where it is whole JSON.
    """
    hints = [remedy] if remedy else []
    end = damaged = last = 0
    good = first > 1
    for number, line in enumerate(lines, first):
        end += len(line)
        if not line.strip():
            continue
        last = number
        row = _parsed(line)
        if row is None or (appended and not line.endswith(b"\n")):
            damaged = damaged or number
            continue
        if damaged and not skip_damaged:
            break
        if damaged:
            _warn_once(f"{path}:{damaged}: this line is damaged and left out")
            damaged = 0
        if not isinstance(row, dict):
            holds = f"this line holds {type(row).__name__}, not {what}"
            raise DamagedFile(holds, *hints, file=path, line=number)
        good = True
        yield number, end, row
    else:
        if damaged and (good or last == damaged):
            _warn_once(f"{path}:{damaged}: the end of the file is damaged and left out")
            return
    if damaged:
        raise DamagedFile(f"this line is damaged: not {what}", *hints, file=path, line=damaged)


def rows_from_the_end(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield end (in bytes) and object of each whole line, the last one first; damaged lines are
    left out. An absent file has none.
    """
    content = path.read_bytes() if path.is_file() else b""
    end = len(content)
    for line in reversed(content.splitlines(keepends=True)):
        row = _parsed(line) if line.endswith(b"\n") else None
        if isinstance(row, dict):
            yield end, row
        end -= len(line)


def valid_text(text: str) -> str:
    """Return a text that every later reader takes: lone surrogates and NUL become the replacement
    character.

    Example:
        >>> valid_text("a\\ud800b") == "a\\ufffdb"
        True
    """
    return _NOT_TEXT.sub("\ufffd", text)


def valid_texts(value: Any) -> Any:
    """Return a JSON value with `valid_text` in place of every text."""
    if isinstance(value, dict):
        return {valid_text(key): valid_texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [valid_texts(item) for item in value]
    return valid_text(value) if isinstance(value, str) else value


def _parsed(line: bytes) -> Any:
    """Return the JSON value of one line, None where it has none."""
    try:
        value = json.loads(line.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return None
    # an escape, or the first byte of a surrogate
    return valid_texts(value) if b"\\u" in line or b"\xed" in line else value
