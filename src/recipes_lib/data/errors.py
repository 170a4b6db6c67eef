"""Errors about rows: which key or which row cannot be used, and all of them at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import DataError

NUM_LISTED = 10


class SettingError(DataError):
    """A data error that a key of the recipe causes."""

    def __init__(self, key: str, what: str, *hints: str) -> None:
        super().__init__(what, *hints)
        self.key = key


class BadRow(DataError):
    """Why one row cannot be used, and what to do; `BadRows` says which row."""


def place(recipe: Recipe, error: DataError) -> DataError:
    """Give an error without a file the place of its key, or of `data.source`, in the recipe."""
    if error.file is None:
        at = recipe.error(getattr(error, "key", "data.source"), error.what)
        error.file, error.line = at.file, at.line
    return error


class Placed(Protocol):
    """What has a place in a file: a row of data, or of questions."""

    file: str
    line: int | None


class BadRows(list[BadRow]):
    """The rows that cannot be used, of every stage, so that all are named at once."""

    def add(self, row: Placed, reason: BadRow) -> None:
        """Note a row; its texts are not kept."""
        reason.file, reason.line = row.file, row.line
        self.append(reason.with_traceback(None))

    def lines(self) -> list[str]:
        """Return a line for each row, its place and its error, in the order of the files."""
        self.sort(key=lambda reason: (str(reason.file), reason.line or 0))
        return [str(DataError(each.what, file=each.file, line=each.line)) for each in self]

    def error(self, num_rows: int | None = None) -> DataError:
        """Return one error for all of them, of `num_rows` that were read."""
        lines, first = self.lines()[1:], self[0]
        more = [f"... and {len(lines) - NUM_LISTED} more"] if len(lines) > NUM_LISTED else []
        hints = dict.fromkeys(hint for reason in self for hint in reason.hints)
        if num_rows is not None and len(self) < num_rows:
            count = f"{len(self)} of {num_rows}"
            more.append(f"to leave out bad rows ({count}): data.on_bad_row: skip")
        lines = [*lines[:NUM_LISTED], *hints, *more]
        return DataError(first.what, *lines, file=first.file, line=first.line)


def listed(names: Iterable[Any], limit: int = NUM_LISTED) -> str:
    """Return the first names of a list, and how many there are more: `a, b, ... (2 more)`."""
    names = [str(name) for name in names]
    rest = [f"... ({len(names) - limit} more)"] if len(names) > limit else []
    return ", ".join([*names[:limit], *rest])
