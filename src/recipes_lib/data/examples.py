"""One row of training data after its columns were mapped, and the errors that name a row by file
and line, or a key, whose line in the recipe `place` finds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from recipes_lib.core.errors import DataError

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe

NUM_LISTED = 10


@dataclass(slots=True)
class Example:
    """One row: where it stands, its texts while they are needed, and its identity.

    Args:
        file: path or Hub id, as the user would type it.
        line: counted from 1, as `row`; None where the format has no lines.
        fields: our names -> text (or a list of messages); tools and template arguments are JSON.
        explicit_id: what the id column holds, None without one.
        table: number of the file among those read.
        id: unique name in splits.json and supervision.json.
        content: a sha256 of the normalised texts.
        loose: a hash of the texts without case and white space.
        empty: whether the text that the row should teach is empty.
    """

    file: str
    line: int | None
    row: int
    fields: dict[str, Any]
    category: str | None = None
    explicit_id: Any = None
    table: int = 0
    id: str = ""
    content: bytes = b""
    loose: bytes = b""
    empty: bool = False

    @property
    def place(self) -> str:
        """`file:line`, or `file row N` where the format has no lines."""
        return f"{self.file} row {self.row}" if self.line is None else f"{self.file}:{self.line}"

    @property
    def texts(self) -> list[str]:
        """All texts, of conversations all that each message says."""
        found: list[str] = []
        for value in self.fields.values():
            if isinstance(value, str):
                found.append(value)
            else:
                found += [text for message in value for text in message_texts(message)]
        return found

    @property
    def split_key(self) -> str:
        """What the hash split looks at: the explicit id, else the content."""
        return self.content.hex() if self.explicit_id is None else str(self.explicit_id)


def message_texts(message: Mapping[str, Any]) -> list[str]:
    """All that a message says: its thoughts, its content, and its tool calls as JSON."""
    calls = message.get("tool_calls", ())
    return [
        *([message["reasoning_content"]] if "reasoning_content" in message else []),
        message["content"],
        *(json.dumps(call["function"], ensure_ascii=False) for call in calls),
    ]


class SettingError(DataError):
    """A data error that a key of the recipe causes."""

    def __init__(self, key: str, what: str, *hints: str) -> None:
        super().__init__(what, *hints)
        self.key = key
        self.audit: Mapping[str, Any] | None = None  # what was counted before the data was refused


def place(recipe: Recipe, error: DataError) -> DataError:
    """Give an error without a file the place of its key, or of `data.source`, in the recipe."""
    if error.file is None:
        at = recipe.error(getattr(error, "key", "data.source"), error.what)
        error.file, error.line = at.file, at.line
    return error


class BadRow(Exception):
    """Why one row cannot be used.

    Args:
        what: what is wrong with it.
        hint: what to do, where the words do not say it.
        drop: entries of `data.drop_columns` with which the row could be used.
    """

    def __init__(self, what: str, hint: str = "", drop: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.what, self.hint, self.drop = what, hint, tuple(drop)


class SkippedRows(TypedDict):
    """What the audit says about rows that were skipped."""

    count: int
    places: list[str]
    reasons: dict[str, int]


class BadRows:
    """The rows that cannot be used, of every stage, so that all are named at once."""

    def __init__(self) -> None:
        self.found: list[tuple[Example, BadRow]] = []

    def add(self, example: Example, reason: BadRow) -> None:
        """Note a row; its texts are not kept."""
        example.fields = {}
        self.found.append((example, reason.with_traceback(None)))

    def error(self, num_rows: int | None = None) -> DataError:
        """One error for all of them: the first at its place, the others by what is wrong.

        Args:
            num_rows: rows read; None where that is not known.
        """
        first, reason = self.found[0]
        own, *others = self._kinds()
        lines = []
        if len(own) > 1:
            lines.append(f"{len(own) - 1} more: {listed(example.place for example, _ in own[1:])}")
        for kind in others[:NUM_LISTED]:
            places = listed((example.place for example, _ in kind), 3)
            rows = places if len(kind) == 1 else f"{len(kind)} rows, {places}"
            lines.append(f"{rows}: {kind[0][1].what}")
        if rest := others[NUM_LISTED:]:
            lines.append(f"{sum(map(len, rest))} more rows with {len(rest)} other problems")
        lines += dict.fromkeys(bad.hint for _, bad in self.found if bad.hint)
        if drop := sorted({name for _, bad in self.found for name in bad.drop}):
            lines.append(f"to train without it: data.drop_columns: [{', '.join(drop)}]")
        if num_rows is not None and len(self.found) < num_rows:
            lines.append(
                f"to leave out bad rows ({len(self.found)} of {num_rows}): data.on_bad_row: skip"
            )
        prefix = "" if first.line is not None else f"row {first.row}: "
        return DataError(prefix + reason.what, *lines, file=first.file, line=first.line)

    def record(self) -> SkippedRows:
        """What the audit says about skipped rows: how many, which, and why."""
        return {
            "count": len(self.found),
            "places": [example.place for example, _ in self.found],
            "reasons": {kind[0][1].what: len(kind) for kind in self._kinds()},
        }

    def _kinds(self) -> list[list[tuple[Example, BadRow]]]:
        """The rows by what is wrong, numbers in the words left aside."""
        kinds: dict[str, list[tuple[Example, BadRow]]] = {}
        for found in self.found:
            words = re.sub(r"0x\w+|\d+|\\u\w{4}", "#", found[1].what)
            kinds.setdefault(words, []).append(found)
        return list(kinds.values())


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
    return "float nan" if isinstance(value, float) and value != value else type(value).__name__


def lone_surrogate(text: str) -> str:
    """Where a text has half of a UTF-16 pair, which no UTF-8 file can hold, or an empty text."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"lone surrogate {text[error.start]!r} at character {error.start}"
    return ""


def shown_real_path(path: Path) -> str:
    """A path, symbolic links followed, relative when it lies under the working directory."""
    real, here = path.resolve(), Path.cwd().resolve()
    return str(real.relative_to(here)) if real.is_relative_to(here) else str(path)
