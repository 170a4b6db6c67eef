"""Errors about rows: which key or which row cannot be used, and all of them at once."""

from collections.abc import Iterable
from typing import Any

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
        located = recipe.error(getattr(error, "key", "data.source"), error.what)
        error.file = located.file
        error.line = located.line
    return error


class BadRows(list[BadRow]):
    """The rows that cannot be used, of every stage, so that all are named at once."""

    def add(self, row: Any, reason: BadRow) -> None:
        """Note a row of data or of questions, by its file and line; its texts are not kept."""
        reason.file = row.file
        reason.line = row.line
        self.append(reason.with_traceback(None))  # a traceback would keep them

    def lines(self) -> list[str]:
        """Return a line for each row, its place and its error, in the order of the files."""
        self.sort(key=lambda reason: (str(reason.file), reason.line or 0))
        return [str(DataError(bad.what, file=bad.file, line=bad.line)) for bad in self]

    def error(self, num_rows: int | None = None) -> DataError:
        """Return one error for all of them, of `num_rows` that were read."""
        others = self.lines()[1:]  # which sorts
        first = self[0]
        hints: dict[str, None] = {}  # each once, in order
        for reason in self:
            hints |= dict.fromkeys(reason.hints)
        lines = others[:NUM_LISTED] + list(hints)
        if len(others) > NUM_LISTED:
            lines.append(f"... and {len(others) - NUM_LISTED} more")
        if num_rows is not None and len(self) < num_rows:
            count = f"{len(self)} of {num_rows}"
            lines.append(f"to leave out bad rows ({count}): data.on_bad_row: skip")
        return DataError(first.what, *lines, file=first.file, line=first.line)


def listed(names: Iterable[Any], limit: int = NUM_LISTED) -> str:
    """Return the first names of a list, and how many there are more: `a, b, ... (2 more)`."""
    texts = [str(name) for name in names]
    parts = texts[:limit]
    if len(texts) > limit:
        parts.append(f"... ({len(texts) - limit} more)")
    return ", ".join(parts)
