"""From the columns of a file to the fields of an example: mapping, and checks of every value.

A prompt format reads a fixed set of fields (`FORMATS`); `data.columns` says which column of the
file each one is. Every value is checked here once, so that nothing after this module meets None, a
number or a lone surrogate where text should be.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes_lib.data.conversations import (
    MESSAGE_KEYS,
    check_roles,
    conversation_of,
    is_blank,
    read_messages,
    unread_keys,
)
from recipes_lib.data.examples import BadRow, BadRows, Example, SettingError, listed, type_name
from recipes_lib.data.files import Table

IDS_HINT = "set data.columns.id to '' to name rows by a hash of their content instead"

OUR_NAMES = (
    "id",
    "instruction",
    "context",
    "response",
    "category",
    "prompt",
    "completion",
    "text",
    "messages",
    "system",
)
ALIASES = {
    "context": ("input",),
    "response": ("output",),
    "messages": ("conversations",),
    "system": ("system_prompt",),
}
# Columns that other programs put into what the model reads or learns. Where they say something,
# leaving them out makes other rows.
MEANINGFUL = (
    "system",
    "system_prompt",
    "history",
    "tools",
    "functions",
    "chat_template_kwargs",
    "documents",
    "image",
    "images",
    "audio",
    "audios",
    "video",
    "videos",
    "weight",
    "rejected",
)


@dataclass(frozen=True)
class FieldShape:
    """One set of fields a prompt format accepts."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


TASK = FieldShape(("instruction", "response"), ("context",))
PAIR = FieldShape(("prompt", "completion"))
TEXT = FieldShape(("text",))
FORMATS: dict[str, tuple[FieldShape, ...]] = {
    "dolly": (TASK,),
    "alpaca": (TASK,),
    "chat": (
        FieldShape(("messages",), ("system",)),
        FieldShape(("prompt", "completion"), ("system",)),
        FieldShape(("instruction", "response"), ("context", "system")),
    ),
    "raw": (PAIR, TEXT),
}


@dataclass(frozen=True)
class Reading:
    """How the rows of one source become examples, decided once from its column names.

    Args:
        names: our field -> column of the file.
        optional: fields that may be missing in a row.
        category, identity: columns, or None.
        meaningful: columns that may not be ignored where they say something.
        unused: all other columns.
        dropped: columns and `messages.KEY`s that the recipe leaves out.
    """

    prompt_format: str
    names: Mapping[str, str]
    optional: tuple[str, ...]
    category: str | None
    identity: str | None
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
            columns: our name -> column of the file; names that are absent stand for the column of
                the same name.
            dropped: `data.drop_columns`.

        Raises:
            SettingError: no rows, or columns that the format cannot use.
        """
        found = next((table.columns for table in tables if table.columns), [])
        if not found:
            if (bad := _bad_lines(tables)).found:
                raise bad.error()
            raise SettingError("data.source", f"0 rows in {listed(table.file for table in tables)}")
        _check_dropped(dropped)
        _check_mapping(columns, found)
        found = [name for name in found if name not in dropped]
        shape, names = _choose_shape(prompt_format, columns, found)
        category, identity = _column("category", columns, found), _column("id", columns, found)
        rest = [name for name in found if name not in (*names.values(), category, identity)]
        meaningful = tuple(name for name in rest if name in MEANINGFUL and columns.get(name) != "")
        unused = tuple(name for name in rest if name not in meaningful)
        return cls(
            prompt_format,
            names,
            shape.optional,
            category,
            identity,
            meaningful,
            unused,
            tuple(dropped),
        )

    def examples(self, table: Table, bad: BadRows) -> Iterator[Example]:
        """The usable rows of a file; the others are added to `bad`."""
        for number, (line, row) in enumerate(table, 1):
            example = Example(table.file, line, number, {})
            try:
                if isinstance(row, BadRow):
                    raise row
                self._fill(example, row)
            except BadRow as reason:
                bad.add(example, reason.with_traceback(None))
                continue
            yield example

    def _fill(self, example: Example, row: Mapping[str, Any]) -> None:
        """Put the row's values into the example."""
        unread = [name for name in self.meaningful if not is_blank(row.get(name))]
        if self.prompt_format == "chat":
            for name in ("messages", "prompt", "completion"):
                unread += unread_keys(row.get(self.names.get(name, "")), self.dropped)
        if unread:
            unread = list(dict.fromkeys(unread))
            what = (
                f"{', '.join(unread)}: not supported, and the row would be another one without"
                f" {'it' if len(unread) == 1 else 'them'}"
            )
            raise BadRow(what, drop=unread)
        for name, column in self.names.items():
            value = row.get(column)
            if name == "messages" or (
                name in ("prompt", "completion")
                and isinstance(value, list)
                and self.prompt_format == "chat"
            ):
                example.fields[name] = read_messages(value, column)
                continue
            if value is None and name in self.optional:
                value = ""
            if not isinstance(value, str):
                missing = "" if column in row else " (the column is missing in this row)"
                raise BadRow(f"column '{column}': expected text, found {type_name(value)}{missing}")
            if not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    what = (
                        f"lone surrogate {value[error.start]!r} at character {error.start}, which"
                        " has no UTF-8 form"
                    )
                    raise BadRow(f"column '{column}': {what}") from None
            example.fields[name] = value
        if isinstance(example.fields.get("prompt"), list) != isinstance(
            example.fields.get("completion"), list
        ):
            raise BadRow("prompt and completion: one is text, the other a list of messages")
        if self.prompt_format == "chat":
            self._check_conversation(example)
        kind = row.get(self.category) if self.category else None
        example.category = kind if kind is None or isinstance(kind, str) else str(kind)
        if self.identity:
            example.explicit_id = value = row.get(self.identity)
            if value is None or value == "" or isinstance(value, (float, bool, list, dict)):
                what = (
                    f"column '{self.identity}': no usable id, found"
                    f" {type_name(value) if value != '' else 'empty text'}"
                )
                raise BadRow(what, IDS_HINT)

    def _check_conversation(self, example: Example) -> None:
        system = example.fields.get("system")
        messages = conversation_of(example, None)
        if system and messages[0] != {"role": "system", "content": system}:
            raise BadRow(f"a system message and another text in column '{self.names['system']}'")
        check_roles(messages)


def _bad_lines(tables: Sequence[Table]) -> BadRows:
    """The lines that are no row, of files in which no line is one."""
    bad = BadRows()
    for table in tables:
        for number, (line, row) in enumerate(table, 1):
            if isinstance(row, BadRow):
                bad.add(Example(table.file, line, number, {}), row)
    return bad


def _column(name: str, columns: Mapping[str, str], found: Sequence[str]) -> str | None:
    """The file's column for one of our names: mapped, or of the same name, or a well-known other
    name.
    """
    if name in columns:
        return columns[name] or None
    return next(
        (candidate for candidate in (name, *ALIASES.get(name, ())) if candidate in found), None
    )


def _choose_shape(
    prompt_format: str, columns: Mapping[str, str], found: Sequence[str]
) -> tuple[FieldShape, dict[str, str]]:
    """The first set of fields of the format that the columns can fill, and the column of each
    field.
    """
    for shape in FORMATS[prompt_format]:
        names = {name: _column(name, columns, found) for name in (*shape.required, *shape.optional)}
        if all(names[name] for name in shape.required):
            return shape, {name: column for name, column in names.items() if column}
    expected = " / ".join("+".join(shape.required) for shape in FORMATS[prompt_format])
    what = f"columns are {', '.join(found)}; expected {expected} for prompt_format {prompt_format}"
    raise SettingError("data.prompt_format", what, *_suggestions(prompt_format, columns, found))


def _suggestions(prompt_format: str, columns: Mapping[str, str], found: Sequence[str]) -> list[str]:
    fitting = []
    for name, shapes in (
        ("alpaca" if "input" in found else "dolly", (TASK,)),
        ("chat", FORMATS["chat"][:1]),
        ("raw", (PAIR, TEXT)),
    ):
        if name != prompt_format and any(
            all(_column(field, columns, found) for field in shape.required) for shape in shapes
        ):
            fitting.append(f"`data.prompt_format: {name}`")
    mapping = "or name them: data.columns: {<our name>: <your column>}"
    return (
        [f"try {' or '.join(fitting)}", mapping]
        if fitting
        else [f"name them: {mapping.removeprefix('or name them: ')}"]
    )


def _check_dropped(dropped: Sequence[str]) -> None:
    for name in dropped:
        if (key := name.removeprefix("messages.")) != name and key in MESSAGE_KEYS:
            what = (
                f"data.drop_columns: {name} cannot be left out: it says who speaks, what, or"
                " whether it carries loss"
            )
            raise SettingError("data.drop_columns", what)


def check_dropped_are_there(dropped: Sequence[str], found: Collection[str]) -> None:
    """Refuse a `data.drop_columns` that names no column of any source: a typing error there would
    be silent.

    Raises:
        SettingError: the first such name.
    """
    for name in dropped:
        if not name.startswith("messages.") and name not in found:
            near = difflib.get_close_matches(name, found, 1)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else f"columns are {', '.join(found)}; keys of messages are written messages.KEY"
            )
            raise SettingError(
                "data.drop_columns", f"data.drop_columns: the data has no column '{name}'", hint
            )


def _check_mapping(columns: Mapping[str, str], found: Sequence[str]) -> None:
    for name, column in columns.items():
        if name not in OUR_NAMES:
            near = difflib.get_close_matches(name, OUR_NAMES, 1)
            hint = f"did you mean {near[0]}?" if near else f"names: {', '.join(OUR_NAMES)}"
            raise SettingError("data.columns", f"unknown name '{name}' in data.columns", hint)
        if column and column not in found:
            near = difflib.get_close_matches(column, found, 1)
            hint = f"did you mean {near[0]}?" if near else f"columns are {', '.join(found)}"
            raise SettingError(
                "data.columns", f"data.columns.{name}: the data has no column '{column}'", hint
            )
