"""One process per folder: a lock that ends with its process, and a note that says who holds it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.files import Row, object_or_none, utc_now, write_json
from recipes_lib.core.terminal import say

LOCK_NOTE = "lock.json"
_FOR_EVER = -1.0
_PROBE_S = 0.5  # `is_held` of another process has a free lock for a moment
# An earlier try of a Slurm job is asked to save and stop; a step and a save of a large model take
# minutes, and so does a file server until it gives up the locks of a machine that is lost.
REQUEUE_WAIT_S = 600.0


@contextmanager
def run_lock(folder: Path, wait_s: float = _PROBE_S) -> Iterator[None]:
    """Hold `folder` for this process; a folder that another process holds is an EnvironmentFault.

    A Slurm job that was queued again asks its earlier try to stop and waits for it.
    """
    lock, note = FileLock(folder / ".lock"), folder / LOCK_NOTE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if wait_s != _FOR_EVER and is_held(folder) and _is_earlier_try(note):
            wait_s = REQUEUE_WAIT_S
            who = f"{describe_holder(note)}, an earlier attempt of this job"
            say(f"{folder.name} is still in use{who}: waiting up to {wait_s / 60:.0f} minutes")
            with suppress(OSError):
                (folder / "STOP").touch()
        lock.acquire(timeout=wait_s, poll_interval=0.2)
    except Timeout:
        raise EnvironmentFault(
            f"{folder.name} is in use{describe_holder(note)}",
            f"wait for it, or stop it: touch {folder / 'STOP'}",
            f"only if that process or its machine is gone for good: rm {folder / '.lock'} {note}",
        ) from None
    except OSError as error:
        raise EnvironmentFault(
            f"the folder of run '{folder.name}' cannot be made or locked in {folder.parent}:"
            f" {error.strerror or error}",
            "free some space there, or choose another place for runs: RECIPES_RUNS_ROOT=FOLDER",
        ) from None
    try:
        write_json(note, _note())
        yield
    finally:
        with suppress(OSError):  # a disk that refuses: what went wrong before must not be hidden
            note.unlink(missing_ok=True)
        lock.release()


@contextmanager
def waiting_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` after whoever holds it now, so that nothing is made twice."""
    if is_held(folder):
        who = describe_holder(folder / LOCK_NOTE)
        say(f"{'/'.join(folder.parts[-3:])} is in use{who}: waiting for it")
    with run_lock(folder, _FOR_EVER):
        yield


def is_held(folder: Path) -> bool:
    """Whether a live process on this machine (or on a file system with working locks) holds it."""
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def describe_holder(note: Path) -> str:
    """Return ` by process 4711 on host gpu3 since ...`, or an empty string if there is no note."""
    holder = object_or_none(note) or {}
    if not {"pid", "host", "since"} <= holder.keys():
        return ""
    job = f" (Slurm job {holder['job']})" if holder.get("job") else ""
    return f" by process {holder['pid']} on host {holder['host']}{job} since {holder['since']}"


def _note() -> Row:
    """Who holds a folder: the Slurm job and how often it was queued again tell tries apart."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": utc_now(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def _is_earlier_try(note: Path) -> bool:
    holder, ours = object_or_none(note) or {}, _note()
    same_job = ours["job"] is not None and holder.get("job") == ours["job"]
    return same_job and holder.get("restarts", 0) < ours["restarts"]
