"""One row of training data after its columns were mapped, and the errors that name rows by file and
line, or a key of the recipe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.core.errors import DataError

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe

NUM_LISTED = 10


@dataclass(slots=True)
class DataRow:
    """One row: where it stands, its texts and its identity.

    Args:
        file: path or Hub id, as the user would type it.
        line: counted from 1; None where the format has no lines.
        number: counted from 1 within the file.
        fields: our names -> text (or a list of messages); tools and template arguments are JSON.
        category: of the category column, None without one.
        source: position of its source in the mixture.
        id: unique name in splits.json and supervision.json; the file's, or a hash of the content.
        content: SHA-256 of the normalised texts, which alone decides the side of the split.
    """

    file: str
    line: int | None
    number: int
    fields: dict[str, Any]
    category: str | None = None
    source: int = 0
    id: str = ""
    content: bytes = b""

    @property
    def place(self) -> str:
        """`file:line`, or `file row N` where the format has no lines."""
        return f"{self.file} row {self.number}" if self.line is None else f"{self.file}:{self.line}"

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
    def is_empty(self) -> bool:
        """Whether the text that the row should teach is empty."""
        for name in ("response", "completion", "text"):
            if isinstance(self.fields.get(name), str):
                return not self.fields[name].strip()
        messages = self.fields.get("messages") or self.fields.get("completion") or []
        answers = (one for one in messages if one["role"] == "assistant")
        return not any(text.strip() for answer in answers for text in message_texts(answer))


def message_texts(message: Mapping[str, Any]) -> list[str]:
    """Return all that a message says: its thoughts, its content, and its tool calls as JSON."""
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


class BadRows:
    """The rows that cannot be used, of every stage, so that all are named at once."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int | None, str, BadRow]] = []

    def add(self, row: DataRow, reason: BadRow) -> None:
        """Note a row; its texts are not kept."""
        at = row.file if row.line is not None else f"{row.file} row {row.number}"
        self.found.append((at, row.line, row.place, reason.with_traceback(None)))

    def error(self, num_rows: int | None = None) -> DataError:
        """Return one error for all of them: the first at its place, the others by what is wrong.

        Args:
            num_rows: rows read; None where that is not known.
        """
        file, line, _, reason = self.found[0]
        first, *others = self._by_reason().values()
        lines = [f"{len(first) - 1} more: {listed(first[1:])}"] if len(first) > 1 else []
        reasons = list(self._by_reason())[1:]
        for what, places in list(zip(reasons, others, strict=True))[:NUM_LISTED]:
            count = "" if len(places) == 1 else f"{len(places)} rows, "
            lines.append(f"{count}{listed(places, 3)}: {what}")
        if rest := others[NUM_LISTED:]:
            lines.append(f"{sum(map(len, rest))} more rows with {len(rest)} other problems")
        lines += dict.fromkeys(bad.hint for *_, bad in self.found if bad.hint)
        if drop := sorted({name for *_, bad in self.found for name in bad.drop}):
            lines.append(f"to train without it: data.drop_columns: [{', '.join(drop)}]")
        if num_rows is not None and len(self.found) < num_rows:
            lines.append(
                f"to leave out bad rows ({len(self.found)} of {num_rows}): data.on_bad_row: skip"
            )
        return DataError(reason.what, *lines, file=file, line=line)

    @property
    def places(self) -> list[str]:
        """Where they stand."""
        return [place for _, _, place, _ in self.found]

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows there are of each reason."""
        return {what: len(places) for what, places in self._by_reason().items()}

    def _by_reason(self) -> dict[str, list[str]]:
        """The places by what is wrong, numbers in the words left aside."""
        kinds: dict[str, tuple[str, list[str]]] = {}
        for _, _, place, reason in self.found:
            words = re.sub(r"0x\w+|\d+|\\u\w{4}", "#", reason.what)
            kinds.setdefault(words, (reason.what, []))[1].append(place)
        return dict(kinds.values())


def listed(names: Iterable[Any], limit: int = NUM_LISTED) -> str:
    """Return the first names of a list, and how many there are more.

    Example:
        >>> listed(range(5), limit=3)
        '0, 1, 2, ... (2 more)'
    """
    names = [str(name) for name in names]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f", ... ({rest} more)" if rest > 0 else "")


def type_name(value: Any) -> str:
    """Return the type of a value in a user's words: `None`, `nan`, `int`, `list`."""
    if value is None:
        return "None"
    return "float nan" if isinstance(value, float) and value != value else type(value).__name__


def lone_surrogate(text: str) -> str:
    """Return where a text has half of a UTF-16 pair, or a byte that was not UTF-8 when it was read
    with `surrogateescape`; '' where it has none.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            char = text[error.start]
            if "\udc80" <= char <= "\udcff":
                return f"byte 0x{ord(char) - 0xDC00:02x} is not UTF-8 (data.encoding may say more)"
            return f"lone surrogate {char!r} at character {error.start}"
    return ""


def shown_real_path(path: Path) -> str:
    """Return a path, symbolic links followed, relative when it lies under the working directory."""
    real, here = path.resolve(), Path.cwd().resolve()
    return str(real.relative_to(here)) if real.is_relative_to(here) else str(path)
