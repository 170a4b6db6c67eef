"""From the columns of a file to the fields of a row.

A prompt format reads a fixed set of fields; `data.columns` says which column each one is. Every
value is checked here once: nothing after this module meets None, a number or a lone surrogate where
text should be. `recipes new --data` asks here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recipes_lib.config.documents import did_you_mean
from recipes_lib.config.sections import TEXT_FORMATS, OwnRows, data_format
from recipes_lib.core.errors import DataError
from recipes_lib.core.project import shown_path
from recipes_lib.data.conversations import (
    check_roles,
    conversation_of,
    is_blank,
    read_messages,
    read_template_kwargs,
    read_tools,
    without_nulls,
)
from recipes_lib.data.rows import (
    BadRow,
    BadRows,
    DataRow,
    SettingError,
    listed,
    lone_surrogate,
    not_supported,
    type_name,
)
from recipes_lib.data.sources import Table, data_files, other_delimiter, read_file


class FieldSet(NamedTuple):
    """One set of fields that a prompt format reads."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_BESIDE = ("system", "tools", "chat_template_kwargs")
TASK = FieldSet(("instruction", "response"), ("context",))
# What each prompt format can read, the best first.
FIELDS = {
    "dolly": (TASK,),
    "alpaca": (TASK,),
    "chat": (
        FieldSet(("messages",), _BESIDE),
        FieldSet(("prompt", "completion"), _BESIDE),
        FieldSet(("instruction", "response"), ("context", *_BESIDE)),
    ),
    "raw": (FieldSet(("prompt", "completion")), FieldSet(("text",))),
}
ALIASES = {
    "context": "input",
    "response": "output",
    "messages": "conversations",
    "system": "system_prompt",
    "tools": "functions",
}
# Fields that are not text in a file, and how they become JSON text.
_STRUCTURED = {"tools": read_tools, "chat_template_kwargs": read_template_kwargs}
# Columns that other programs put into what the model reads or learns: without what they say, rows
# are others.
MEANINGFUL = {
    *("messages", "conversations", "history", "documents", "weight", "rejected"),
    *("system", "system_prompt", "tools", "functions", "chat_template_kwargs"),
    *("image", "images", "audio", "audios", "video", "videos"),
}
# Names that files use for ours, best first; `input` is the question where nothing else is.
_SYNONYMS = {
    "instruction": ("instruction", "question", "query", "input_text", "input"),
    "response": ("response", "output", "answer", "completion", "target"),
    "context": ("context", "input"),
}


@dataclass(frozen=True)
class Reading:
    """How the rows of one source become `DataRow`s, decided once from its column names.

    Args:
        names: our field -> column of the file; `category` and `id` among them.
        optional: fields that may be missing in a row.
        meaningful: columns that may not be ignored where they say something.
        unused: all other columns.
        dropped: columns and `messages.KEY`s that the recipe leaves out.
    """

    prompt_format: str
    names: Mapping[str, str]
    optional: tuple[str, ...]
    meaningful: tuple[str, ...]
    unused: tuple[str, ...]
    dropped: tuple[str, ...]

    @classmethod
    def of(
        cls,
        tables: Sequence[Table],
        prompt_format: str,
        columns: Mapping[str, str],
        dropped: Sequence[str] = (),
    ) -> Reading:
        """Decide how to read the rows of one source.

        Args:
            columns: our name -> column of the file, where it is not of the same name.
            dropped: `data.drop_columns`.

        Raises:
            SettingError: no rows, or columns that the format cannot use.
        """
        present = next((table.columns for table in tables if table.columns), [])
        if not present:
            for table in tables:
                _ = table.rows  # names the first line that is no row
            raise SettingError("data.source", f"0 rows in {listed(table.file for table in tables)}")
        for name, column in columns.items():
            if column and column not in present:
                hints = did_you_mean(column, present) or [f"columns are {', '.join(present)}"]
                what = f"data.columns.{name}: the data has no column '{column}'"
                raise SettingError("data.columns", what, *hints)
        present = [name for name in present if name not in dropped]
        fields = _choose_fields(prompt_format, columns, present)
        names = {
            name: known
            for name in (*fields.required, *fields.optional, "category", "id")
            if (known := _column(name, columns, present))
        }
        rest = [name for name in present if name not in names.values()]
        meaningful = [name for name in rest if name in MEANINGFUL and columns.get(name) != ""]
        if "messages" in columns or "messages" not in names:  # else nobody said which one counts
            meaningful = [name for name in meaningful if name not in ("messages", "conversations")]
        return cls(
            prompt_format,
            names,
            fields.optional,
            tuple(meaningful),
            unused=tuple(name for name in rest if name not in meaningful),
            dropped=tuple(dropped),
        )

    def rows(self, table: Table, source: int, bad: BadRows) -> Iterator[DataRow]:
        """Yield the usable rows of a file; the others are added to `bad`."""
        for number, (line, values) in enumerate(table.numbered, 1):
            row = DataRow(table.file, line, number, {}, source=source)
            try:
                if isinstance(values, BadRow):
                    raise values
                self._fill(row, values, table.columnar)
            except BadRow as reason:
                bad.add(row, reason)
            else:
                yield row

    def _fill(self, row: DataRow, values: Mapping[str, Any], columnar: bool) -> None:
        """Put a file's values into the row."""
        if unread := [name for name in self.meaningful if not is_blank(values.get(name))]:
            raise not_supported(unread)
        is_chat = self.prompt_format == "chat"
        for name, column in self.names.items():
            value = values.get(column)
            if columnar and isinstance(value, dict | list):
                value = without_nulls(value)
            if name == "category":
                row.category = None if value is None else str(value)
            elif name == "id":
                row.id = str(value) if isinstance(value, str | int) else ""
            elif name == "messages" or (
                is_chat and name in ("prompt", "completion") and isinstance(value, list)
            ):
                row.fields[name] = read_messages(value, column, self.dropped)
            elif name in _STRUCTURED:
                if not is_blank(value):
                    row.fields[name] = _STRUCTURED[name](value, column)
            else:
                value = "" if value is None and name in self.optional else value
                row.fields[name] = _text(value, column, is_missing=column not in values)
        prompt, completion = row.fields.get("prompt"), row.fields.get("completion")
        if isinstance(prompt, list) != isinstance(completion, list):
            raise BadRow("prompt and completion: one is text, the other a list of messages")
        if is_chat:
            messages = conversation_of(row, None)
            if (system := row.fields.get("system")) and messages[0]["content"] != system:
                column = self.names["system"]
                raise BadRow(f"a system message and another text in column '{column}'")
            check_roles(messages)


def _text(value: Any, column: str, is_missing: bool) -> str:
    if not isinstance(value, str):
        missing = " (the column is missing in this row)" if is_missing else ""
        raise BadRow(f"column '{column}': expected text, found {type_name(value)}{missing}")
    if what := lone_surrogate(value):
        raise BadRow(f"column '{column}': {what}")
    return value


def _column(name: str, columns: Mapping[str, str], present: Sequence[str]) -> str | None:
    """Return the file's column for one of our names: mapped, of the same name, or an alias."""
    if name in columns:
        return columns[name] or None
    return next((known for known in (name, ALIASES.get(name, name)) if known in present), None)


def _fields_for(
    prompt_format: str, columns: Mapping[str, str], present: Sequence[str]
) -> FieldSet | None:
    """Return the first set of fields of the format that the columns can fill."""
    for fields in FIELDS[prompt_format]:
        if all(_column(name, columns, present) for name in fields.required):
            return fields
    return None


def _choose_fields(
    prompt_format: str, columns: Mapping[str, str], present: Sequence[str]
) -> FieldSet:
    if fields := _fields_for(prompt_format, columns, present):
        return fields
    expected = " / ".join("+".join(fields.required) for fields in FIELDS[prompt_format])
    fitting = [f"`data.prompt_format: {name}`" for name in _readable_by(columns, present)]
    mapping = "name them: data.columns: {<our name>: <your column>}"
    raise SettingError(
        "data.prompt_format",
        f"columns are {', '.join(present)}; expected {expected} for prompt_format {prompt_format}",
        *([f"try {' or '.join(fitting)}", f"or {mapping}"] if fitting else [mapping]),
    )


def look_at(data: Path) -> OwnRows:
    """Guess from the first row of a file, or of a folder's first training file, how to read it.

    Raises:
        DataError: no such file, no row, damaged, or columns that mean nothing to us.
    """
    data = data.expanduser()
    if not data.exists():
        hint = "for a data set on the Hub: start without --data and set data.source"
        raise DataError("no such file", hint, file=shown_path(data))
    file = data_files(data, "train")[0] if data.is_dir() else data
    encoding, delimiter = None, None
    if data_format(file) in TEXT_FORMATS and file.suffix != ".gz" and file.is_file():
        encoding = _guessed_encoding(file.read_bytes())
        with file.open(encoding=encoding or "utf-8", errors="replace") as stream:
            header = stream.readline(100_000)
        if data_format(file) == ".csv":
            delimiter = other_delimiter(header.split(",")) or None
    rows = read_file(file, max_rows=1, encoding=encoding or "utf-8", delimiter=delimiter).rows
    names = [*rows[0]] if rows else []
    columns: dict[str, str] = {}
    formats = _readable_by(columns, names)
    if not formats:
        for ours, synonyms in _SYNONYMS.items():
            if known := next((name for name in synonyms if name in names), ""):
                columns[ours] = "" if known in columns.values() else known  # one column is not two
        formats = _readable_by(columns, names)
    if not formats:
        what = f"columns {', '.join(names)} are not understood" if names else "has no row"
        hint = "start without --data and set data.source and data.columns yourself"
        raise DataError(what, hint, file=shown_path(file), line=1)
    return OwnRows(data, formats, columns, formats == ("raw",), delimiter, encoding)


def _readable_by(columns: Mapping[str, str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the prompt formats that can read rows with these columns, the best first."""
    order = ("dolly", "alpaca", "raw", "chat")
    return tuple(name for name in order if _fields_for(name, columns, names))


def _guessed_encoding(content: bytes) -> str | None:
    """Return cp1252, of which latin-1 is a part, for a text that is not UTF-8 (nor UTF-16)."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return None if b"\0" in content else "cp1252"
    return None
