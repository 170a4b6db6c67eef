"""The store of judgments: one JSONL file, one line per judgment, appended once and never changed.

A line is written by a single `os.write` on an O_APPEND descriptor and synced before `append`
returns; lines that arrived together are synced together. Each key, a hash of everything that makes
a judgment, occurs once. A kill or a power cut leaves at most a damaged end, which the next writer
cuts; a damaged line anywhere else is an error that names it. Several processes may append to one
file: each append takes the file's lock and first reads what the others wrote. A line with status
`error`, which earlier versions stored for a refused request, is passed over and asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from recipes_lib.core.atomic_files import sync
from recipes_lib.core.errors import DataError, EnvironmentFault
from recipes_lib.core.json_files import Row, numbered_rows


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text, lone surrogates allowed.

    Example:
        >>> text_hash("")[:8]
        'e3b0c442'
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def judgment_key(
    question_id: str | int,
    order: str,
    judge_fingerprint: str,
    prompt_hash: str,
    answer_hashes: Sequence[str],
) -> str:
    """Return the unique key of a judgment.

    Args:
        question_id: 81 and "81" are the same question.
        order: as in `judge.JudgeRequest`.
        prompt_hash: of the prompt as sent.
        answer_hashes: of the answers before truncation, in the prompt's order.
    """
    return text_hash(
        json.dumps([str(question_id), order, judge_fingerprint, prompt_hash, list(answer_hashes)])
    )


def stored_rows(path: str | Path) -> list[Row]:
    """Return the stored rows, lines that a crash damaged at the end left out; takes no lock and
    changes nothing.

    Raises:
        DataError: for a damaged line or a repeated key, with the line number.
    """
    path, rows = Path(path), dict[str, Row]()
    if path.exists():
        with path.open("rb") as stream:
            _take_rows(stream, path, 0, rows, "judgment")
    return list(rows.values())


def _take_rows(
    lines: Iterable[bytes], path: Path, lines_before: int, rows: dict[str, Row], what: str
) -> tuple[int, int]:
    """Add the rows of whole lines to `rows`; return the number of the last line that holds one, and
    its end in bytes.
    """
    remedy = (
        "the file is damaged in its middle, which no killed writer does: restore it, or delete this"
        " line to have it made again"
    )
    number, end, first = lines_before, 0, lines_before + 1
    for number, end, row in numbered_rows(  # noqa: B007 - the last ones are returned
        lines, path, first, f"a stored {what}", remedy, appended=True
    ):
        key = row.get("key")
        if not isinstance(key, str):
            raise DataError(f"this line is not a stored {what}", remedy, file=path, line=number)
        if key in rows:
            twice = f"{what} {key[:12]} occurs twice"
            raise DataError(twice, "keep one of the two lines", file=path, line=number)
        if row.get("status") != "error":
            rows[key] = row
    return number, end


class JudgmentStore:
    """Judgments of one evaluation, in memory and in a file.

    Args:
        path: the JSONL file; created with its first row.
        lock_timeout_s: how long to wait for another process's append.
        what: what a line holds, for messages.

    Raises:
        DataError: for a damaged line or a repeated key.
    """

    def __init__(
        self, path: str | Path, lock_timeout_s: float = 60.0, what: str = "judgment"
    ) -> None:
        self.path, self.what = Path(path), what
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
            what = "another process holds the lock of this store"
            raise EnvironmentFault(what, "wait for it, or end it", file=self.path) from None

    def _catch_up(self) -> None:
        """Read what others appended and cut what a crash left at the end; the lock is held."""
        if not self.path.exists():
            if self._size:
                raise DataError("this store was deleted while it was in use", file=self.path)
            return
        with self.path.open("rb+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell() == self._size:
                return
            if file.tell() < self._size:
                raise DataError("this store was shortened while it was in use", file=self.path)
            found = file.tell() - self._size
            file.seek(self._size)
            self._lines, whole = _take_rows(file, self.path, self._lines, self._rows, self.what)
            self._size += whole
            if whole < found:
                file.truncate(self._size)
                os.fsync(file.fileno())

    def append(self, row: Row) -> bool:
        """Append one judgment as `append_all` does; return False if its key is already there."""
        return self.append_all([row]) == 1

    def append_all(self, rows: Sequence[Row]) -> int:
        """Append judgments that arrived together, each with a write of its own, and sync them once;
        return how many were new.

        Args:
            rows: JSON-ready fields; `key` comes from `judgment_key`.

        Raises:
            EnvironmentFault: if the disk is full (whole rows stay, nothing of the failed one is
                left behind) or the lock cannot be had.
        """
        if all(row["key"] in self._rows for row in rows):
            return 0
        with self._locked():
            self._catch_up()
            fresh = {row["key"]: row for row in reversed(rows) if row["key"] not in self._rows}
            missing = [row for row in rows if fresh.get(row["key"]) is row]
            if missing:
                self._write(missing)
        return len(missing)

    def _write(self, rows: Sequence[Row]) -> None:
        """Write lines whole and synced; a line that cannot be written leaves the file as it was
        before it.
        """
        new, error = not self.path.exists(), ""
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
                a_row = f"{'an' if self.what == 'answer' else 'a'} {self.what}"
                what = f"{a_row} could not be stored: {error}"
                hint = "free some disk and run the same command"
                raise EnvironmentFault(what, hint, file=self.path)
        finally:
            os.close(descriptor)
        if new:
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
