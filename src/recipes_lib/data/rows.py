"""One row of training data: where it stands, how its columns become our fields (texts, or messages
in one spelling), and the errors that name rows by file and line, or a key of the recipe.

Tools and template arguments of a row are kept as JSON, so that a row is made of texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from recipes_lib.config.documents import did_you_mean
from recipes_lib.config.sections import DataSection
from recipes_lib.core.errors import DataError

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe

NUM_LISTED = 10
CALL = "function_call"  # ShareGPT's turn that is nothing but calls
# Every name of a role -> ours: OpenAI's, and ShareGPT's, as its `from` key has them.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", CALL), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
OF_TOOLS = ("tool_call_id", "name")
# The keys of a message that are read.
MESSAGE_KEYS = {"role", "from", "content", "value", "weight", "tool_calls", *THOUGHTS, *OF_TOOLS}
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
# Who may speak after whom, the likeliest first.
_NEXT = {
    "": ("user", "system"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class Message(TypedDict):
    """One turn of a conversation, as the chat templates read it."""

    role: str
    content: str
    reasoning_content: NotRequired[str]  # of the assistant, as the next two
    tool_calls: NotRequired[list[dict[str, Any]]]  # in OpenAI's spelling
    weight: NotRequired[int]  # 0 for no loss
    tool_call_id: NotRequired[str]  # of a tool: the call that it answers
    name: NotRequired[str]


@dataclass(slots=True)
class DataRow:
    """One row: where it stands, its texts and its identity."""

    file: str
    line: int | None  # counted from 1; None where the format has no lines
    number: int  # counted from 1 within the file
    fields: dict[str, Any]  # our names -> text or messages; tools and template arguments are JSON
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
            said = map(message_texts, value) if isinstance(value, list) else [[value]]
            texts += [text for each in said for text in each]
        return texts

    @property
    def is_empty(self) -> bool:
        """Whether a text that the row should teach is empty."""
        for name in ("response", "completion", "text"):
            if isinstance(self.fields.get(name), str):
                return not self.fields[name].strip()
        messages = self.fields.get("messages") or self.fields["completion"]
        taught = [each for each in messages if each["role"] == "assistant" and "weight" not in each]
        return not all("".join(message_texts(message)).strip() for message in taught)


# ---- errors ----


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
        (what, places), *others = self.places_by_reason().items()
        lines = [f"{len(places) - 1} more: {listed(places[1:])}"] if len(places) > 1 else []
        lines += [f"{listed(rest, 3)}: {other}" for other, rest in others[:NUM_LISTED]]
        lines += dict.fromkeys(hint for _, reason in self.rows for hint in reason.hints)
        if num_rows is not None and len(self) < num_rows:
            count = f"{len(self)} of {num_rows}"
            lines.append(f"to leave out bad rows ({count}): data.on_bad_row: skip")
        row = self.rows[0][0]
        file = row.file if row.line is not None else row.place
        return DataError(what, *lines, file=file, line=row.line)

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


# ---- values ----


def parsed_json(value: Any, kind: type, what: str) -> Any:
    """Return a value of the kind (list or dict), or what it is as JSON text; or raise a BadRow."""
    try:
        value = json.loads(value) if isinstance(value, str | bytes) else value
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what}: not JSON ({error})") from None
    if not isinstance(value, kind):
        raise BadRow(f"{what}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def checked_text(value: Any, what: str) -> str:
    """Return a text, or raise a BadRow where it is none or has half of a UTF-16 pair."""
    if not isinstance(value, str):
        raise BadRow(f"{what}: expected text, found {type(value).__name__.removesuffix('Type')}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        char = value[error.start]
        raise BadRow(f"{what}: lone surrogate {char!r} at character {error.start}") from None
    return value


def is_blank(value: Any) -> bool:
    """Return whether a value says nothing: None, empty, or empty as JSON."""
    return not value or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


# ---- conversations ----


def read_messages(value: Any, column: str) -> list[Message]:
    """Return messages of any spelling in ours."""
    what = f"column '{column}'"
    messages = parsed_json(value, list, what)
    return [_read_message(each, f"{what}, message {at}") for at, each in enumerate(messages)]


def _read_message(given: Any, what: str) -> Message:
    given = parsed_json(given, dict, what)
    speaker = given.get("role") or given.get("from")
    role = ROLES.get(str(speaker))
    if role is None:
        raise BadRow(f"{what}: unknown role {speaker!r}; roles are {', '.join(ROLES)}")
    what = f"{what} ({role})"
    message: Message = {"role": role, "content": ""}
    content = given["content"] if given.get("content") is not None else given.get("value")
    if role == "assistant":
        calls = content if speaker == CALL else given.get("tool_calls")
        if thoughts := next((given[key] for key in THOUGHTS if given.get(key)), None):
            message["reasoning_content"] = checked_text(thoughts, f"{what}: thoughts")
        if not is_blank(calls):
            message["tool_calls"] = _read_calls(calls, what)
        if speaker == CALL or (content is None and len(message) > 2):
            content = ""  # only calls or thoughts
    message |= cast(Message, {key: given[key] for key in OF_TOOLS if given.get(key)})
    message["content"] = _content_text(content, role, what)
    weight = given.get("weight")
    if weight not in (None, 0, 1) or (weight == 1 and role != "assistant"):
        raise BadRow(f"{what}: weight {weight!r}: an assistant turn may have 0 (no loss) or 1")
    if weight == 0 and role == "assistant":
        message["weight"] = 0
    return message


def _content_text(content: Any, role: str, what: str) -> str:
    """Return the text of a content, of its parts, or of what a tool returned as JSON."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if all(part.get("type") == "text" for part in parts):
            return "".join(checked_text(part.get("text"), f"{what}: a part") for part in parts)
        if role != "tool":
            raise BadRow(f"{what}: only content parts {{type: text, text: ...}} are read")
    if role == "tool" and isinstance(content, dict | list):
        content = json.dumps(content, ensure_ascii=False)
    return checked_text(content, what)


def _read_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Return tool calls of any spelling (OpenAI's, `{name, arguments}`, JSON text of either)."""
    value, calls = parsed_json(value, object, f"{what}: the tool call"), []
    for given in value if isinstance(value, list) else [value]:
        function = given.get("function", given) if isinstance(given, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not function or not isinstance(name, str) or not name:
            raise BadRow(f"{what}: a tool call needs a name, as in {{name, arguments}}")
        arguments = function.get("arguments", function.get("parameters")) or {}
        arguments = parsed_json(arguments, dict, f"{what}: the arguments of tool call '{name}'")
        called = {"name": name, "arguments": arguments}
        checked_text(json.dumps(called, ensure_ascii=False), what)
        identity = {"id": given["id"]} if given.get("id") else {}
        calls.append({**identity, "type": "function", "function": called})
    return calls


def read_tools(value: Any, column: str) -> str:
    """Return the tools of a row as JSON text in OpenAI's spelling, also of bare functions."""
    what = f"column '{column}'"
    wrapped = []
    for tool in parsed_json(value, list, what):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"{what}: a tool is no function with a name in it")
        wrapped.append({"type": "function", "function": tool} if function is tool else tool)
    return checked_text(json.dumps(wrapped, ensure_ascii=False), what)


def read_template_kwargs(value: Any, column: str) -> str:
    """Return the template arguments of a row as JSON text; what is null is not given."""
    values = parsed_json(value, dict, f"column '{column}'")
    values = {key: given for key, given in values.items() if given is not None}
    return checked_text(json.dumps(values, ensure_ascii=False), f"column '{column}'")


def template_values(row: DataRow, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the template and the row's tools; the row's own arguments win."""
    own, tools = row.fields.get("chat_template_kwargs"), row.fields.get("tools")
    values = {**given, **json.loads(own or "{}")}
    return {**values, "tools": json.loads(tools)} if tools else values


def message_texts(message: Mapping[str, Any]) -> list[str]:
    """Return all that a message says: its thoughts, its content, and its tool calls as JSON."""
    thoughts = [message["reasoning_content"]] if "reasoning_content" in message else []
    calls = message.get("tool_calls", ())
    called = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
    return [*thoughts, message["content"], *called]


def conversation_of(row: DataRow, system_prompt: str | None) -> list[Message]:
    """Return the row as a conversation: its messages, or one user and one assistant turn. A system
    message or a `system` column of the row wins over the recipe's `system_prompt`.
    """
    fields = row.fields
    if "messages" in fields:
        messages = fields["messages"]
    elif isinstance(fields.get("prompt"), list):
        messages = [*fields["prompt"], *fields["completion"]]
    else:
        names = ("prompt", "completion") if "prompt" in fields else ("instruction", "response")
        question, answer = (fields[name] for name in names)
        if fields.get("context", "").strip():
            question += f"\n\n{fields['context']}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return with_system_prompt(messages, fields.get("system") or system_prompt)


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """Return the conversation with a system message in front, unless it has one already."""
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def check_roles(messages: Sequence[Message]) -> None:
    """Check who speaks when, and that the assistant speaks last."""
    roles = ["", *(message["role"] for message in messages)]
    if "assistant" not in roles:
        raise BadRow("no assistant turn")
    for index, (before, role) in enumerate(pairwise(roles)):
        if role not in _NEXT[before]:
            expected = _NEXT[before][0]
            raise BadRow(f"roles out of order: message {index} is {role}, expected {expected}")
    if roles[-1] != "assistant":
        what = (
            f"the last message is not the assistant's: message {len(messages) - 1} is {roles[-1]}"
        )
        raise BadRow(what, "cut the conversation after its last assistant turn")


# ---- columns ----


def map_columns(
    rows: Sequence[DataRow], section: DataSection, columns: Mapping[str, str], bad: BadRows
) -> tuple[list[DataRow], list[str]]:
    """Give the rows of one source our fields in place of its columns (`columns`: our name -> the
    file's). Return the usable rows, and the columns and keys of messages that nothing reads.
    """
    present = column_names(rows)
    for name, column in columns.items():
        if column not in present:
            what = f"data.columns.{name}: the data has no column '{column}'"
            hints = did_you_mean(column, present) or [f"columns are {', '.join(present)}"]
            raise SettingError("data.columns", what, *hints)
    required = _fields_for(section.prompt_format, columns, present)
    if not required:
        expected = " / ".join("+".join(fields) for fields in FIELDS[section.prompt_format])
        what = f"columns are {', '.join(present)}; expected {expected}"
        fitting = [f"data.prompt_format: {other}" for other in formats_for(columns, present)]
        hint = " or ".join([*fitting, "data.columns: {<our name>: <your column>}"])
        raise SettingError("data.prompt_format", what, f"set {hint}")
    read = [*required, "id", *(["context"] if "instruction" in required else [])]
    read += OF_CHAT if section.prompt_format == "chat" else ()
    names = {name: known for name in read if (known := _column(name, columns, present))}
    unread = {name: None for name in present if name not in names.values()}
    usable = []
    for row in rows:
        values, row.fields = row.fields, {}
        messages = values.get(names.get("messages", ""))
        for message in messages if isinstance(messages, list) else ():
            keys = message if isinstance(message, dict) else ()
            unread |= {f"messages.{key}": None for key in keys if key not in MESSAGE_KEYS}
        try:
            _fill(row, values, names, is_chat=section.prompt_format == "chat")
            usable.append(row)
        except BadRow as reason:
            bad.add(row, reason)
    return usable, [*unread]


def _fill(row: DataRow, values: Mapping[str, Any], names: Mapping[str, str], is_chat: bool) -> None:
    fields = row.fields
    for name, column in names.items():
        value = values.get(column)
        if name == "id":
            row.id = str(value) if isinstance(value, str | int) else ""
        elif name in ("tools", "chat_template_kwargs"):
            if not is_blank(value):
                read = read_tools if name == "tools" else read_template_kwargs
                fields[name] = read(value, column)
        elif name == "messages" or (is_chat and isinstance(value, list)):
            fields[name] = read_messages(value, column)
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
    known = (columns[name],) if name in columns else (name, *ALIASES.get(name, ()))
    return next((column for column in known if column in present), None)


def _fields_for(
    prompt_format: str, columns: Mapping[str, str], present: Sequence[str]
) -> tuple[str, ...]:
    """Return the first set of fields of the format that the columns can fill, or none."""
    for required in FIELDS[prompt_format]:
        if all(_column(name, columns, present) for name in required):
            return required
    return ()


def formats_for(columns: Mapping[str, str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the prompt formats that can read rows with these columns, the best first."""
    return tuple(name for name in FIELDS if _fields_for(name, columns, names))


def column_names(rows: Iterable[DataRow]) -> list[str]:
    """Return all column names, in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.fields))
