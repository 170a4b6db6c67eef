"""One row of training data after its columns were mapped, and the errors that name a row or a key.

The other modules of this package pass `Example` objects along. An error about a row carries the row's file and line; an
error about a setting carries the key and is placed at the key's line in the recipe by `place`.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.errors import DataError

if TYPE_CHECKING:
    from recipes_lib.recipe.recipe import Recipe

NUM_LISTED = 10


@dataclass(slots=True)
class Example:
    """One row: where it stands, its mapped fields, and its identity.

    Args:
        file: path or Hub id, as the user would type it.
        line: line in a text file, counted from 1; None where the format has no lines.
        row: position in the file, counted from 1.
        fields: our names -> text (or a list of `{role, content}` under `messages`).
        content: sha256 of the normalised fields; equal for exact duplicates.
        id: unique name in splits.json and supervision.json.
        split_key: what the hash split looks at: the explicit id, else `content`.
        source: position in a mixture, 0 when there is one source.
    """

    file: str
    line: int | None
    row: int
    fields: dict[str, Any]
    content: str = ""
    id: str = ""
    split_key: str = ""
    category: str | None = None
    source: int = 0
    explicit_id: Any = field(default=None, repr=False)

    @property
    def place(self) -> str:
        """`file:line`, or `file row N` where the format has no lines."""
        return f"{self.file}:{self.line}" if self.line is not None else f"{self.file} row {self.row}"


class SettingError(DataError):
    """A data error that a key of the recipe causes; `place` gives it the file and line of that key."""

    def __init__(self, key: str, what: str, *hints: str) -> None:
        super().__init__(what, *hints)
        self.key = key
        self.audit: Mapping[str, Any] | None = None  # what was counted before the data was refused


def place(recipe: Recipe, error: DataError) -> DataError:
    """Give an error without a file the place of its key (`data.source` when it names none) in the recipe."""
    if error.file is None:
        at = recipe.error(getattr(error, "key", "data.source"), error.what)
        error.file, error.line = at.file, at.line
    return error


def row_errors(problems: Sequence[tuple[Example, str]], *hints: str) -> DataError:
    """One error for all bad rows: the first at its file and line, the others listed in a hint."""
    first, what = problems[0]
    more = [] if len(problems) == 1 else [f"{len(problems) - 1} more: {listed(e.place for e, _ in problems[1:])}"]
    prefix = "" if first.line is not None else f"row {first.row}: "
    return DataError(prefix + what, *more, *hints, file=first.file, line=first.line)


def listed(names: Iterable[Any], limit: int = NUM_LISTED) -> str:
    """The first names of a list, and how many there are more.

    Example:
        >>> listed(range(5), limit=3)
        '0, 1, 2, ... (2 more)'
    """
    names = [str(name) for name in names]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f", ... ({rest} more)" if rest > 0 else "")


def type_name(value: Any) -> str:
    """The type of a value in a user's words: `None`, `nan`, `int`, `list`."""
    if value is None:
        return "None"
    if isinstance(value, float) and value != value:
        return "float nan"
    return type(value).__name__


def shown_path(path: Path) -> str:
    """A path as the user would type it: relative when it lies under the working directory."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


def normalised(text: str) -> str:
    """Text as compared for exact duplicates: Unicode NFC, newlines as \\n, no white space around it."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.strip()


def content_hash(fields: dict[str, Any]) -> str:
    """sha256 of the normalised fields; independent of the prompt format, of the order of rows and of column order.

    Example:
        >>> content_hash({"instruction": "Say hi. ", "response": "Hi"}) == content_hash({"response": "Hi", "instruction": "Say hi."})
        True
    """
    return hashlib.sha256(json.dumps(canonical(fields), ensure_ascii=False).encode()).hexdigest()


def canonical(fields: dict[str, Any]) -> list[Any]:
    """The normalised fields as a sorted list; empty optional fields leave no trace."""
    parts: list[Any] = []
    for name in sorted(fields):
        value = fields[name]
        if isinstance(value, list):
            parts.append([name, [[message["role"], normalised(message["content"])] for message in value]])
        elif value := normalised(value):
            parts.append([name, value])
    return parts
