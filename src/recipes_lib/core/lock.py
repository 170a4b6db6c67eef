"""One process per folder: a lock of the operating system, which ends with its process however that
ends, and a note that says who holds it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from recipes_lib.core.errors import EnvironmentFault, is_disk_full
from recipes_lib.core.files import object_or_none, utc_now, write_json
from recipes_lib.core.terminal import say

LOCK_NOTE = "lock.json"
LOCK_POLL_S = 0.2
PROBE_S = 0.5  # `is_held` of another process has a free lock for a moment
# An earlier try of a Slurm job is asked to save and stop; a step and a save of a large model take
# minutes, and so does a file server until it gives up the locks of a machine that is lost.
REQUEUE_WAIT_S = 600.0


class LockHeld(EnvironmentFault):
    """Another process holds a folder."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process.

    A Slurm job that was queued again asks its earlier try to stop and waits for it; anybody else's
    hold is refused at once.

    Raises:
        LockHeld: another process holds it (the message says which, where and since when).
        EnvironmentFault: the folder cannot be made.
    """
    lock = _acquire(folder)
    try:
        write_json(folder / LOCK_NOTE, _note())
        yield
    finally:
        with suppress(OSError):  # a disk that refuses: what went wrong before must not be hidden
            (folder / LOCK_NOTE).unlink(missing_ok=True)
        lock.release()


def _acquire(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        wait_s = _ask_earlier_try(folder) if is_held(folder) else 0
        lock.acquire(timeout=wait_s or PROBE_S, poll_interval=LOCK_POLL_S)
    except Timeout:
        raise LockHeld(
            f"{folder.name} is in use{describe_holder(folder / LOCK_NOTE)}",
            f"wait for it, or stop it: touch {folder / 'STOP'}",
            "only if that process or its machine is gone for good:"
            f" rm {folder / '.lock'} {folder / LOCK_NOTE}",
        ) from None
    except OSError as error:
        if is_disk_full(error):
            raise
        raise EnvironmentFault(
            f"the folder of run '{folder.name}' cannot be made or locked in {folder.parent}:"
            f" {error.strerror or error}",
            "choose another place for runs: RECIPES_RUNS_ROOT=FOLDER",
        ) from None
    return lock


@contextmanager
def waiting_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` after whoever holds it now: what that process makes is found there and not made
    twice.

    Raises:
        EnvironmentFault: the folder cannot be made.
    """
    if is_held(folder):
        holder = describe_holder(folder / LOCK_NOTE)
        say(f"{'/'.join(folder.parts[-3:])} is in use{holder}: waiting for it")
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(run_lock(folder))
                break
            except LockHeld:
                time.sleep(LOCK_POLL_S)
        yield


def is_held(folder: Path) -> bool:
    """Whether a live process on this machine (or on a file system with working locks) holds the
    folder.
    """
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
    holder = object_or_none(note) or {}
    if not {"pid", "host", "since"} <= holder.keys():
        return ""
    job = f" (Slurm job {holder['job']})" if holder.get("job") else ""
    return f" by process {holder['pid']} on host {holder['host']}{job} since {holder['since']}"


def _note() -> dict[str, object]:
    """Who holds a folder: the Slurm job and how often it was queued again tell tries apart."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": utc_now(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def _ask_earlier_try(folder: Path) -> float:
    """Ask an earlier try of this Slurm job to stop; return how long to wait for the lock."""
    holder, this = object_or_none(folder / LOCK_NOTE) or {}, _note()
    same_job = this["job"] is not None and holder.get("job") == this["job"]
    if not same_job or holder.get("restarts", 0) >= this["restarts"]:
        return 0
    by = describe_holder(folder / LOCK_NOTE)
    say(
        f"{folder.name} is still held{by}, an earlier try of this job:"
        f" waiting up to {REQUEUE_WAIT_S / 60:.0f} minutes for its end"
    )
    with suppress(OSError):
        (folder / "STOP").touch()
    return REQUEUE_WAIT_S
