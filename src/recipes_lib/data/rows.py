"""One row of training data: where it stands, how its columns become our fields (texts, or messages
in one spelling), and the errors that name rows by file and line, or a key of the recipe.

Tools and template arguments of a row are kept as JSON, so that a row is made of texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes_lib.config.documents import did_you_mean
from recipes_lib.config.recipe import DataSection
from recipes_lib.core.errors import DataError

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe

NUM_LISTED = 10
# One turn of a conversation, as the chat templates read it: role and content; of the assistant also
# reasoning_content, tool_calls (in OpenAI's spelling) and weight (0 for no loss).
Message = dict[str, Any]
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
# The names that files use for our fields.
COLUMNS = {
    **{name: (name,) for name in ("id", "prompt", "completion", "text", "chat_template_kwargs")},
    "instruction": ("instruction", "question"),
    "context": ("context", "input"),
    "response": ("response", "output", "answer"),
    "messages": ("messages", "conversations"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
}


@dataclass(slots=True)
class DataRow:
    """One row: where it stands, its texts and its identity."""

    file: str  # `FILE row N` where the format has no lines
    line: int | None
    fields: dict[str, Any]  # our names -> text or messages; tools and template arguments are JSON
    source: int = 0  # position of its source in the mixture
    id: str = ""  # unique label in splits.json
    content: bytes = b""  # SHA-256 of the normalised texts, which alone decides the split

    @property
    def place(self) -> str:
        """`file:line`, or `file row N` where the format has no lines."""
        return self.file if self.line is None else f"{self.file}:{self.line}"

    @property
    def texts(self) -> list[str]:
        """All texts, of conversations all that each message says."""
        texts: list[str] = []
        for value in self.fields.values():
            messages = value if isinstance(value, list) else ()
            texts += [value] if isinstance(value, str) else []
            texts += [text for message in messages for text in message_texts(message)]
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
    """Why one row cannot be used, and what to do; `BadRows` says which row."""


def place(recipe: Recipe, error: DataError) -> DataError:
    """Give an error without a file the place of its key, or of `data.source`, in the recipe."""
    if error.file is None:
        at = recipe.error(getattr(error, "key", "data.source"), error.what)
        error.file, error.line = at.file, at.line
    return error


class BadRows(list[BadRow]):
    """The rows that cannot be used, of every stage, so that all are named at once."""

    def add(self, row: DataRow, reason: BadRow) -> None:
        """Note a row; its texts are not kept."""
        reason.file, reason.line = row.file, row.line
        self.append(reason.with_traceback(None))

    def error(self, num_rows: int | None = None) -> DataError:
        """Return one error for all of them, of `num_rows` that were read: the first at its place,
        the others by what is wrong.
        """
        (what, places), *others = self.places_by_reason().items()
        lines = [f"{len(places) - 1} more: {listed(places[1:])}"] if len(places) > 1 else []
        lines += [f"{listed(rest, 3)}: {other}" for other, rest in others[:NUM_LISTED]]
        lines += dict.fromkeys(hint for reason in self for hint in reason.hints)
        if num_rows is not None and len(self) < num_rows:
            count = f"{len(self)} of {num_rows}"
            lines.append(f"to leave out bad rows ({count}): data.on_bad_row: skip")
        return DataError(what, *lines, file=self[0].file, line=self[0].line)

    def places_by_reason(self) -> dict[str, list[str]]:
        """Group the places by what is wrong, whatever numbers stand in the words."""
        self.sort(key=lambda reason: (str(reason.file), reason.line or 0))
        kinds: dict[str, tuple[str, list[str]]] = {}
        for reason in self:
            words = re.sub(r"0x\w+|\d+|\\u\w{4}", "#", reason.what)
            place = f"{reason.file}:{reason.line}" if reason.line else str(reason.file)
            kinds.setdefault(words, (reason.what, []))[1].append(place)
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
        raise BadRow(f"{what}: {error}") from None
    return value


def is_blank(value: Any) -> bool:
    """Return whether a value says nothing: None, empty, or empty as JSON."""
    return not value or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


# ---- conversations ----


def read_messages(value: Any, what: str) -> list[Message]:
    """Return messages of any spelling in ours."""
    messages = parsed_json(value, list, what)
    return [_read_message(each, f"{what}, message {at}") for at, each in enumerate(messages)]


def _read_message(given: Any, what: str) -> Message:
    given = parsed_json(given, dict, what)
    speaker = given.get("role") or given.get("from")
    role = ROLES.get(str(speaker))
    if role is None:
        raise BadRow(f"{what}: unknown role {speaker!r}; roles are {', '.join(ROLES)}")
    what = f"{what} ({role})"
    message: Message = {"role": role}
    content = given["content"] if given.get("content") is not None else given.get("value")
    if role == "assistant":
        calls = content if speaker == CALL else given.get("tool_calls")
        if thoughts := next((given[key] for key in THOUGHTS if given.get(key)), None):
            message["reasoning_content"] = checked_text(thoughts, f"{what}: thoughts")
        if not is_blank(calls):
            message["tool_calls"] = _read_calls(calls, what)
        if speaker == CALL or (content is None and len(message) > 1):
            content = ""  # only calls or thoughts
    message |= {key: given[key] for key in OF_TOOLS if given.get(key)}
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


def _json_text(name: str, value: Any, what: str) -> str:
    """Return tools in OpenAI's spelling (also of bare functions), or template arguments without
    those that are null, as JSON text.
    """
    if name == "tools":
        tools = [parsed_json(tool, dict, what) for tool in parsed_json(value, list, what)]
        functions = [parsed_json(tool.get("function", tool), dict, what) for tool in tools]
        if not all(isinstance(function.get("name"), str) for function in functions):
            raise BadRow(f"{what}: a tool is no function with a name in it")
        value = [
            tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
        ]
    else:
        given = parsed_json(value, dict, what)
        value = {key: inner for key, inner in given.items() if inner is not None}
    return checked_text(json.dumps(value, ensure_ascii=False), what)


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
    """Check who speaks when: a system message or none, then user and assistant in turn, the results
    of tools between two turns of the assistant, who is last.
    """
    roles = [message["role"] for message in messages]
    in_order = re.match("s?(ua(t+a)*)*", "".join(role[0] for role in roles))
    number = in_order.end() if in_order else 0
    if number < len(roles) or "assistant" not in roles:
        expected = "expected user and assistant in turn, the assistant last"
        raise BadRow(f"roles from message {number} on: {listed(roles[number:], 3)}; {expected}")


# ---- columns ----


def column_names(rows: Iterable[DataRow]) -> list[str]:
    """Return all column names, in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.fields))


def fields_by_format(
    columns: Mapping[str, str], present: Sequence[str]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return our names -> columns, as mapped or by their usual names; and for each prompt format
    that can read such rows, the first set of fields.
    """
    usual = {name: [each for each in COLUMNS[name] if each in present] for name in COLUMNS}
    names = {name: known[0] for name, known in usual.items() if known} | {**columns}
    sets = {
        prompt_format: [fields for fields in choices if {*fields} <= names.keys()]
        for prompt_format, choices in FIELDS.items()
    }
    return names, {prompt_format: fields[0] for prompt_format, fields in sets.items() if fields}


def map_columns(
    rows: Sequence[DataRow], section: DataSection, columns: Mapping[str, str], bad: BadRows
) -> tuple[list[DataRow], list[str]]:
    """Give the rows of one source our fields in place of its columns (`columns`: our name -> the
    file's). Return the usable rows, and the columns and keys of messages that nothing reads.
    """
    present, prompt_format = column_names(rows), section.prompt_format
    for name, column in columns.items():
        if column not in present:
            what = f"data.columns.{name}: the data has no column '{column}'"
            hints = did_you_mean(column, present) or [f"columns are {', '.join(present)}"]
            raise SettingError("data.columns", what, *hints)
    names, fields = fields_by_format(columns, present)
    if prompt_format not in fields:
        expected = " / ".join("+".join(each) for each in FIELDS[prompt_format])
        what = f"columns are {', '.join(present)}; expected {expected}"
        fitting = [f"data.prompt_format: {other}" for other in fields]
        hint = " or ".join([*fitting, "data.columns: {<our name>: <your column>}"])
        raise SettingError("data.prompt_format", what, f"set {hint}")
    read = {*fields[prompt_format], "id", *(OF_CHAT if prompt_format == "chat" else ())}
    read |= {"context"} if "instruction" in read else set()
    names = {name: names[name] for name in names if name in read}
    unread = {name: None for name in present if name not in names.values()}
    usable = []
    for row in rows:
        values, row.fields = row.fields, {}
        messages = values.get(names.get("messages", ""))
        for message in messages if isinstance(messages, list) else ():
            keys = message if isinstance(message, dict) else ()
            unread |= {f"messages.{key}": None for key in keys if key not in MESSAGE_KEYS}
        try:
            _fill(row, values, names, is_chat=prompt_format == "chat")
            usable.append(row)
        except BadRow as reason:
            bad.add(row, reason)
    return usable, [*unread]


def _fill(row: DataRow, values: Mapping[str, Any], names: Mapping[str, str], is_chat: bool) -> None:
    fields = row.fields
    for name, column in names.items():
        value, what = values.get(column), f"column '{column}'"
        is_half = is_chat and name in ("prompt", "completion") and isinstance(value, list)
        if name == "id":
            row.id = str(value) if isinstance(value, str | int) else ""
        elif name in ("tools", "chat_template_kwargs"):
            fields |= {} if is_blank(value) else {name: _json_text(name, value, what)}
        elif name == "messages" or is_half:
            fields[name] = read_messages(value, what)
        elif value is not None or name not in ("context", "system"):
            fields[name] = checked_text(value, what)
    if isinstance(fields.get("prompt"), list) != isinstance(fields.get("completion"), list):
        raise BadRow("prompt and completion: one is text, the other a list of messages")
    if is_chat:
        messages = conversation_of(row, None)
        if fields.get("system") and messages[0]["content"] != fields["system"]:
            raise BadRow(f"a system message and another text in column '{names['system']}'")
        check_roles(messages)
