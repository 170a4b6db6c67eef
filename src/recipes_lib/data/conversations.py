"""Conversations of the `chat` format: messages of several spellings become `Message`s, which chat
templates read, and who speaks when is checked. Tools and template arguments have columns of their
own and are kept as JSON, so that a row is made of texts.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NotRequired, TypedDict, cast

from recipes_lib.data.rows import BadRow, DataRow, lone_surrogate, message_texts, type_name


class CalledFunction(TypedDict):
    """A tool with its arguments, which OpenAI writes as JSON text."""

    name: str
    arguments: Mapping[str, object] | str


class ToolCall(TypedDict):
    """One call of a tool in an assistant's turn; a tool's turn answers it by its id."""

    id: NotRequired[str]
    type: str
    function: CalledFunction


class Message(TypedDict):
    """One turn of a conversation, as the chat templates read it. The assistant's may have thoughts,
    calls and a weight of 0 for no loss, a tool's whose answer it is.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    weight: NotRequired[int]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


# Other names of the roles: ShareGPT's, as its `from` key has them, and OpenAI's.
ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "model"), "assistant"),
    **dict.fromkeys(("observation", "function"), "tool"),
    "developer": "system",
}
CALL = "function_call"  # ShareGPT's turn that is nothing but calls; OpenAI's old key for one
KNOWN_ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = frozenset(("role", "from", "content", "value", "weight"))
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
KEYS_OF_ROLE = {"assistant": (*THOUGHTS, "tool_calls", CALL), "tool": ("tool_call_id", "name")}
# Who may speak after whom, the likeliest first.
_NEXT = {
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
# What the template gets from us, so that no template argument may have the name.
RESERVED = {
    *("messages", "conversations", "tools", "documents", "chat_template"),
    *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
}
RESERVED_HINT = "messages and tools have columns of their own; the others are set by the program"
# What a list or an object that says nothing becomes as JSON in a text column.
BLANK_TEXTS = ("", "[]", "{}", "null")


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: None, empty, or made of such values alone, as Arrow has them.

    Example:
        >>> is_blank({"name": None, "calls": []}), is_blank(False)
        (True, False)
    """
    if isinstance(value, dict):
        return all(map(is_blank, value.values()))
    if isinstance(value, list):
        return all(map(is_blank, value))
    return value is None or (isinstance(value, str) and value.strip() in BLANK_TEXTS)


def without_nulls(value: Any) -> Any:
    """The value without the keys that Arrow fills in with null, because another row has them.

    Example:
        >>> without_nulls([{"name": "f", "arguments": {"city": "Bonn", "unit": None}}])
        [{'name': 'f', 'arguments': {'city': 'Bonn'}}]
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def unread_keys(value: Any, dropped: Collection[str] = ()) -> Iterator[str]:
    """The keys of messages that are not read although they say something, as `messages.KEY`."""
    for message in value if isinstance(value, list) else ():
        if isinstance(message, dict) and not message.keys() <= MESSAGE_KEYS:
            known = MESSAGE_KEYS.union(KEYS_OF_ROLE.get(_role(message), ()))
            for key, content in message.items():
                name = f"messages.{key}"
                if key not in known and name not in dropped and not is_blank(content):
                    yield name


def _role(message: Mapping[str, Any]) -> Any:
    """The role in our spelling; what is no role stays what it is."""
    role = message.get("role") or message.get("from")
    return ROLES.get(role, "assistant" if role == CALL else role) if isinstance(role, str) else None


def read_messages(value: Any, column: str, dropped: Collection[str] = ()) -> list[Message]:
    """Messages with `role`/`content` or `from`/`value` keys, in our spelling.

    Args:
        dropped: `messages.KEY` of the keys to leave out.

    Raises:
        BadRow: what is wrong with the first bad one.
    """
    if not isinstance(value, list):
        raise BadRow(f"column '{column}': expected a list of messages, found {type_name(value)}")
    found: list[Message] = []
    for index, message in enumerate(value):
        place = f"column '{column}', message {index}"
        if not isinstance(message, dict):
            raise BadRow(f"{place}: expected {{role, content}}, found {type_name(message)}")
        if dropped:
            message = {key: one for key, one in message.items() if f"messages.{key}" not in dropped}
        read = _read_message(message, place)
        only_calls = CALL in (message.get("role"), message.get("from"))
        before = found[-1] if found and only_calls else None
        if (
            before is not None
            and before["role"] == "assistant"
            and before.get("weight") == read.get("weight")
        ):
            # ShareGPT writes what the assistant says and what it calls then as two turns
            calls = before.get("tool_calls", []) + read["tool_calls"]
            found[-1] = {**before, "tool_calls": calls}
        else:
            found.append(read)
    return found


def _read_message(message: Mapping[str, Any], place: str) -> Message:
    given, role = message.get("role") or message.get("from"), _role(message)
    if role not in KNOWN_ROLES:
        raise BadRow(
            f"{place}: unknown role {given!r}; roles are {', '.join(KNOWN_ROLES)}",
            "rename it; ShareGPT's human, gpt, function_call and observation are known too",
        )
    content = message["content"] if message.get("content") is not None else message.get("value")
    for key, other in (("from", "role"), ("value", "content")):
        both = message.get(key), message.get(other)
        if None not in both and both[0] != both[1]:
            raise BadRow(f"{place}: both {other} and {key}, and they differ")
    read: Message = {"role": str(role), "content": ""}
    if role == "assistant":
        _read_answer(read, message, place)
    if given == CALL:
        read["tool_calls"], content = _read_calls(content, place), ""
    if role == "tool":
        known = {key: message[key] for key in KEYS_OF_ROLE["tool"] if message.get(key)}
        read = {**read, **cast(Message, known)}
        if isinstance(content, dict) or (
            isinstance(content, list)
            and not all(isinstance(part, dict) and part.get("type") == "text" for part in content)
        ):
            content = json.dumps(content, ensure_ascii=False)
    if isinstance(content, list):
        content = _joined(content, place)
    if content is None and role == "assistant" and len(read) > 2:
        content = ""  # only calls or thoughts
    if not isinstance(content, str):
        raise BadRow(f"{place} ({role}): expected text, found {type_name(content)}")
    read["content"] = content
    weight = message.get("weight")
    if weight is not None and (weight not in (0, 1) or (weight == 1 and role != "assistant")):
        raise BadRow(
            f"{place} ({role}): weight {weight!r} is not supported: an assistant turn may have 0"
            " (no loss) or 1"
        )
    if weight == 0 and role == "assistant":
        read["weight"] = 0
    for text in message_texts(read):
        if what := lone_surrogate(text):
            raise BadRow(f"{place} ({role}): {what}")
    return read


def _read_answer(read: Message, message: Mapping[str, Any], place: str) -> None:
    """Add what an assistant's turn has beside its content: thoughts and tool calls."""
    thoughts = {key: message[key] for key in THOUGHTS if not is_blank(message.get(key))}
    for key, thought in thoughts.items():
        if not isinstance(thought, str):
            raise BadRow(f"{place}: {key}: expected text, found {type_name(thought)}")
        if read.setdefault("reasoning_content", thought) != thought:
            raise BadRow(f"{place}: both {' and '.join(thoughts)}, and they differ")
    calls = [message[key] for key in ("tool_calls", CALL) if not is_blank(message.get(key))]
    if len(calls) > 1:
        raise BadRow(f"{place}: both tool_calls and {CALL}", f"drop one: messages.{CALL}")
    if calls:
        read["tool_calls"] = _read_calls(calls[0], place)


def _read_calls(value: Any, place: str) -> list[ToolCall]:
    """Tool calls of any spelling (OpenAI's, the bare `{name, arguments}`, JSON text of either)."""
    if isinstance(value, str):
        value = _read_json(value, f"{place}: the tool call")
    calls: list[ToolCall] = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function") if isinstance(call, dict) else None
        function = function if isinstance(function, dict) else call
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise BadRow(f"{place}: a tool call needs a name, as in {{name, arguments}}")
        arguments = function.get("arguments", function.get("parameters"))
        what = f"{place}: the arguments of tool call '{name}'"
        if isinstance(arguments, str) and arguments.strip():
            arguments = _read_json(arguments, what)
        arguments = arguments or {}
        if not isinstance(arguments, dict):
            raise BadRow(f"{what}: expected an object, found {type_name(arguments)}")
        form: CalledFunction = {"name": name, "arguments": arguments}
        known: ToolCall = {"type": "function", "function": form}
        calls.append({"id": call["id"], **known} if call.get("id") else known)
    return calls


def _read_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deep")
        raise BadRow(f"{what}: not JSON ({reason}): {text[:40]!r}", "write it as JSON") from None


def read_tools(value: Any, column: str) -> str:
    """The tools of a row as JSON text of OpenAI's spelling; a bare function is put into it.

    Raises:
        BadRow: they are no list of JSON schemas.
    """
    if isinstance(value, str):
        value = _read_json(value, f"column '{column}'")
    if not isinstance(value, list):
        raise BadRow(
            f"column '{column}': expected a list of tools, found {type_name(value)}",
            "write [{type: function, function: {name, description, parameters}}], or its JSON text",
        )
    tools = []
    for index, tool in enumerate(value):
        inner = tool.get("function") if isinstance(tool, dict) else None
        function = inner if isinstance(inner, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"column '{column}', tool {index}: no function with a name in it")
        tools.append(tool if function is inner else {"type": "function", "function": tool})
    return _json_text(tools, column)


def read_template_kwargs(value: Any, column: str) -> str:
    """The template arguments of a row as JSON text; what is null is not given.

    Raises:
        BadRow: they are no object, or one has the name of something else that a template gets.
    """
    if isinstance(value, str):
        value = _read_json(value, f"column '{column}'")
    if not isinstance(value, dict):
        raise BadRow(
            f"column '{column}': expected an object, found {type_name(value)}",
            "write template arguments as in {enable_thinking: false}, or as its JSON text",
        )
    if names := sorted(RESERVED & value.keys()):
        raise BadRow(f"column '{column}': {names[0]} is no template argument", RESERVED_HINT)
    return _json_text({key: one for key, one in value.items() if one is not None}, column)


def _json_text(value: Any, column: str) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if what := lone_surrogate(text):
        raise BadRow(f"column '{column}': {what}, which has no UTF-8 form")
    return text


def template_values(row: DataRow, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the template gets beside the messages: the row's tools, and the arguments `given`
    (`data.chat_template_kwargs`), over which the row's own win.
    """
    fields = row.fields
    values = {**given, **json.loads(fields.get("chat_template_kwargs") or "{}")}
    return values | ({"tools": json.loads(fields["tools"])} if fields.get("tools") else {})


def without_key(messages: Sequence[Message], name: str) -> list[Message]:
    """The messages without one of their keys."""
    return [
        cast(Message, {key: value for key, value in message.items() if key != name})
        for message in messages
    ]


def with_arguments_as_text(message: Message) -> Message:
    """The message with the arguments of its calls as JSON text, as OpenAI writes them."""
    if "tool_calls" not in message:
        return message
    calls: list[ToolCall] = []
    for call in message["tool_calls"]:
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls}


def _joined(parts: list[Any], place: str) -> str:
    """The text of a content that is a list of parts."""
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else type_name(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow(
                f"{place}: content part {number} is {kind!r}; only {{type: text, text: ...}} is"
                " supported"
            )
    return "".join(part["text"] for part in parts)


def conversation_of(row: DataRow, system_prompt: str | None) -> list[Message]:
    """The row as a conversation: its messages, or one user and one assistant turn. A system
    message or a `system` column of the row wins over the recipe's `system_prompt`.
    """
    fields = row.fields
    if "messages" in fields:
        messages = fields["messages"]
    elif "prompt" in fields and isinstance(fields["prompt"], list):
        messages = [*fields["prompt"], *fields["completion"]]
    else:
        question, answer = fields.get("prompt"), fields.get("completion")
        if question is None:
            question = user_turn(fields["instruction"], fields.get("context", ""))
            answer = fields["response"]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return with_system_prompt(messages, fields.get("system") or system_prompt)


def user_turn(instruction: str, context: str = "") -> str:
    """An instruction and its context as one user message, a blank line between them."""
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """The conversation with a system message in front, unless it has one or none is given."""
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def check_roles(messages: Sequence[Message]) -> None:
    """Check who speaks when: a system message or none, then user and assistant in turn, results of
    tools after the calls, the assistant last, be it with a call.

    Raises:
        BadRow: it is another order, a call has no result, or a turn that is to be learned is empty.
    """
    roles = [message["role"] for message in messages]
    first = 1 if roles[:1] == ["system"] else 0
    if not roles[first:]:
        raise BadRow("only a system message" if roles else "no messages")
    if "assistant" not in roles:
        raise BadRow("no assistant turn")
    for index, role in enumerate(roles[first:], first):
        expected = _NEXT[roles[index - 1] if index > first else "system"]
        if role not in expected:
            what = f"roles out of order: message {index} is {role}, expected {expected[0]}"
            raise BadRow(what)
    if roles[-1] != "assistant":
        what = (
            f"the last message is not the assistant's: message {len(roles) - 1} is the"
            f" {roles[-1]}'s, and nothing answers it"
        )
        raise BadRow(what, "cut the conversation after its last assistant turn")
    for index, (message, following) in enumerate(pairwise(messages)):
        if message.get("tool_calls") and following["role"] != "tool":
            names = ", ".join(call["function"]["name"] for call in message["tool_calls"])
            raise BadRow(
                f"tool call without result: message {index} calls {names}",
                "put a message of role tool with the result after it, or end the conversation"
                " there",
            )
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    learned = [index for index in answers if messages[index].get("weight") != 0]
    if not learned:
        what = "nothing to train on: every assistant turn has weight 0"
        raise BadRow(what, "give one weight 1, or leave the row out")
    silent = [i for i in learned if not any(map(str.strip, message_texts(messages[i])))]
    if silent and len(silent) < len(answers):  # rows without any answer are counted by the audit
        raise BadRow(
            f"message {silent[0]} (assistant) is empty: no text, no thought, no tool call",
            "cut it out of the conversation, or give it weight: 0",
        )
