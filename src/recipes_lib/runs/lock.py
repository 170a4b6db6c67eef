"""One process per run: a lock that a dead process cannot keep, and a note that says who holds it."""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recipes_lib.atomic_files import write_json
from recipes_lib.errors import EnvironmentFault
from recipes_lib.faults import is_disk_full


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process.

    The lock is the operating system's (`filelock`), so it ends with the process however that ends. `lock.json` beside it is
    for people: host, process id and time of the holder.

    Raises:
        EnvironmentFault: another process holds it (the message says which, where and since when), or the folder cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    note = folder / "lock.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise EnvironmentFault(
            f"{folder.name} is in use{describe_holder(note)}", "wait for it, or stop it: touch " + str(folder / "STOP")
        ) from None
    except OSError as error:
        if is_disk_full(error):
            raise
        what = f"the folder of run '{folder.name}' cannot be made or locked in {folder.parent}: {error.strerror or error}"
        raise EnvironmentFault(what, "choose another place for runs: RECIPES_RUNS_ROOT=FOLDER") from None
    try:
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(note, {"host": socket.gethostname(), "pid": os.getpid(), "since": started})
        yield
    finally:
        with suppress(OSError):  # a disk that refuses: what went wrong before must not be hidden
            note.unlink(missing_ok=True)
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a live process on this machine (or on a file system with working locks) holds the folder."""
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
    """Return ` by process 4711 on host gpu3 since ...`, or an empty string where nobody left a note."""
    with suppress(OSError, ValueError, KeyError):
        holder = json.loads(note.read_text(encoding="utf-8"))
        return f" by process {holder['pid']} on host {holder['host']} since {holder['since']}"
    return ""
