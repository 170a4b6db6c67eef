"""Conversations: reading messages of several spellings, checking their roles, and finding what the
assistant said.

Used by the `chat` prompt format. A conversation is a list of `{role, content}` with roles system,
user and assistant; an assistant turn that must not be learned also has `weight: 0`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from recipes_lib.data.examples import BadRow, Example, lone_surrogate, type_name

Message = dict[str, Any]

# ShareGPT's names for the roles, as its `from` key has them.
ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")}
KNOWN_ROLES = ("system", "user", "assistant")
MESSAGE_KEYS = frozenset(("role", "from", "content", "value", "weight"))
# What a list or an object that says nothing becomes as JSON in a text column.
BLANK_TEXTS = ("", "[]", "{}", "null")


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: None, empty, or made of such values alone, as Arrow fills in
    what a row does not have.

    Example:
        >>> is_blank({"name": None, "calls": []}), is_blank(False)
        (True, False)
    """
    if isinstance(value, dict):
        return all(map(is_blank, value.values()))
    if isinstance(value, list):
        return all(map(is_blank, value))
    return value is None or (isinstance(value, str) and value.strip() in BLANK_TEXTS)


def unread_keys(value: Any, dropped: Collection[str] = ()) -> Iterator[str]:
    """The keys of messages that would be ignored although they say something, as `messages.KEY`."""
    for message in value if isinstance(value, list) else ():
        if isinstance(message, dict) and not message.keys() <= MESSAGE_KEYS:
            for key, content in message.items():
                name = f"messages.{key}"
                if key not in MESSAGE_KEYS and name not in dropped and not is_blank(content):
                    yield name


def read_messages(value: Any, column: str) -> list[Message]:
    """Messages with `role`/`content` or `from`/`value` keys, in our spelling.

    Raises:
        BadRow: what is wrong with the first bad one.
    """
    if not isinstance(value, list):
        raise BadRow(f"column '{column}': expected a list of messages, found {type_name(value)}")
    return [
        _read_message(message, f"column '{column}', message {index}")
        for index, message in enumerate(value)
    ]


def _read_message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow(f"{place}: expected {{role, content}}, found {type_name(message)}")
    role = message.get("role") or message.get("from")
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role in ("tool", "function", "function_call", "observation"):
        raise BadRow(f"{place}: role {role!r}: tool calls are not supported")
    if role not in KNOWN_ROLES:
        raise BadRow(f"{place}: unknown role {role!r}; roles are {', '.join(KNOWN_ROLES)}")
    content = message["content"] if message.get("content") is not None else message.get("value")
    for key, other in (("from", "role"), ("value", "content")):
        both = message.get(key), message.get(other)
        if None not in both and both[0] != both[1]:
            raise BadRow(f"{place}: both {other} and {key}, and they differ")
    if isinstance(content, list):
        content = _joined(content, place)
    if not isinstance(content, str):
        raise BadRow(f"{place} ({role}): expected text, found {type_name(content)}")
    if what := lone_surrogate(content):
        raise BadRow(f"{place} ({role}): {what}")
    weight = message.get("weight")
    if weight is not None and (weight not in (0, 1) or (weight == 1 and role != "assistant")):
        raise BadRow(
            f"{place} ({role}): weight {weight!r} is not supported: an assistant turn may have 0"
            " (no loss) or 1"
        )
    unlearned = {"weight": 0} if weight == 0 and role == "assistant" else {}
    return {"role": role, "content": content, **unlearned}


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


def conversation_of(example: Example, system_prompt: str | None) -> list[Message]:
    """The example as a conversation: its messages, or one user and one assistant turn.

    Args:
        system_prompt: the recipe's; a system message or a `system` column of the row wins over it.
    """
    fields = example.fields
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
    """Check the order of roles: an optional system message, then user and assistant in turn, ending
    with assistant.

    Raises:
        BadRow: it is another order.
    """
    roles = [message["role"] for message in messages]
    first = 1 if roles[:1] == ["system"] else 0
    if not roles[first:]:
        raise BadRow("only a system message" if roles else "no messages")
    if "assistant" not in roles:
        raise BadRow("no assistant turn")
    for index, role in enumerate(roles[first:]):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            what = f"roles out of order: message {index + first} is {role}, expected {expected}"
            raise BadRow(what)
    if roles[-1] != "assistant":
        what = (
            f"the last message is not the assistant's: message {len(roles) - 1} is the user's,"
            " and nothing answers it"
        )
        raise BadRow(what, "cut the conversation after its last assistant turn")
