"""From the columns of a file to the fields of an example: mapping, checks of every value, identity.

A prompt format reads a fixed set of fields (`FORMATS`); `data.columns` says which column of the file each one is. Every
value is checked here once, so that nothing after this module meets None, a number or a lone surrogate where text should be.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes_lib.data.conversations import read_messages
from recipes_lib.data.examples import Example, SettingError, content_hash, listed, row_errors, type_name
from recipes_lib.data.files import Table

OUR_NAMES = ("id", "instruction", "context", "response", "category", "prompt", "completion", "text", "messages")
ALIASES = {"context": ("input",), "response": ("output",), "messages": ("conversations",)}


@dataclass(frozen=True)
class Shape:
    """One set of fields a prompt format accepts."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


TASK = Shape(("instruction", "response"), ("context",))
PAIR = Shape(("prompt", "completion"))
CONVERSATION = Shape(("messages",))
TEXT = Shape(("text",))
FORMATS: dict[str, tuple[Shape, ...]] = {
    "dolly": (TASK,),
    "alpaca": (TASK,),
    "chat": (CONVERSATION, PAIR, TASK),
    "raw": (PAIR, TEXT),
}


def read_examples(tables: Sequence[Table], prompt_format: str, columns: Mapping[str, str], source: int = 0) -> list[Example]:
    """Map and check the rows of one source.

    Args:
        columns: our name -> column of the file; names that are absent stand for the column of the same name.
        source: position in a mixture.

    Raises:
        DataError: no rows, columns that the format cannot use, or values that are not text; with file and line.
    """
    rows = sum(len(table.rows) for table in tables)
    if not rows:
        raise SettingError("data.source", f"0 rows in {listed(table.file for table in tables)}")
    found = next(table.columns for table in tables if table.rows)
    _check_mapping(columns, found)
    shape, names = _choose_shape(prompt_format, columns, found)
    category, identity = _column("category", columns, found), _column("id", columns, found)
    examples, problems = [], []
    for table in tables:
        lines: Sequence[int | None] = table.lines or [None] * len(table.rows)
        for number, (row, line) in enumerate(zip(table.rows, lines, strict=True), 1):
            example = Example(table.file, line, number, {}, source=source)
            problem = _fill(example, row, shape, names, prompt_format)
            if problem:
                problems.append((example, problem))
            kind = row.get(category) if category else None
            example.category = kind if kind is None or isinstance(kind, str) else str(kind)
            example.explicit_id = row.get(identity) if identity else None
            examples.append(example)
    if problems:
        raise row_errors(problems)
    _identify(examples, identity)
    return examples


def _fill(example: Example, row: Mapping[str, Any], shape: Shape, names: Mapping[str, str], prompt_format: str) -> str | None:
    """Put the row's values into the example; return what is wrong with the first bad one."""
    for name, column in names.items():
        value = row.get(column)
        if name == "messages" or (isinstance(value, list) and shape is PAIR and prompt_format == "chat"):
            messages, problem = read_messages(value, column)
            if problem:
                return problem
            example.fields[name] = messages
            continue
        if value is None and name in shape.optional:
            value = ""
        if not isinstance(value, str):
            missing = "" if column in row else " (the column is missing in this row)"
            return f"column '{column}': expected text, found {type_name(value)}{missing}"
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                return f"column '{column}': lone surrogate {value[error.start]!r} at character {error.start}, which has no UTF-8 form"
        example.fields[name] = value
    if shape is PAIR and isinstance(example.fields["prompt"], list) != isinstance(example.fields["completion"], list):
        return "prompt and completion: one is text, the other a list of messages"
    return None


def _identify(examples: list[Example], identity: str | None) -> None:
    """Give every example its content hash, its id and the key of the hash split."""
    if identity:
        _check_ids(examples, identity)
    seen: dict[str, int] = {}
    for example in examples:
        example.content = content_hash(example.fields)
        example.split_key = example.content if identity is None else str(example.explicit_id)
        name = example.content[:16] if identity is None else str(example.explicit_id)
        seen[name] = count = seen.get(name, 0) + 1
        example.id = name if count == 1 else f"{name}#{count}"


def _check_ids(examples: Iterable[Example], column: str) -> None:
    """Explicit ids must be there, of one type, and unique."""
    hint = "set data.columns.id to '' to name rows by a hash of their content instead"
    missing: list[tuple[Example, str]] = []
    repeated: list[tuple[Example, str]] = []
    types: dict[type, Example] = {}
    seen: dict[Any, Example] = {}
    for example in examples:
        value = example.explicit_id
        if value is None or value == "" or isinstance(value, (float, bool, list, dict)):
            missing.append((example, f"column '{column}': no usable id, found {type_name(value) if value != '' else 'empty text'}"))
            continue
        types.setdefault(type(value), example)
        if value in seen:
            repeated.append((example, f"id {value!r} appears again (first at {seen[value].place})"))
        seen.setdefault(value, example)
    if missing:
        raise row_errors(missing, hint)
    if len(types) > 1:
        (first, at), (second, other) = list(types.items())[:2]
        raise row_errors([(other, f"ids of mixed types: {second.__name__} here, {first.__name__} at {at.place}")], hint)
    if repeated:
        ids = listed(sorted({str(example.explicit_id) for example, _ in repeated}))
        raise row_errors(repeated, f"repeated ids: {ids}; {hint}")


def _column(name: str, columns: Mapping[str, str], found: Sequence[str]) -> str | None:
    """The file's column for one of our names: mapped, or of the same name, or a well-known other name."""
    if name in columns:
        return columns[name] or None
    return next((candidate for candidate in (name, *ALIASES.get(name, ())) if candidate in found), None)


def _choose_shape(prompt_format: str, columns: Mapping[str, str], found: Sequence[str]) -> tuple[Shape, dict[str, str]]:
    """The first set of fields of the format that the columns can fill, and the column of each field."""
    for shape in FORMATS[prompt_format]:
        names = {name: _column(name, columns, found) for name in (*shape.required, *shape.optional)}
        if all(names[name] for name in shape.required):
            return shape, {name: column for name, column in names.items() if column}
    expected = " / ".join("+".join(shape.required) for shape in FORMATS[prompt_format])
    what = f"columns are {', '.join(found)}; expected {expected} for prompt_format {prompt_format}"
    raise SettingError("data.prompt_format", what, *_suggestions(prompt_format, columns, found))


def _suggestions(prompt_format: str, columns: Mapping[str, str], found: Sequence[str]) -> list[str]:
    fitting = []
    for name, shapes in (("alpaca" if "input" in found else "dolly", (TASK,)), ("chat", (CONVERSATION,)), ("raw", (PAIR, TEXT))):
        if name != prompt_format and any(all(_column(field, columns, found) for field in shape.required) for shape in shapes):
            fitting.append(f"`data.prompt_format: {name}`")
    mapping = "or name them: data.columns: {<our name>: <your column>}"
    return [f"try {' or '.join(fitting)}", mapping] if fitting else [f"name them: {mapping.removeprefix('or name them: ')}"]


def _check_mapping(columns: Mapping[str, str], found: Sequence[str]) -> None:
    for name, column in columns.items():
        if name not in OUR_NAMES:
            near = difflib.get_close_matches(name, OUR_NAMES, 1)
            hint = f"did you mean {near[0]}?" if near else f"names: {', '.join(OUR_NAMES)}"
            raise SettingError("data.columns", f"unknown name '{name}' in data.columns", hint)
        if column and column not in found:
            near = difflib.get_close_matches(column, found, 1)
            hint = f"did you mean {near[0]}?" if near else f"columns are {', '.join(found)}"
            raise SettingError("data.columns", f"data.columns.{name}: the data has no column '{column}'", hint)
