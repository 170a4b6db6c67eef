"""One process per run: a lock that a dead process cannot keep, and a note that says who holds it."""

from __future__ import annotations

import datetime
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from recipes_lib.atomic_files import write_json
from recipes_lib.errors import EnvironmentFault

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class LockHeld(EnvironmentFault):
    """Another process holds a folder."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process.

    The lock is the operating system's (`filelock`), so it ends with the process however that ends. `lock.json` beside it is
    for people: host, process id and time of the holder.

    Raises:
        LockHeld: another process holds it (the message says which, where and since when).
        EnvironmentFault: the folder cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    note = folder / "lock.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise LockHeld(
            f"{folder.name} is in use{describe_holder(note)}", "wait for it, or stop it: touch " + str(folder / "STOP")
        ) from None
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        what = f"the folder of run '{folder.name}' cannot be made or locked in {folder.parent}: {error.strerror or error}"
        raise EnvironmentFault(what, "choose another place for runs: RECIPES_RUNS_ROOT=FOLDER") from None
    try:
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(note, {"host": socket.gethostname(), "pid": os.getpid(), "since": started})
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


@contextmanager
def waiting_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` as `run_lock` does, after whoever holds it now: what that one makes is found there and not made twice.

    Raises:
        EnvironmentFault: the folder cannot be made.
    """
    from recipes_lib.terminal import say

    said = False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(run_lock(folder))
                break
            except LockHeld:
                if not said:
                    say(f"{'/'.join(folder.parts[-3:])} is in use{describe_holder(folder / 'lock.json')}: waiting for it")
                said = True
                time.sleep(0.2)
        yield


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
