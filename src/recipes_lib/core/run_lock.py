"""One process per run: a lock that a dead process cannot keep, and a note that says who holds it
and that it lives.

The lock is the operating system's (`filelock`), so it ends with the process however that ends. A
machine that is lost takes longer: a file server may keep its locks, and a process on it may still
run when Slurm has given the machine up and queued the job again. So the holder also renews
`lock.json` every few seconds (a heartbeat). A later try of the same Slurm job waits until the
earlier one ends or misses its heartbeats, then takes the lock over; a holder that finds another
name in the note ends at once, so that never two of them write.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypedDict, cast

from recipes_lib.core.atomic_files import named_in_errors
from recipes_lib.core.errors import EnvironmentFault, ExitCode
from recipes_lib.core.faults import is_disk_full
from recipes_lib.core.json_files import object_or_none, utc_now
from recipes_lib.core.terminal import say

HEARTBEAT_S = 10.0
# Without a heartbeat for this long a holder counts as lost. Longer than the pauses of a busy file
# server.
LOST_AFTER_S = 60.0
# An earlier try that lives is asked to save and stop; a step and a save of a large model take
# minutes.
LONGEST_WAIT_S = 1200.0


class LockHeld(EnvironmentFault):
    """Another process holds a folder."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process.

    `lock.json` says who holds it: host, process id, start, Slurm job and try, and the number of the
    last heartbeat.

    Raises:
        LockHeld: another process holds it (the message says which, where and since when).
        EnvironmentFault: the folder cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            _wait_for_earlier_try(folder)
            lock.acquire()
        holder = _Holder(folder / "lock.json")
    except Timeout:
        raise LockHeld(
            f"{folder.name} is in use{describe_holder(folder / 'lock.json')}", *_ways_out(folder)
        ) from None
    except OSError as error:
        if is_disk_full(error):
            raise
        what = (
            f"the folder of run '{folder.name}' cannot be made or locked in {folder.parent}:"
            f" {error.strerror or error}"
        )
        raise EnvironmentFault(
            what, "choose another place for runs: RECIPES_RUNS_ROOT=FOLDER"
        ) from None
    _held[folder.resolve()] = holder
    _start_heartbeat()
    try:
        yield
    finally:
        del _held[folder.resolve()]
        with suppress(OSError):  # a disk that refuses: what went wrong before must not be hidden
            holder.leave()
        lock.release()


def end_if_taken_over(folder: Path) -> None:
    """End this process where another has taken `folder` over; called before what must not be
    written twice.

    A process that was suspended for long would otherwise write before its next heartbeat notices.
    """
    holder = _held.get(folder.resolve())
    if holder is not None:
        holder.end_if_taken_over()


@contextmanager
def waiting_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` as `run_lock` does, after whoever holds it now: what that one makes is found
    there and not made twice.

    Raises:
        EnvironmentFault: the folder cannot be made.
    """
    said = False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(run_lock(folder))
                break
            except LockHeld:
                if not said:
                    say(
                        f"{'/'.join(folder.parts[-3:])} is in"
                        f" use{describe_holder(folder / 'lock.json')}: waiting for it"
                    )
                said = True
                time.sleep(0.2)
        yield


def is_held(folder: Path) -> bool:
    """Whether a live process on this machine (or on a file system with working locks) holds the
    folder.
    """
    from filelock import FileLock, Timeout

    if not (folder / ".lock").exists():
        return False
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


def describe_holder(note: Path) -> str:
    """Return ` by process 4711 on host gpu3 since ...`, or an empty string where nobody left a
    note.
    """
    with suppress(KeyError):
        holder = _read(note)
        job = f" (Slurm job {holder['job']})" if holder.get("job") else ""
        return f" by process {holder['pid']} on host {holder['host']}{job} since {holder['since']}"
    return ""


_Try = TypedDict("_Try", {"job": str | None, "try": int})


class _Note(_Try, total=False):
    """lock.json: who holds the folder, as which try of which Slurm job, written how often; a note
    that cannot be read is empty.
    """

    host: str
    pid: int
    since: str
    token: str
    beats: int


class _Holder:
    """This process's hold on a folder: the note, which is renewed until `leave`."""

    def __init__(self, note: Path) -> None:
        self.note = note
        self.token = uuid.uuid4().hex
        self._facts: _Note = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": utc_now(),
            **_this_try(),
            "token": self.token,
        }
        self._beats = 0
        self._writing = threading.Lock()
        self._left = False
        self._write()

    def end_if_taken_over(self) -> None:
        """End the process where the note is another's. Without a note (deleted, unreadable) nobody
        has taken over.
        """
        if _read(self.note).get("token", self.token) != self.token:
            by = describe_holder(self.note)
            print(
                f"{self.note.parent.name}: taken over{by}; this process ends without writing"
                " anything more",
                file=sys.stderr,
                flush=True,
            )
            os._exit(ExitCode.ENVIRONMENT)

    def beat(self) -> None:
        """Renew the note, without flushing it to the disk: a crash ends the hold anyway."""
        with self._writing:
            if self._left:
                return
            self.end_if_taken_over()
            self._write()

    def _write(self) -> None:
        self._beats += 1
        temporary = self.note.with_name(f".{self.note.name}.{self.token}")
        try:
            with named_in_errors(self.note):
                temporary.write_text(
                    json.dumps({**self._facts, "beats": self._beats}), encoding="utf-8"
                )
            temporary.replace(self.note)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def leave(self) -> None:
        """Take the note away."""
        with self._writing:
            self.end_if_taken_over()
            self._left = True
            self.note.unlink(missing_ok=True)


_held: dict[Path, _Holder] = {}
_heartbeat: threading.Thread | None = None


def _start_heartbeat() -> None:
    """Start the one thread that renews the notes of all folders this process holds."""
    global _heartbeat
    if _heartbeat is None or not _heartbeat.is_alive():
        _heartbeat = threading.Thread(target=_renew_notes, name="heartbeat", daemon=True)
        _heartbeat.start()


def _renew_notes() -> None:
    while True:
        time.sleep(HEARTBEAT_S)
        for holder in list(_held.values()):
            with suppress(
                OSError
            ):  # a full disk, or a file server that is away: the next beat may succeed
                holder.beat()


def _wait_for_earlier_try(folder: Path) -> None:
    """Where an earlier try of this Slurm job holds the folder: wait until it ends or is lost; a
    lost one loses its lock file.

    An earlier try that lives is asked to save and stop. Anybody else's hold is left alone.
    """
    note, mine = folder / "lock.json", _this_try()
    seen = _read(note)
    if mine["job"] is None or seen.get("job") != mine["job"] or seen.get("try", 0) >= mine["try"]:
        return
    say(
        f"{folder.name} is still held{describe_holder(note)}, an earlier try of this job: waiting"
        " until it has stopped"
    )
    with suppress(OSError):
        (folder / "STOP").touch()
    start = last_sign = time.monotonic()
    while time.monotonic() < start + LONGEST_WAIT_S and is_held(folder):
        time.sleep(min(1.0, HEARTBEAT_S))
        now = _read(note)
        if now.get("beats") != seen.get("beats") or now.get("token") != seen.get("token"):
            seen, last_sign = now, time.monotonic()
        elif time.monotonic() > last_sign + LOST_AFTER_S:
            # Claim it, then wait: a holder that lives after all ends when it reads the claim, or
            # writes its own note over it.
            claim = _Holder(
                note
            )  # not renewed, and never left: the note of the lock itself follows
            time.sleep(2 * HEARTBEAT_S)
            if _read(note).get("token") == claim.token:
                say(f"{folder.name}: no sign of life for {LOST_AFTER_S:g} s; taking it over")
                (folder / ".lock").unlink(
                    missing_ok=True
                )  # the next lock is on a new file, which the lost process does not hold
                return
            seen, last_sign = _read(note), time.monotonic()


def _this_try() -> _Try:
    """Return the Slurm job that this process belongs to, if any, and how often it was
    queued again.
    """
    return {
        "job": os.environ.get("SLURM_JOB_ID"),
        "try": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def _read(note: Path) -> _Note:
    """Return the note; empty where there is none, or none that can be read."""
    return cast(_Note, object_or_none(note) or {})


def _ways_out(folder: Path) -> list[str]:
    """Return what somebody can do about a folder that is held."""
    hints = [f"wait for it, or stop it: touch {folder / 'STOP'}"]
    with suppress(OSError):
        age = time.time() - (folder / "lock.json").stat().st_mtime
        if age > LOST_AFTER_S:
            files = f"{folder / '.lock'} {folder / 'lock.json'}"
            hints.append(
                f"its last sign of life was {age:.0f} s ago; only if that process is gone for good:"
                f" rm {files}"
            )
    return hints
