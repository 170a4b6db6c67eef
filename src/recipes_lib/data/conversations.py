"""Conversations of the `chat` format: messages of several spellings become `Message`s, which chat
templates read, and who speaks when is checked. Tools and template arguments have columns of their
own and are kept as JSON, so that a row is made of texts.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NotRequired, TypedDict, cast

from recipes_lib.data.rows import (
    BadRow,
    DataRow,
    checked_text,
    message_texts,
    parsed_json,
    type_name,
    unsupported,
)


class Message(TypedDict):
    """One turn of a conversation, as the chat templates read it."""

    role: str
    content: str
    reasoning_content: NotRequired[str]  # of the assistant, as the next two
    tool_calls: NotRequired[list[dict[str, Any]]]  # in OpenAI's spelling
    weight: NotRequired[int]  # 0 for no loss
    tool_call_id: NotRequired[str]  # of a tool: the call that it answers
    name: NotRequired[str]


CALL = "function_call"  # ShareGPT's turn that is nothing but calls; OpenAI's old key for one
# Every name of a role -> ours: ShareGPT's, as its `from` key has them, and OpenAI's.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", CALL), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
KEYS_OF_ROLE = {"assistant": (*THOUGHTS, "tool_calls", CALL), "tool": ("tool_call_id", "name")}
# Who may speak after whom, the likeliest first.
_NEXT = {
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def is_blank(value: Any) -> bool:
    """Return whether a value says nothing: None, empty (as JSON too), or made of such values."""
    if isinstance(value, dict | list):
        return all(map(is_blank, value.values() if isinstance(value, dict) else value))
    return value is None or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def without_nulls(value: Any) -> Any:
    """Return the value without the keys that Arrow fills in with null, as another row has them."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def read_messages(value: Any, column: str, dropped: Collection[str] = ()) -> list[Message]:
    """Return messages of any spelling in ours, without the keys dropped as `messages.KEY`."""
    if not isinstance(value, list):
        raise BadRow(f"column '{column}': expected a list of messages, found {type_name(value)}")
    messages: list[Message] = []
    for index, item in enumerate(value):
        place = f"column '{column}', message {index}"
        if not isinstance(item, dict):
            raise BadRow(f"{place}: expected {{role, content}}, found {type_name(item)}")
        given = {key: inner for key, inner in item.items() if f"messages.{key}" not in dropped}
        messages.append(_read_message(given, place))
        if CALL in (given.get("role"), given.get("from")) and len(messages) > 1:
            # ShareGPT writes what the assistant says and what it calls then as two turns
            before, message = messages[-2:]
            if [before["role"], before.get("weight")] == ["assistant", message.get("weight")]:
                before["tool_calls"] = before.get("tool_calls", []) + message["tool_calls"]
                messages.pop()
    return messages


def _read_message(given: Mapping[str, Any], place: str) -> Message:
    speaker = given.get("role") or given.get("from")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        roles = ", ".join(dict.fromkeys(ROLES.values()))
        hint = "rename it; ShareGPT's human, gpt, function_call and observation are known too"
        raise BadRow(f"{place}: unknown role {speaker!r}; roles are {roles}", hint)
    known = ("role", "from", "content", "value", "weight", *KEYS_OF_ROLE.get(role, ()))
    if unread := [key for key in given if key not in known and not is_blank(given[key])]:
        raise unsupported([f"messages.{key}" for key in unread])
    place = f"{place} ({role})"
    message: Message = {"role": role, "content": ""}
    content = given["content"] if given.get("content") is not None else given.get("value")
    if role == "assistant":
        thoughts = [given[key] for key in THOUGHTS if not is_blank(given.get(key))]
        if thoughts:
            message["reasoning_content"] = checked_text(thoughts[0], f"{place}: thoughts")
        calls = content if speaker == CALL else given.get("tool_calls") or given.get(CALL)
        if speaker == CALL or not is_blank(calls):
            message["tool_calls"] = _read_calls(calls, place)
        if speaker == CALL or (content is None and len(message) > 2):
            content = ""  # only calls or thoughts
    if role == "tool":
        answered = {key: given[key] for key in KEYS_OF_ROLE["tool"] if given.get(key)}
        message |= cast(Message, answered)
    message["content"] = checked_text(_content_text(content, role, place), place)
    weight = given.get("weight")
    if weight not in (None, 0, 1) or (weight == 1 and role != "assistant"):
        what = f"{place}: weight {weight!r} is not supported"
        raise BadRow(f"{what}: an assistant turn may have 0 (no loss) or 1")
    if weight == 0 and role == "assistant":
        message["weight"] = 0
    return message


def _content_text(content: Any, role: str, place: str) -> Any:
    """Return the joined text of parts, the JSON of what a tool returned, or the content itself."""
    parts = content if isinstance(content, list) else []
    kinds = [part.get("type") if isinstance(part, dict) else type_name(part) for part in parts]
    other = [kind for kind in kinds if kind != "text"]
    if role == "tool" and (other or isinstance(content, dict)):
        return json.dumps(content, ensure_ascii=False)
    if other:
        what = f"content part {kinds.index(other[0])} is {other[0]!r}"
        raise BadRow(f"{place}: {what}; only {{type: text, text: ...}} is read")
    if isinstance(content, list):
        return "".join(checked_text(part.get("text"), f"{place}: a content part") for part in parts)
    return content


def _read_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Return tool calls of any spelling (OpenAI's, `{name, arguments}`, JSON text of either)."""
    value = parsed_json(value, f"{place}: the tool call")
    calls = []
    for given in value if isinstance(value, list) else [value]:
        function = given.get("function", given) if isinstance(given, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not function or not isinstance(name, str) or not name.strip():
            raise BadRow(f"{place}: a tool call needs a name, as in {{name, arguments}}")
        what = f"{place}: the arguments of tool call '{name}'"
        arguments = function.get("arguments", function.get("parameters")) or {}
        arguments = parsed_json(arguments, what)
        if not isinstance(arguments, dict):
            raise BadRow(f"{what}: expected an object, found {type_name(arguments)}")
        called = {"name": name, "arguments": arguments}
        checked_text(json.dumps(called, ensure_ascii=False), what)
        identity = {"id": given["id"]} if given.get("id") else {}
        calls.append({**identity, "type": "function", "function": called})
    return calls


def read_tools(value: Any, column: str) -> str:
    """Return the tools of a row as JSON text in OpenAI's spelling, also of bare functions."""
    what = f"column '{column}'"
    tools = parsed_json(value, what)
    if not isinstance(tools, list):
        hint = "write [{type: function, function: {name, description, parameters}}]"
        raise BadRow(f"{what}: expected a list, found {type_name(tools)}", hint)
    wrapped = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"{what}, tool {index}: no function with a name in it")
        wrapped.append({"type": "function", "function": tool} if function is tool else tool)
    return checked_text(json.dumps(wrapped, ensure_ascii=False), what)


def read_template_kwargs(value: Any, column: str) -> str:
    """Return the template arguments of a row as JSON text; what is null is not given."""
    what = f"column '{column}'"
    values = parsed_json(value, what)
    if not isinstance(values, dict):
        hint = "write template arguments as in {enable_thinking: false}"
        raise BadRow(f"{what}: expected an object, found {type_name(values)}", hint)
    values = {key: given for key, given in values.items() if given is not None}
    return checked_text(json.dumps(values, ensure_ascii=False), what)


def template_values(row: DataRow, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the template and the row's tools; the row's own arguments win."""
    own, tools = row.fields.get("chat_template_kwargs"), row.fields.get("tools")
    values = {**given, **json.loads(own or "{}")}
    return {**values, "tools": json.loads(tools)} if tools else values


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
    """Check who speaks when, and that there is something to learn."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise BadRow("no assistant turn" if roles else "no messages")
    for index, (before, role) in enumerate(pairwise(["system", *roles])):
        if role not in _NEXT[before] and (index, role) != (0, "system"):
            expected = _NEXT[before][0]
            raise BadRow(f"roles out of order: message {index} is {role}, expected {expected}")
    if roles[-1] != "assistant":
        what = f"the last message is not the assistant's: message {len(roles) - 1} is {roles[-1]}"
        raise BadRow(what, "cut the conversation after its last assistant turn")
    for index, (message, following) in enumerate(pairwise(messages)):
        if message.get("tool_calls") and following["role"] != "tool":
            hint = "put a message of role tool with the result after it"
            raise BadRow(f"tool call without result: message {index} is followed by none", hint)
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    learned = [index for index in answers if messages[index].get("weight") != 0]
    if not learned:
        what = "nothing to train on: every assistant turn has weight 0"
        raise BadRow(what, "give one weight 1, or leave the row out")
    silent = [i for i in learned if not any(map(str.strip, message_texts(messages[i])))]
    if silent and len(silent) < len(answers):  # rows without any answer are counted by the audit
        hint = "cut it out of the conversation, or give it weight: 0"
        raise BadRow(f"message {silent[0]} (assistant) is empty", hint)
