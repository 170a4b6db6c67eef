"""From the columns of a file to the fields of a row.

A prompt format reads a fixed set of fields (`prompts.PROMPT_FORMATS`); `data.columns` says which
column each one is. Every value is checked here once: nothing after this module meets None, a number
or a lone surrogate where text should be. `recipes new --data` asks here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.config.documents import did_you_mean
from recipes_lib.config.sections import TEXT_FORMATS, OwnRows, data_format
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import refuse_pipe
from recipes_lib.data.conversations import (
    MESSAGE_KEYS,
    check_roles,
    conversation_of,
    is_blank,
    read_messages,
    read_template_kwargs,
    read_tools,
    unread_keys,
    without_nulls,
)
from recipes_lib.data.files import Table, other_delimiter, read_file
from recipes_lib.data.prompts import CHAT, PAIR, PROMPT_FORMATS, TASK, TEXT, FieldShape
from recipes_lib.data.rows import (
    BadRow,
    BadRows,
    DataRow,
    SettingError,
    listed,
    lone_surrogate,
    shown_real_path,
    type_name,
)
from recipes_lib.data.sources import data_files

OUR_NAMES = (
    *("id", "instruction", "context", "response", "category"),
    *("prompt", "completion", "text", "messages", "system", "tools", "chat_template_kwargs"),
)
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
    *("system", "system_prompt", "history", "tools", "functions", "chat_template_kwargs"),
    *("documents", "image", "images", "audio", "audios", "video", "videos", "weight", "rejected"),
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
        names: our field -> column of the file.
        optional: fields that may be missing in a row.
        category, identity: columns, or None.
        other_conversations: columns that hold conversations in another spelling than the one read.
        meaningful: columns that may not be ignored where they say something.
        unused: all other columns.
        dropped: columns and `messages.KEY`s that the recipe leaves out.
    """

    prompt_format: str
    names: Mapping[str, str]
    optional: tuple[str, ...]
    category: str | None
    identity: str | None
    other_conversations: tuple[str, ...]
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
        found = next((table.columns for table in tables if table.columns), [])
        if not found:
            bad = BadRows()
            for table in tables:
                for number, (line, row) in enumerate(table.numbered, 1):
                    if isinstance(row, BadRow):
                        bad.add(DataRow(table.file, line, number, {}), row)
            if bad.found:
                raise bad.error()
            raise SettingError("data.source", f"0 rows in {listed(table.file for table in tables)}")
        _check_mapping(columns, found, dropped)
        found = [name for name in found if name not in dropped]
        shape, names = _choose_shape(prompt_format, columns, found)
        category, identity = _column("category", columns, found), _column("id", columns, found)
        rest = [name for name in found if name not in (*names.values(), category, identity)]
        spellings = ("messages", ALIASES["messages"])
        others = [name for name in rest if name in spellings and "messages" not in columns]
        others = others if "messages" in names else []
        rest = [name for name in rest if name not in spellings or "messages" not in names]
        meaningful = tuple(name for name in rest if name in MEANINGFUL and columns.get(name) != "")
        return cls(
            prompt_format,
            names,
            shape.optional,
            category,
            identity,
            tuple(others),
            meaningful,
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
        self._refuse_unread(values)
        is_chat = self.prompt_format == "chat"
        for name, column in self.names.items():
            value = values.get(column)
            if columnar and isinstance(value, dict | list):
                value = without_nulls(value)
            if name == "messages" or (
                is_chat and name in ("prompt", "completion") and isinstance(value, list)
            ):
                row.fields[name] = read_messages(value, column, self.dropped)
            elif name in _STRUCTURED:
                if not is_blank(value):
                    row.fields[name] = _STRUCTURED[name](value, column)
            else:
                if value is None and name in self.optional:
                    value = ""
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
        kind = values.get(self.category) if self.category else None
        row.category = kind if kind is None else str(kind)
        identity = values.get(self.identity) if self.identity else None
        row.id = str(identity) if isinstance(identity, str | int) else ""

    def _refuse_unread(self, values: Mapping[str, Any]) -> None:
        """Refuse a row that says something in a column or a message's key that nothing reads."""
        twice = [name for name in self.other_conversations if not is_blank(values.get(name))]
        if twice and not is_blank(values.get(self.names["messages"])):
            chosen = self.names["messages"]
            what = f"columns '{chosen}' and '{twice[0]}' both hold a conversation"
            raise BadRow(what, f"say which one is read: data.columns: {{messages: {chosen}}}")
        unread = [name for name in self.meaningful if not is_blank(values.get(name))]
        if self.prompt_format == "chat":
            for name in ("messages", "prompt", "completion"):
                unread += unread_keys(values.get(self.names.get(name, "")), self.dropped)
        if unread := list(dict.fromkeys(unread)):
            them = "it" if len(unread) == 1 else "them"
            what = f"{', '.join(unread)}: not supported, and the row would be another one without"
            raise BadRow(f"{what} {them}", drop=unread)


def _text(value: Any, column: str, is_missing: bool) -> str:
    if not isinstance(value, str):
        missing = " (the column is missing in this row)" if is_missing else ""
        raise BadRow(f"column '{column}': expected text, found {type_name(value)}{missing}")
    if what := lone_surrogate(value):
        raise BadRow(f"column '{column}': {what}")
    return value


def look_at(data: Path) -> OwnRows:
    """Guess from the first row of a file, or of a folder's first training file, how to read it.

    Raises:
        DataError: no such file, no row, damaged, or columns that mean nothing to us.
    """
    data = data.expanduser()
    shown = shown_real_path(data)
    if not data.exists():
        hint = "for a data set on the Hub: start without --data and set data.source"
        raise DataError("no such file", hint, file=shown)
    refuse_pipe(data, shown)
    file = data_files(data, "train")[0] if data.is_dir() else data
    encoding, delimiter = _guessed_encoding(file), None
    if data_format(file) == ".csv" and file.suffix != ".gz":
        with file.open(encoding=encoding or "utf-8") as stream:
            delimiter = other_delimiter(stream.readline(100_000).split(",")) or None
    rows = read_file(file, max_rows=1, encoding=encoding or "utf-8", delimiter=delimiter).rows
    names = list(rows[0]) if rows else []
    if not names:
        raise DataError("has no row with named columns", file=shown_real_path(file))

    def own_rows(
        prompt_formats: tuple[str, ...],
        columns: dict[str, str] | None = None,
        whole_text: bool = False,
    ) -> OwnRows:
        return OwnRows(data, prompt_formats, columns or {}, whole_text, delimiter, encoding)

    for shape, prompt_formats in ((CHAT, ("chat",)), (PAIR, ("raw", "chat")), (TEXT, ("raw",))):
        if {*shape.required} <= {*names} and "response" not in names:
            return own_rows(prompt_formats, whole_text=shape is TEXT)
    if "conversations" in names:
        return own_rows(("chat",), {"messages": "conversations"})
    columns = {
        ours: next((name for name in synonyms if name in names), "")
        for ours, synonyms in _SYNONYMS.items()
    }
    if not columns["instruction"] or not columns["response"]:
        what = f"columns {', '.join(names)} are not understood"
        hint = "rename them, or start without --data and set data.source and data.columns yourself"
        raise DataError(what, hint, file=shown_real_path(file), line=1)
    if columns["context"] == columns["instruction"]:  # one column is not two
        columns["context"] = ""
    else:
        columns = {ours: name for ours, name in columns.items() if name and name != ours}
    return own_rows(("dolly", "alpaca", "chat"), columns)


def _guessed_encoding(file: Path) -> str | None:
    """Return latin-1 or cp1252 for a text file that is not UTF-8, else None."""
    if data_format(file) not in TEXT_FORMATS or file.suffix == ".gz":
        return None
    content = file.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        if b"\0" in content:  # UTF-16, whose reading says what is wrong
            return None
        return "cp1252" if any(0x80 <= byte < 0xA0 for byte in content) else "latin-1"
    return None


def _check_mapping(
    columns: Mapping[str, str], found: Sequence[str], dropped: Sequence[str]
) -> None:
    for name in dropped:
        if name.startswith("messages.") and name.removeprefix("messages.") in MESSAGE_KEYS:
            what = f"data.drop_columns: {name} cannot be left out: it says who speaks, or what"
            raise SettingError("data.drop_columns", what)
    for name, column in columns.items():
        if name not in OUR_NAMES:
            hints = did_you_mean(name, OUR_NAMES) or [f"names: {', '.join(OUR_NAMES)}"]
            raise SettingError("data.columns", f"unknown name '{name}' in data.columns", *hints)
        if column and column not in found:
            hints = did_you_mean(column, found) or [f"columns are {', '.join(found)}"]
            what = f"data.columns.{name}: the data has no column '{column}'"
            raise SettingError("data.columns", what, *hints)


def _column(name: str, columns: Mapping[str, str], found: Sequence[str]) -> str | None:
    """Return the file's column for one of our names: mapped, of the same name, or an alias."""
    if name in columns:
        return columns[name] or None
    return next((known for known in (name, ALIASES.get(name, name)) if known in found), None)


def _choose_shape(
    prompt_format: str, columns: Mapping[str, str], found: Sequence[str]
) -> tuple[FieldShape, dict[str, str]]:
    """Return the first set of fields of the format that the columns can fill, and their columns."""

    def can_fill(shape: FieldShape) -> bool:
        return all(_column(name, columns, found) for name in shape.required)

    shapes = PROMPT_FORMATS[prompt_format].shapes
    for shape in filter(can_fill, shapes):
        names = {name: _column(name, columns, found) for name in (*shape.required, *shape.optional)}
        return shape, {name: column for name, column in names.items() if column}
    expected = " / ".join("+".join(shape.required) for shape in shapes)
    task = "alpaca" if "input" in found else "dolly"
    fitting = [
        f"`data.prompt_format: {name}`"
        for name, some in ((task, [TASK]), ("chat", [CHAT]), ("raw", [PAIR, TEXT]))
        if name != prompt_format and any(map(can_fill, some))
    ]
    mapping = "name them: data.columns: {<our name>: <your column>}"
    raise SettingError(
        "data.prompt_format",
        f"columns are {', '.join(found)}; expected {expected} for prompt_format {prompt_format}",
        *([f"try {' or '.join(fitting)}", f"or {mapping}"] if fitting else [mapping]),
    )
