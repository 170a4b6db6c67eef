"""What goes wrong for a user: one exception hierarchy, one message format, one table of exit codes.

A user-facing error is raised as a `RecipesError` (or a subclass), never printed where it happens.
The entry points (`recipes` and `python -m recipes_lib.train`) print it once, without a traceback,
and exit with its code. A programming error stays an ordinary exception; the entry points call it an
internal error, and `--debug` shows its traceback.
"""

from __future__ import annotations

import enum
import errno
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from recipes_lib.core.redaction import mask_secrets
from recipes_lib.core.terminal import printable, shown_size


class ExitCode(enum.IntEnum):
    """Exit codes of `recipes <verb>` and `python -m recipes_lib.train`; run.json records the same
    numbers.
    """

    DONE = 0
    FAILED = 1
    USAGE = 2
    NUMERICS = 3
    DATA = 4
    ENVIRONMENT = 5
    EVALUATION_INCOMPLETE = 6
    PREEMPTED = 75
    INTERRUPTED = 130


class RecipesError(Exception):
    """An error the user can act on.

    Args:
        what: one line that says what is wrong, naming the key or the file.
        *hints: further lines, printed indented: what to do, the nearest name, the arithmetic.
        file: the file the error is about, as the user would type it.
        line: line number in `file`, counted from 1.
    """

    exit_code = ExitCode.FAILED

    def __init__(
        self, what: str, *hints: str, file: str | Path | None = None, line: int | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.hints = hints
        self.file = file
        self.line = line

    def __str__(self) -> str:
        places = [str(place) for place in (self.file, self.line) if place is not None]
        first = ": ".join([":".join(places), self.what]) if self.file is not None else self.what
        return mask_secrets("\n  ".join([first.strip(), *self.hints]))


AnyError = TypeVar("AnyError", bound=RecipesError)


class RecipeError(RecipesError):
    """Wrong usage, or a recipe (or another YAML of ours) that cannot be accepted."""

    exit_code = ExitCode.USAGE

    @property
    def errors(self) -> list[RecipeError]:
        """The errors that it stands for: itself, or several."""
        return [self]


def in_order(errors: Iterable[AnyError]) -> list[AnyError]:
    """Return errors in the order of file and line."""
    return sorted(errors, key=lambda error: (str(error.file or ""), error.line or 0))


class RecipeErrors(RecipeError):
    """Several recipe errors reported together, in the order of file and line."""

    def __init__(self, errors: Iterable[RecipeError]) -> None:
        self._errors = in_order(errors)
        super().__init__(f"{len(self._errors)} errors")

    @property
    def errors(self) -> list[RecipeError]:
        """The errors, in the order of file and line."""
        return self._errors

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))

    def __reduce__(self) -> tuple[type, tuple[list[RecipeError]], dict[str, object]]:
        return type(self), (self._errors,), self.__dict__  # to be raised on other ranks too


class NumericsError(RecipesError):
    """A loss or a gradient that is not finite."""

    exit_code = ExitCode.NUMERICS


class DataError(RecipesError):
    """Rows, files or columns that cannot be used."""

    exit_code = ExitCode.DATA


class EnvironmentFault(RecipesError):
    """The machine: device, driver, disk, network, gated model, another process on the same run."""

    exit_code = ExitCode.ENVIRONMENT


class Preempted(RecipesError):
    """Training stopped on request after a checkpoint; the same command continues it."""

    exit_code = ExitCode.PREEMPTED


class Interrupted(RecipesError):
    """Ctrl-C: stopped after a checkpoint; the same command continues it."""

    exit_code = ExitCode.INTERRUPTED


def one_line(error: BaseException) -> str:
    """Return another library's error on one line of at most 300 characters; its type where it says
    nothing.

    Example:
        >>> one_line(ValueError("a must match b, but found\\n- a: 1")), one_line(KeyError())
        ('a must match b, but found - a: 1', 'KeyError')
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def print_error(error: BaseException) -> None:
    """Print an error for the user: its message on stderr, no traceback, no terminal control
    characters.
    """
    print(printable(str(error)), file=sys.stderr, flush=True)


# Faults of the machine

RESUME = (
    "run the same command again: a training resumes from its newest complete checkpoint, and"
    " nothing that was complete is lost"
)


class _Fault(NamedTuple):
    numbers: tuple[int, ...]  # of an OSError
    texts: str  # what tokenizers, safetensors, torch and datasets say in errors of their own
    what: str
    remedy: str


_FULL = _Fault(
    (errno.ENOSPC, errno.EDQUOT),
    r"No space left on device|Disk quota exceeded|unexpected pos \d+|PytorchStreamWriter failed|"
    r"StorageFull|not enough (disk )?space",
    "disk full",
    "free some space",
)
_LIMIT = _Fault(
    (errno.EFBIG,),
    "File too large",
    "the limit on the size of a file is reached",
    "raise it (ulimit -f unlimited)",
)
_MEMORY = _Fault(
    (errno.ENOMEM,),
    r"Cannot allocate memory|can't allocate memory|not enough memory|bad_alloc|could not allocate|"
    r"failed to map segment|can't start new thread|Unable to allocate|failed to create thread",
    "out of memory",
    "free some, raise the limit (ulimit -v, the job's memory), or use a smaller batch",
)
_BROKEN = _Fault(
    (errno.EROFS, errno.EIO),
    "Read-only file system|Input/output error",
    "the disk does not read or write",
    "make it writable again (dmesg shows what happened), or move to another disk",
)
# This counts only where it is the error itself: it may be what was tried before something else
# failed.
_REFUSED = _Fault(
    (
        *(errno.EACCES, errno.EPERM, errno.ESTALE, errno.ELOOP),
        *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY),
    ),
    "(?!)",
    "cannot read or write",
    "make it accessible again, or move away what is in the way",
)


def explain_fault(error: BaseException) -> EnvironmentFault | None:
    """Return what to do about a disk that is full or refuses, or about memory that ran out; None
    when it is another error.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RecipesError):  # those say it themselves
        if type(cause).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
            return EnvironmentFault(
                f"out of GPU memory: {one_line(cause)}",
                "halve train.per_device_train_batch_size (the examples per step stay, accumulation"
                " doubles)",
                "or set train.activation_checkpointing: true, or use a QLoRA recipe",
            )
        fault = _fault_of(cause)
        if fault and (fault != _REFUSED or cause is error):
            reason = getattr(cause, "strerror", None) or one_line(cause)
            place = getattr(cause, "filename2", None) or getattr(cause, "filename", None)
            where = f" ({place})" if place else ""
            what, remedy = f"{fault.what}: {reason}{where}", f"{fault.remedy}, then {RESUME}"
            return EnvironmentFault(what, remedy)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, a quota or a file's limit is full."""
    return not isinstance(error, RecipesError) and _fault_of(error) in (_FULL, _LIMIT)


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
    if free < 1.2 * needed:
        raise EnvironmentFault(
            f"disk full: {what} needs {shown_size(needed)} (and 20% spare), {shown_size(free)} are"
            f" free in {folder}",
            f"free some space{remedy}",
        )


def _fault_of(error: BaseException) -> _Fault | None:
    """Return the fault that one error is, whatever it was raised from."""
    if isinstance(error, MemoryError):
        return _MEMORY
    number = error.errno if isinstance(error, OSError) else None
    for fault in (_FULL, _LIMIT, _MEMORY, _BROKEN, _REFUSED):
        if number in fault.numbers or (number is None and re.search(fault.texts, str(error))):
            return fault
    return None
