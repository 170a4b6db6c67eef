"""One row of training data after its columns were mapped, and the errors that name rows by file and
line, or a key of the recipe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes_lib.core.errors import DataError

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe

NUM_LISTED = 10


@dataclass(slots=True)
class DataRow:
    """One row: where it stands, its texts and its identity."""

    file: str
    line: int | None  # counted from 1; None where the format has no lines
    number: int  # counted from 1 within the file
    fields: dict[str, Any]  # our names -> text or messages; tools and template arguments are JSON
    category: str | None = None
    source: int = 0  # position of its source in the mixture
    id: str = ""  # unique label in splits.json
    content: bytes = b""  # SHA-256 of the normalised texts, which alone decides the split

    @property
    def place(self) -> str:
        """`file:line`, or `file row N` where the format has no lines."""
        return f"{self.file} row {self.number}" if self.line is None else f"{self.file}:{self.line}"

    @property
    def texts(self) -> list[str]:
        """All texts, of conversations all that each message says."""
        texts: list[str] = []
        for value in self.fields.values():
            if isinstance(value, str):
                texts.append(value)
            else:
                texts += [text for message in value for text in message_texts(message)]
        return texts

    @property
    def is_empty(self) -> bool:
        """Whether the text that the row should teach is empty."""
        for name in ("response", "completion", "text"):
            if isinstance(self.fields.get(name), str):
                return not self.fields[name].strip()
        messages = self.fields.get("messages") or self.fields.get("completion") or []
        answers = [message for message in messages if message["role"] == "assistant"]
        return not any(text.strip() for answer in answers for text in message_texts(answer))


def message_texts(message: Mapping[str, Any]) -> list[str]:
    """Return all that a message says: its thoughts, its content, and its tool calls as JSON."""
    thoughts = [message["reasoning_content"]] if "reasoning_content" in message else []
    calls = message.get("tool_calls", ())
    called = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
    return [*thoughts, message["content"], *called]


class SettingError(DataError):
    """A data error that a key of the recipe causes."""

    def __init__(self, key: str, what: str, *hints: str) -> None:
        super().__init__(what, *hints)
        self.key = key


class BadRow(DataError):
    """Why one row cannot be used, and what to do; `BadRows` knows which row."""


def place(recipe: Recipe, error: DataError) -> DataError:
    """Give an error without a file the place of its key, or of `data.source`, in the recipe."""
    if error.file is None:
        at = recipe.error(getattr(error, "key", "data.source"), error.what)
        error.file, error.line = at.file, at.line
    return error


def unsupported(names: Sequence[str]) -> BadRow:
    """Return the error about columns or message keys that say something and are not read."""
    joined = ", ".join(names)
    what = f"{joined}: not supported, and without it the row would say something else"
    return BadRow(what, f"to train without it: data.drop_columns: [{joined}]")


class BadRows:
    """The rows that cannot be used, of every stage, so that all are named at once."""

    def __init__(self) -> None:
        self.rows: list[tuple[DataRow, BadRow]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: DataRow, reason: BadRow) -> None:
        """Note a row; its texts are not kept."""
        bare = DataRow(row.file, row.line, row.number, {})
        self.rows.append((bare, reason.with_traceback(None)))

    def error(self, num_rows: int | None = None) -> DataError:
        """Return one error for all of them, of `num_rows` that were read: the first at its place,
        the others by what is wrong.
        """
        first, *others = self.places_by_reason().items()
        row, reason = self.rows[0]
        lines = [f"{len(first[1]) - 1} more: {listed(first[1][1:])}"] if len(first[1]) > 1 else []
        lines += [f"{listed(places, 3)}: {what}" for what, places in others[:NUM_LISTED]]
        if len(others) > NUM_LISTED:
            lines.append(f"{len(others) - NUM_LISTED} other problems")
        lines += dict.fromkeys(hint for _, bad in self.rows for hint in bad.hints)
        if num_rows is not None and len(self) < num_rows:
            count = f"{len(self)} of {num_rows}"
            lines.append(f"to leave out bad rows ({count}): data.on_bad_row: skip")
        file = row.file if row.line is not None else row.place
        return DataError(reason.what, *lines, file=file, line=row.line)

    def places_by_reason(self) -> dict[str, list[str]]:
        """Group the places by what is wrong, whatever numbers stand in the words."""
        self.rows.sort(key=lambda bad: (bad[0].file, bad[0].number))
        kinds: dict[str, tuple[str, list[str]]] = {}
        for row, reason in self.rows:
            words = re.sub(r"0x\w+|\d+|\\u\w{4}", "#", reason.what)
            kinds.setdefault(words, (reason.what, []))[1].append(row.place)
        return dict(kinds.values())


def listed(names: Iterable[Any], limit: int = NUM_LISTED) -> str:
    """Return the first names of a list, and how many there are more: `a, b, ... (2 more)`."""
    names = [str(name) for name in names]
    rest = [f"... ({len(names) - limit} more)"] if len(names) > limit else []
    return ", ".join([*names[:limit], *rest])


def parsed_json(value: Any, what: str) -> Any:
    """Return the value of a JSON text, or raise a BadRow; a value that is no text is returned."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deep")
        at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadRow(f"{what}: not JSON ({reason}{at})") from None


def type_name(value: Any) -> str:
    """Return the type of a value in a user's words: `None`, `int`, `list`."""
    return "None" if value is None else type(value).__name__


def checked_text(value: Any, what: str) -> str:
    """Return a text, or raise a BadRow where it is none or has half of a UTF-16 pair."""
    if not isinstance(value, str):
        raise BadRow(f"{what}: expected text, found {type_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        char = value[error.start]
        raise BadRow(f"{what}: lone surrogate {char!r} at character {error.start}") from None
    return value
