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
from typing import NamedTuple

from recipes_lib.core.errors import EnvironmentFault, RecipesError, first_line
from recipes_lib.core.terminal import shown_size

RESUME = (
    "run the same command again: a training resumes from its newest complete checkpoint, and"
    " nothing that was complete is lost"
)
SPARE = 1.2  # free space asked for, as a multiple of what is written


class Fault(NamedTuple):
    """One kind of fault: numbers of an OSError, words in other errors, what it is, what to do."""

    numbers: tuple[int, ...]
    words: str
    what: str
    remedy: str


FULL = Fault(
    (errno.ENOSPC, errno.EDQUOT),
    r"No space left on device|Disk quota exceeded|unexpected pos \d+|PytorchStreamWriter failed|"
    r"StorageFull|not enough (disk )?space",
    "disk full",
    "free some space",
)
LIMIT = Fault(
    (errno.EFBIG,),
    r"File too large",
    "the limit on the size of a file is reached",
    "raise it (ulimit -f unlimited)",
)
REFUSED = Fault(
    (errno.EACCES, errno.EPERM, errno.ESTALE),  # the last: an NFS server that forgot the file
    "",
    "cannot read or write",
    "make it accessible again",
)
IN_THE_WAY = Fault(
    (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY),
    "",
    "a file or folder is in the way",
    "move it away",
)
MEMORY = Fault(
    (errno.ENOMEM,),
    r"Cannot allocate memory|can't allocate memory|not enough memory|bad_alloc|could not allocate|"
    r"failed to map segment|can't start new thread|Unable to allocate|failed to create thread",
    "out of memory",
    "free some, raise the limit (ulimit -v, the job's memory), or use a smaller batch",
)
FAULTS = (
    FULL,
    LIMIT,
    REFUSED,
    IN_THE_WAY,
    Fault(
        (errno.EROFS,),
        r"Read-only file system",
        "the file system is read-only",
        "make it writable again",
    ),
    Fault(
        (errno.EIO,),
        r"Input/output error",
        "the disk does not read or write",
        "see the system's log (dmesg), or move to another disk",
    ),
    Fault(
        (errno.ELOOP,),
        r"^Symlink loop from",  # a RuntimeError of pathlib before Python 3.13
        "a symbolic link leads to itself",
        "remove it",
    ),
    MEMORY,
)


def explain_fault(error: BaseException) -> EnvironmentFault | None:
    """Return what to do about a disk that is full or refuses, or about memory that ran out; None
    when it is another error.
    """
    for one in _causes(error):
        if "torch" in sys.modules and isinstance(one, sys.modules["torch"].OutOfMemoryError):
            return EnvironmentFault(
                f"out of GPU memory: {first_line(one)}",
                "halve train.per_device_train_batch_size (the examples per step stay, accumulation"
                " doubles)",
                "or set train.activation_checkpointing: true, or use a QLoRA recipe",
            )
        fault = fault_of(one)
        # these two may be what was tried before something else failed
        if fault is None or (fault in (REFUSED, IN_THE_WAY) and one is not error):
            continue
        what, remedy = fault.what, fault.remedy
        place = getattr(one, "filename2", None) or getattr(one, "filename", None)
        if fault == FULL and place and _has_no_inodes(Path(os.fsdecode(place))):
            what = "the disk has no inodes left"
            remedy = "delete some files (df -i shows how many are used)"
        first = (str(one).strip().splitlines() or [type(one).__name__])[0]
        reason = getattr(one, "strerror", None) or first
        where = f" ({place})" if place else ""
        return EnvironmentFault(f"{what}: {reason}{where}", f"{remedy}, then {RESUME}")
    return None


def fault_of(error: BaseException) -> Fault | None:
    """Return the fault that one error is, whatever it was raised from; None when it is another
    error.
    """
    if isinstance(error, RecipesError):  # it says itself what to do
        return None
    if isinstance(error, MemoryError):
        return MEMORY
    if isinstance(error, OSError):
        for fault in FAULTS:
            if error.errno in fault.numbers:
                return fault
    text = str(error)
    return next((one for one in FAULTS if one.words and re.search(one.words, text)), None)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, a quota or a file's limit is full."""
    return fault_of(error) in (FULL, LIMIT)


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
