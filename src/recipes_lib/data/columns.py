"""Columns of any spelling become our fields: texts, or messages."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from recipes_lib.config.documents import did_you_mean
from recipes_lib.config.recipe import DPO, SFT, DataSection, Stage
from recipes_lib.data.conversations import check_roles, read_history, read_messages
from recipes_lib.data.errors import BadRow, BadRows, SettingError
from recipes_lib.data.preferences import settle_pair
from recipes_lib.data.rows import PAIR, DataRow, answer_row, conversation_of
from recipes_lib.data.values import checked_text, is_blank, parsed_json

# Stage and prompt format -> the sets of our fields that it can read, the best first.
FIELDS: dict[Stage, dict[str, tuple[tuple[str, ...], ...]]] = {
    SFT: {
        "dolly": (("instruction", "response"),),
        "alpaca": (("instruction", "response"),),
        "raw": (("prompt", "completion"), ("text",)),
        "chat": (("messages",), ("prompt", "completion"), ("instruction", "response")),
    },
    DPO: {
        "dolly": (("instruction", *PAIR),),
        "alpaca": (("instruction", *PAIR),),
        "raw": (("prompt", *PAIR),),
        # without a prompt, it is what both conversations begin with
        "chat": (("prompt", *PAIR), ("instruction", *PAIR), PAIR),
    },
}
OF_CHAT = ("system", "tools", "chat_template_kwargs")
OF_PAIRS = ("context", "history")  # beside instruction and response; a history is read in chat
# Our field -> the names that files use for it, the likeliest first.
COLUMNS = {
    "id": ("id",),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "text": ("text",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "instruction": ("instruction", "question"),
    "context": ("context", "input"),
    "response": ("response", "output", "answer"),
    "messages": ("messages", "conversations"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "history": ("history",),
}


def fields_by_format(
    columns: Mapping[Any, str], present: Sequence[str], stage: Stage
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return our names -> columns, as mapped or by their usual names; and for each prompt format
    that can read such rows, the first set of fields.
    """
    names: dict[str, str] = {}
    for name, usual in COLUMNS.items():
        there = [column for column in usual if column in present]
        if there:
            names[name] = there[0]
    names |= columns  # what the recipe maps wins
    readable: dict[str, tuple[str, ...]] = {}
    for prompt_format, choices in FIELDS[stage].items():
        for fields in choices:
            if names.keys() >= set(fields):
                readable.setdefault(prompt_format, fields)
    return names, readable


def stage_hint(columns: Sequence[str], stage: Stage) -> list[str]:
    """Return what to say of columns that another stage reads."""
    has_pairs = set(PAIR) <= set(columns)
    if has_pairs and stage == SFT:
        return ["chosen and rejected answers are read in preference tuning: stage: dpo"]
    if stage == DPO and not has_pairs:
        return ["rows of one answer train in stage sft; pairs have a chosen and a rejected one"]
    return []


def map_columns(
    rows: Sequence[DataRow],
    section: DataSection,
    columns: Mapping[Any, str],
    bad: BadRows,
    stage: Stage = SFT,
) -> tuple[list[DataRow], list[str]]:
    """Give the rows of one source our fields in place of its columns (`columns`: our name -> the
    file's). Return the usable rows, and a line for each column that is left unread by surprise.
    """
    prompt_format = section.prompt_format
    # in the order in which they appear
    present = list(dict.fromkeys(chain.from_iterable(row.fields for row in rows)))
    for name, column in columns.items():
        if column not in present:
            what = f"data.columns.{name}: the data has no column '{column}'"
            hints = did_you_mean(column, present) or [f"columns are {', '.join(present)}"]
            raise SettingError("data.columns", what, *hints)
    names, fields = fields_by_format(columns, present, stage)
    if prompt_format not in fields:
        expected = " / ".join("+".join(choice) for choice in FIELDS[stage][prompt_format])
        what = f"columns are {', '.join(present)}; expected {expected}"
        remedies = [f"data.prompt_format: {other}" for other in fields]
        remedies.append("data.columns: {<our name>: <your column>}")
        hint = f"set {' or '.join(remedies)}"
        raise SettingError("data.prompt_format", what, hint, *stage_hint(present, stage))
    is_chat = prompt_format == "chat"
    read = {"id", *fields[prompt_format]}
    if is_chat:
        read.update(OF_CHAT)
    if "instruction" in read:
        read.update(OF_PAIRS if is_chat else ("context",))
    names = {name: column for name, column in names.items() if name in read}
    unread = _unread_columns(rows, names, read.intersection(columns))
    usable = []
    for row in rows:
        values = row.fields
        row.fields = {}
        try:
            _fill(row, values, names, is_chat)
            usable.append(row)
        except BadRow as reason:
            bad.add(row, reason)
    return usable, unread


def _unread_columns(
    rows: Sequence[DataRow], names: Mapping[str, str], mapped: set[Any]
) -> list[str]:
    """Return a line for each column that looks as if it were trained on, and is not: another name
    of a field that a column fills already (unless the recipe maps the field), and a history.
    """
    filled = set[str]()
    for row in rows:
        filled.update(column for column, value in row.fields.items() if not is_blank(value))
    lines = []
    for name, column in names.items():
        if name in mapped:
            continue
        for other in COLUMNS[name]:
            if other != column and other in filled:
                what = f"column '{other}' is not read: '{column}' is the {name}"
                lines.append(f"{what} (to read the other: data.columns.{name}: {other})")
    if "history" not in names and "history" in filled:
        what = "column 'history' is not read: it needs prompt_format chat"
        lines.append(f"{what}, and instruction and response")
    return lines


def _fill(row: DataRow, values: Mapping[str, Any], names: Mapping[str, str], is_chat: bool) -> None:
    """Give a row our fields; a `BadRow` says which column cannot be read."""
    fields = row.fields
    optional = {"context", "system"}
    if "chosen" in names:  # both conversations may begin with the prompt
        optional |= {"prompt", "instruction"}
    for name, column in names.items():
        value = values.get(column)
        what = f"column '{column}'"
        is_half = name in ("prompt", "completion", *PAIR) and isinstance(value, list)
        if name == "id":
            row.id = str(value) if isinstance(value, str | int) else ""
        elif name in ("tools", "chat_template_kwargs", "history") and is_blank(value):
            continue
        elif name in ("tools", "chat_template_kwargs"):
            fields[name] = _json_text(name, value, what)
        elif name == "history":
            fields[name] = read_history(value, what)
        elif name == "messages" or (is_chat and is_half):
            fields[name] = read_messages(value, what)
        elif value is not None or name not in optional:
            fields[name] = checked_text(value, what)
    if "chosen" in fields:
        settle_pair(fields, is_chat)
        for name in PAIR:
            if is_chat:
                check_roles(conversation_of(answer_row(row, name), None))
        return
    if isinstance(fields.get("prompt"), list) != isinstance(fields.get("completion"), list):
        raise BadRow("prompt and completion: one is text, the other a list of messages")
    if is_chat:
        check_roles(conversation_of(row, None))


def _json_text(name: str, value: Any, what: str) -> str:
    """Return tools in OpenAI's spelling (also of bare functions), or template arguments without
    those that are null, as JSON text.
    """
    if name == "tools":
        tools = [parsed_json(tool, dict, what) for tool in parsed_json(value, list, what)]
        functions = [parsed_json(tool.get("function", tool), dict, what) for tool in tools]
        value = []
        for function in functions:
            if not isinstance(function.get("name"), str):
                raise BadRow(f"{what}: a tool is not a function with a name")
            value.append({"type": "function", "function": function})
    else:
        given = parsed_json(value, dict, what)
        value = {key: inner for key, inner in given.items() if inner is not None}
    return checked_text(json.dumps(value, ensure_ascii=False), what)
