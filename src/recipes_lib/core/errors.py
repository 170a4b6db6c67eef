"""What goes wrong for a user: one exception hierarchy, one message format, one table of exit codes.

A user-facing error is raised as a `RecipesError` (or a subclass), never printed where it happens.
The entry points (`recipes` and `python -m recipes_lib.train`) print it once, without a traceback,
and exit with its code. A programming error stays an ordinary exception; the entry points call it an
internal error, and `--debug` shows its traceback.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from recipes_lib.core.redaction import mask_secrets
from recipes_lib.core.terminal import printable


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
        >>> one_line(ValueError("a must match b, but found\\n- a: 1\\n- b: 2")), one_line(KeyError())
        ('a must match b, but found - a: 1 - b: 2', 'KeyError')
    """  # noqa: E501
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error; its type where it says nothing.

    Example:
        >>> first_line(ValueError("gated\\nlog in")), first_line(KeyError())
        ('gated', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def print_error(error: BaseException) -> None:
    """Print an error for the user: its message on stderr, no traceback, no terminal control
    characters.
    """
    print(printable(str(error)), file=sys.stderr, flush=True)
