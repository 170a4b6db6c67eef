"""Conversations: reading messages of several spellings, checking their roles, and finding what the assistant said.

Used by the `chat` prompt format. A conversation is a list of `{role, content}` with roles system, user and assistant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recipes_lib.data.examples import Example, type_name

Message = dict[str, str]

# ShareGPT's names for the roles, as its `from` key has them.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
KNOWN_ROLES = ("system", "user", "assistant")


def read_messages(value: Any, column: str) -> tuple[list[Message], str | None]:
    """Messages with `role`/`content` or `from`/`value` keys, in our spelling.

    Returns:
        The messages, and what is wrong with the first bad one (None if nothing is).
    """
    if not isinstance(value, list):
        return [], f"column '{column}': expected a list of messages, found {type_name(value)}"
    messages = []
    for index, message in enumerate(value):
        place = f"column '{column}', message {index}"
        if not isinstance(message, dict):
            return [], f"{place}: expected {{role, content}}, found {type_name(message)}"
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        role = ROLES.get(role, role) if isinstance(role, str) else role
        if message.get("tool_calls") or role in ("tool", "function", "function_call", "observation"):
            return [], f"{place}: tool calls are not supported"
        if role not in KNOWN_ROLES:
            return [], f"{place}: unknown role {role!r}; roles are {', '.join(KNOWN_ROLES)}"
        if not isinstance(content, str):
            return [], f"{place} ({role}): expected text, found {type_name(content)}"
        try:
            content.encode()
        except UnicodeEncodeError as error:
            return [], f"{place} ({role}): lone surrogate {content[error.start]!r} at character {error.start}"
        messages.append({"role": role, "content": content})
    return messages, None


def conversation_of(example: Example, system_prompt: str | None) -> list[Message]:
    """The example as a conversation: its messages, or one user and one assistant turn."""
    fields = example.fields
    if "messages" in fields:
        messages = list(fields["messages"])
    elif "prompt" in fields and isinstance(fields["prompt"], list):
        messages = [*fields["prompt"], *fields["completion"]]
    elif "prompt" in fields:
        messages = [{"role": "user", "content": fields["prompt"]}, {"role": "assistant", "content": fields["completion"]}]
    else:
        messages = [{"role": "user", "content": user_turn(fields["instruction"], fields.get("context", ""))}]
        messages.append({"role": "assistant", "content": fields["response"]})
    return with_system_prompt(messages, system_prompt)


def user_turn(instruction: str, context: str = "") -> str:
    """An instruction and its context as one user message, a blank line between them."""
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """The conversation with a system message in front, unless it has one or none is given."""
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def role_problem(messages: Sequence[Message]) -> str | None:
    """What is wrong with the order of roles: an optional system message, then user and assistant in turn, ending with assistant.

    Example:
        >>> role_problem([{"role": "assistant", "content": "hi"}])
        'roles out of order: message 0 is assistant, expected user'
    """
    turns = list(messages)
    if turns and turns[0]["role"] == "system":
        turns = turns[1:]
    if not turns:
        return "only a system message" if messages else "no messages"
    if not any(message["role"] == "assistant" for message in turns):
        return "no assistant turn"
    offset = len(messages) - len(turns)
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            return f"roles out of order: message {index + offset} is {message['role']}, expected {expected}"
    return "the last message is not the assistant's" if turns[-1]["role"] != "assistant" else None
