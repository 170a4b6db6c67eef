"""Faults of the machine, told as such: a disk that is full or refuses, memory that ran out.

Python's own calls raise OSError with a number. tokenizers, safetensors, torch and datasets write
their files themselves and raise errors of their own, in which only the text tells what happened.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from recipes_lib.core.errors import EnvironmentFault, RecipesError
from recipes_lib.core.terminal import shown_size

RESUME = (
    "run the same command again: a training resumes from its newest complete checkpoint, and"
    " nothing that was complete is lost"
)
SPARE = 1.2  # free space asked for, as a multiple of what is written
FULL, LIMIT, READ_ONLY, REFUSED, BROKEN, MEMORY, LOOP, IN_THE_WAY = range(8)
NUMBERS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: LIMIT,
    errno.EROFS: READ_ONLY,
    errno.EACCES: REFUSED,
    errno.EPERM: REFUSED,
    errno.ESTALE: REFUSED,  # an NFS server that forgot the file
    errno.EISDIR: IN_THE_WAY,
    errno.ENOTDIR: IN_THE_WAY,
    errno.EEXIST: IN_THE_WAY,
    errno.ENOTEMPTY: IN_THE_WAY,
    errno.EIO: BROKEN,
    errno.ENOMEM: MEMORY,
    errno.ELOOP: LOOP,
}
SIGNS = {
    FULL: (
        r"No space left on device|Disk quota exceeded|unexpected pos \d+|PytorchStreamWriter"
        r" failed|StorageFull|not enough (disk )?space"
    ),
    LIMIT: r"File too large",
    READ_ONLY: r"Read-only file system",
    BROKEN: r"Input/output error",
    LOOP: r"^Symlink loop from",  # a RuntimeError of pathlib before Python 3.13
    MEMORY: (
        r"Cannot allocate memory|can't allocate memory|not enough memory|bad_alloc|failed to map"
        r" segment|can't start new thread|"
        r"could not allocate|Unable to allocate|failed to create thread"
    ),
}
WORDS = {
    FULL: ("disk full", "free some space"),
    LIMIT: ("the limit on the size of a file is reached", "raise it (ulimit -f unlimited)"),
    READ_ONLY: ("the file system is read-only", "make it writable again"),
    REFUSED: ("cannot read or write", "make it accessible again"),
    IN_THE_WAY: ("a file or folder is in the way", "move it away"),
    BROKEN: (
        "the disk does not read or write",
        "see the system's log (dmesg), or move to another disk",
    ),
    LOOP: ("a symbolic link leads to itself", "remove it"),
    MEMORY: (
        "out of memory",
        "free some, raise the limit (ulimit -v, the job's memory), or use a smaller batch",
    ),
}


def explain_fault(error: BaseException) -> EnvironmentFault | None:
    """Return what to do about a disk that is full or refuses, or about memory that ran out; None
    when it is another error.
    """
    for one in _causes(error):
        if "torch" in sys.modules and isinstance(one, sys.modules["torch"].OutOfMemoryError):
            return EnvironmentFault(
                f"out of GPU memory: {str(one).splitlines()[0]}",
                "halve train.per_device_train_batch_size (the examples per step stay, accumulation"
                " doubles)",
                "or set train.activation_checkpointing: true, or use a QLoRA recipe",
            )
        kind = fault_kind(one)
        if kind is None or (
            kind in (REFUSED, IN_THE_WAY) and one is not error
        ):  # what was tried before something else failed
            continue
        what, remedy = WORDS[kind]
        place = getattr(one, "filename2", None) or getattr(one, "filename", None)
        if kind == FULL and place and _has_no_inodes(Path(os.fsdecode(place))):
            what, remedy = (
                "the disk has no inodes left",
                "delete some files (df -i shows how many are used)",
            )
        reason = (
            getattr(one, "strerror", None)
            or (str(one).strip().splitlines() or [type(one).__name__])[0]
        )
        return EnvironmentFault(
            f"{what}: {reason}{f' ({place})' if place else ''}", f"{remedy}, then {RESUME}"
        )
    return None


def fault_kind(error: BaseException) -> int | None:
    """Return the kind of fault that one error is, whatever it was raised from; None when it is
    another error.
    """
    if isinstance(error, RecipesError):  # it says itself what to do
        return None
    if isinstance(error, MemoryError):
        return MEMORY
    if isinstance(error, OSError) and error.errno in NUMBERS:
        return NUMBERS[error.errno]
    return next((kind for kind, sign in SIGNS.items() if re.search(sign, str(error))), None)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, a quota or a file's limit is full."""
    return fault_kind(error) in (FULL, LIMIT)


def check_space(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Refuse to write what will not fit.

    Args:
        needed: bytes.
        what: what is written, as the message names it.
        remedy: what follows "free some space".

    Raises:
        EnvironmentFault: less than 1.2 times `needed` is free.
    """
    free = shutil.disk_usage(folder).free
    if free < SPARE * needed:
        raise EnvironmentFault(
            f"disk full: {what} needs {shown_size(needed)} (and 20% spare), {shown_size(free)} are"
            f" free in {folder}",
            f"free some space{remedy}",
        )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, its own message first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _has_no_inodes(place: Path) -> bool:
    folder = next((parent for parent in place.absolute().parents if parent.is_dir()), None)
    try:
        free = os.statvfs(folder) if folder else None
    except OSError:
        return False
    return free is not None and free.f_files > 0 and free.f_favail == 0 and free.f_bavail > 0
