"""From the columns of a file to the fields of a row.

A prompt format reads a fixed set of fields; `data.columns` says which column each one is. Every
value is checked here once: nothing after this module meets None, a number or a lone surrogate where
text should be. `recipes new --data` asks here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.config.documents import did_you_mean
from recipes_lib.config.sections import DataSection, OwnRows
from recipes_lib.core.errors import DataError
from recipes_lib.core.project import shown_path
from recipes_lib.data.conversations import (
    check_roles,
    conversation_of,
    is_blank,
    read_messages,
    read_template_kwargs,
    read_tools,
)
from recipes_lib.data.rows import BadRow, BadRows, DataRow, SettingError, checked_text, unsupported
from recipes_lib.data.sources import column_names, data_files, read_file

# The sets of fields that a prompt format can read, the best first.
FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "dolly": (("instruction", "response"),),
    "alpaca": (("instruction", "response"),),
    "raw": (("prompt", "completion"), ("text",)),
    "chat": (("messages",), ("prompt", "completion"), ("instruction", "response")),
}
OF_CHAT = ("system", "tools", "chat_template_kwargs")
# Names that files use for ours.
ALIASES = {
    "instruction": ("question",),
    "context": ("input",),
    "response": ("output", "answer"),
    "messages": ("conversations",),
    "system": ("system_prompt",),
    "tools": ("functions",),
}
# Columns that other programs put into what the model reads or learns: without what they say, rows
# are others.
MEANINGFUL = {
    *("messages", "conversations", "history", "documents", "weight", "rejected"),
    *("system", "system_prompt", "tools", "functions", "chat_template_kwargs"),
    *("image", "images", "audio", "audios", "video", "videos"),
}


def map_columns(
    rows: Sequence[DataRow], section: DataSection, columns: Mapping[str, str], bad: BadRows
) -> tuple[list[DataRow], list[str]]:
    """Give the rows of one source our fields in place of its columns (`columns`: our name -> the
    file's). Return the usable rows, and the columns that nothing reads.
    """
    present = column_names(rows)
    for name, column in columns.items():
        if column and column not in present:
            hints = did_you_mean(column, present) or [f"columns are {', '.join(present)}"]
            what = f"data.columns.{name}: the data has no column '{column}'"
            raise SettingError("data.columns", what, *hints)
    present = [name for name in present if name not in section.drop_columns]
    prompt_format = section.prompt_format
    required = _fields_for(prompt_format, columns, present)
    if not required:
        expected = " / ".join("+".join(fields) for fields in FIELDS[prompt_format])
        what = f"columns are {', '.join(present)}; expected {expected}"
        fitting = [f"data.prompt_format: {other}" for other in _formats_for(columns, present)]
        hint = " or ".join([*fitting, "data.columns: {<our name>: <your column>}"])
        what += f" for prompt_format {prompt_format}"
        raise SettingError("data.prompt_format", what, f"set {hint}")
    read = [*required, "category", "id"]
    read += ["context"] if "instruction" in required else []
    read += OF_CHAT if prompt_format == "chat" else []
    names = {name: known for name in read if (known := _column(name, columns, present))}
    rest = [name for name in present if name not in names.values()]
    meaningful = {name for name in rest if name in MEANINGFUL and columns.get(name) != ""}
    if "messages" in columns or "messages" not in names:  # else nobody said which one counts
        meaningful -= {"messages", "conversations"}
    usable = []
    for row in rows:
        values, row.fields = row.fields, {}
        try:
            if unread := [name for name in meaningful if not is_blank(values.get(name))]:
                raise unsupported(sorted(unread))
            _fill(row, values, names, section)
        except BadRow as reason:
            bad.add(row, reason)
        else:
            usable.append(row)
    return usable, [name for name in rest if name not in meaningful]


def _fill(
    row: DataRow, values: Mapping[str, Any], names: Mapping[str, str], section: DataSection
) -> None:
    fields, is_chat = row.fields, section.prompt_format == "chat"
    for name, column in names.items():
        value = values.get(column)
        if name == "category":
            row.category = None if value is None else str(value)
        elif name == "id":
            row.id = str(value) if isinstance(value, str | int) else ""
        elif name == "messages" or (
            is_chat and name in ("prompt", "completion") and isinstance(value, list)
        ):
            fields[name] = read_messages(value, column, section.drop_columns)
        elif name in ("tools", "chat_template_kwargs"):
            if not is_blank(value):
                read = read_tools if name == "tools" else read_template_kwargs
                fields[name] = read(value, column)
        else:
            if value is None and name in ("context", "system"):
                value = ""
            fields[name] = checked_text(value, f"column '{column}'")
    if isinstance(fields.get("prompt"), list) != isinstance(fields.get("completion"), list):
        raise BadRow("prompt and completion: one is text, the other a list of messages")
    if is_chat:
        messages = conversation_of(row, None)
        if fields.get("system") and messages[0]["content"] != fields["system"]:
            raise BadRow(f"a system message and another text in column '{names['system']}'")
        check_roles(messages)


def _column(name: str, columns: Mapping[str, str], present: Sequence[str]) -> str | None:
    """Return the file's column for one of our names: mapped, of the same name, or an alias."""
    if name in columns:
        return columns[name] or None
    return next((known for known in (name, *ALIASES.get(name, ())) if known in present), None)


def _fields_for(
    prompt_format: str, columns: Mapping[str, str], present: Sequence[str]
) -> tuple[str, ...]:
    """Return the first set of fields of the format that the columns can fill, or none."""
    for required in FIELDS[prompt_format]:
        if all(_column(name, columns, present) for name in required):
            return required
    return ()


def _formats_for(columns: Mapping[str, str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the prompt formats that can read rows with these columns, the best first."""
    return tuple(name for name in FIELDS if _fields_for(name, columns, names))


def look_at(data: Path) -> OwnRows:
    """Return what can read a file, or a folder's first training file, by its first row."""
    data = data.expanduser()
    if not data.exists():
        hint = "for a data set on the Hub: start without --data and set data.source"
        raise DataError("no such file", hint, file=shown_path(data))
    file = data_files(data, "train")[0] if data.is_dir() else data
    names = column_names(read_file(file, max_rows=1))
    if not names:
        raise DataError("the file has no rows", file=shown_path(file))
    formats = _formats_for({}, names)
    if not formats:
        hint = "start without --data and set data.source and data.columns yourself"
        what = f"columns {', '.join(names)} are not understood"
        raise DataError(what, hint, file=shown_path(file), line=1)
    return OwnRows(data, formats)
