"""Answers and judgments on disk: a JSON-lines file that is appended to and never changed.

A row is written by one `os.write` on an O_APPEND descriptor and synced before `append` returns. Its
`key`, a hash of everything that makes the row, occurs once, so what is stored is not asked again. A
kill or a power cut leaves at most a damaged end, which the next writer cuts; a damaged line
anywhere else is an error that names it. Several processes may append to one file: each append
takes the file's lock and first reads what the others wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from recipes_lib.core.errors import DataError, EnvironmentFault
from recipes_lib.core.files import DamagedFile, Row, parsed_line, sync
from recipes_lib.core.terminal import warn

_DAMAGED = (
    "the file is damaged in its middle, which no killed writer does: restore it, or delete this"
    " line to have it made again"
)


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text, lone surrogates allowed.

    Example:
        >>> text_hash("")[:8]
        'e3b0c442'
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def stored_rows(path: str | Path) -> list[Row]:
    """Return the stored rows, lines that a crash damaged at the end left out; takes no lock and
    changes nothing.

    Raises:
        DataError: a line is damaged or a key occurs twice, with the line number.
    """
    path, rows = Path(path), dict[str, Row]()
    if path.exists():
        with path.open("rb") as stream:
            _take_rows(stream, path, 0, rows)
    return list(rows.values())


def _take_rows(
    lines: Iterable[bytes], path: Path, before: int, rows: dict[str, Row]
) -> tuple[int, int]:
    """Add the rows of whole lines to `rows`; return the number of the last line that holds one, and
    its end in bytes.
    """
    number, end, size, damaged = before, 0, 0, 0
    for line_number, line in enumerate(lines, before + 1):
        size += len(line)
        row = parsed_line(line) if line.endswith(b"\n") else None
        if row is None:
            damaged = damaged or line_number
            continue
        key = row.get("key")
        if damaged or not isinstance(key, str):
            what = "this line is damaged: not a stored row"
            raise DamagedFile(what, _DAMAGED, file=path, line=damaged or line_number)
        if key in rows:
            what = f"the row {key[:12]} occurs twice"
            raise DataError(what, "keep one of the two lines", file=path, line=line_number)
        rows[key] = row
        number, end = line_number, size
    if damaged:
        warn(f"{path}:{damaged}: the end of the file is damaged and left out")
    return number, end


class Store:
    """The rows of one file, in memory and on disk.

    Args:
        path: the JSONL file; made with its first row.
        lock_timeout_s: how long to wait for another process's append.

    Raises:
        DataError: a line is damaged or a key occurs twice.
    """

    def __init__(self, path: str | Path, lock_timeout_s: float = 60.0) -> None:
        self.path = Path(path)
        self._lock = FileLock(self.path.with_name(self.path.name + ".lock"), timeout=lock_timeout_s)
        self._rows: dict[str, Row] = {}
        self._size = self._lines = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._catch_up()

    def _locked(self) -> AcquireReturnProxy:
        try:
            return self._lock.acquire()
        except Timeout:
            what = "another process holds the lock of this file"
            raise EnvironmentFault(what, "wait for it, or end it", file=self.path) from None

    def _catch_up(self) -> None:
        """Read what others appended and cut what a crash left at the end; the lock is held."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._size:
            raise DataError("this file was shortened or deleted while in use", file=self.path)
        if size == self._size:
            return
        with self.path.open("rb+") as file:
            file.seek(self._size)
            self._lines, whole = _take_rows(file, self.path, self._lines, self._rows)
            self._size += whole
            if self._size < size:
                file.truncate(self._size)
                os.fsync(file.fileno())

    def append(self, rows: Sequence[Row]) -> None:
        """Append the rows whose key is new, each with a write of its own, and sync them once.

        Raises:
            EnvironmentFault: the disk is full (whole rows stay, nothing of the failed one is left
                behind), or the lock cannot be had.
        """
        if all(row["key"] in self._rows for row in rows):
            return
        with self._locked():
            self._catch_up()
            new = {row["key"]: row for row in rows if row["key"] not in self._rows}
            if new:
                self._write(list(new.values()))

    def _write(self, rows: Sequence[Row]) -> None:
        """Write lines whole and synced; a line that cannot be written leaves the file as it was
        before it.
        """
        is_new, error = not self.path.exists(), ""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            try:
                for row in rows:
                    line = _line(row)
                    written = os.write(descriptor, line)
                    if written != len(line):
                        error = f"only {written} of {len(line)} bytes could be written"
                        break
                    self._rows[row["key"]] = row
                    self._size += len(line)
                    self._lines += 1
                os.fsync(descriptor)
            except OSError as fault:
                error = str(fault)
            if error:
                os.ftruncate(descriptor, self._size)
                what = f"a row could not be stored: {error}"
                hint = "free some disk and run the same command"
                raise EnvironmentFault(what, hint, file=self.path)
        finally:
            os.close(descriptor)
        if is_new:
            sync(self.path.parent)

    def get(self, key: str) -> Row | None:
        """Return the row with this key, or None."""
        return self._rows.get(key)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())


def _line(row: Row) -> bytes:
    """One JSON line; text that is not valid Unicode (lone surrogates) is escaped."""
    text = json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n"
