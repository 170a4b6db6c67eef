"""Conversations: messages of any spelling become ours, and who speaks when is checked."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recipes_lib.data.errors import BadRow, listed
from recipes_lib.data.values import checked_text, is_blank, parsed_json

# One turn of a conversation, as the chat templates read it: role and content; of the assistant also
# reasoning_content, tool_calls (in OpenAI's spelling) and weight (0 for no loss).
Message = dict[str, Any]
CALL = "function_call"  # ShareGPT's turn that is nothing but calls
# Every name of a role -> ours: OpenAI's, and ShareGPT's, as its `from` key has them.
ROLES = (
    dict.fromkeys(("system", "developer"), "system")
    | dict.fromkeys(("user", "human"), "user")
    | dict.fromkeys(("assistant", "gpt", "model", CALL), "assistant")
    | dict.fromkeys(("tool", "observation", "function"), "tool")
)
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
OF_TOOLS = ("tool_call_id", "name")


def read_messages(value: Any, what: str) -> list[Message]:
    """Return messages of any spelling in ours."""
    messages = []
    for number, message in enumerate(parsed_json(value, list, what)):
        messages.append(_read_message(message, f"{what}, message {number}"))
    return messages


def _read_message(given: Any, what: str) -> Message:
    given = parsed_json(given, dict, what)
    speaker = given.get("role") or given.get("from")
    role = ROLES.get(str(speaker))
    if role is None:
        raise BadRow(f"{what}: unknown role {speaker!r}; roles are {', '.join(ROLES)}")
    what = f"{what} ({role})"
    message: Message = {"role": role}
    content = given.get("content")
    if content is None:
        content = given.get("value")
    if role == "assistant":
        calls = content if speaker == CALL else given.get("tool_calls")
        thoughts = next((given[key] for key in THOUGHTS if given.get(key)), None)
        if thoughts:
            message["reasoning_content"] = checked_text(thoughts, f"{what}: thoughts")
        if not is_blank(calls):
            message["tool_calls"] = _read_calls(calls, what)
        if speaker == CALL or (content is None and len(message) > 1):
            content = ""  # only calls or thoughts
    message |= {key: given[key] for key in OF_TOOLS if given.get(key)}
    message["content"] = _content_text(content, role, what)
    weight = given.get("weight")
    if weight not in (None, 0, 1):
        raise BadRow(f"{what}: weight {weight!r}: an assistant turn may have 0 (no loss) or 1")
    if weight == 0 and role == "assistant":
        message["weight"] = 0
    return message


def _content_text(content: Any, role: str, what: str) -> str:
    """Return the text of a content, of its parts, or of what a tool returned as JSON."""
    if isinstance(content, list):
        if all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            return "".join(checked_text(part.get("text"), f"{what}: a part") for part in content)
        if role != "tool":
            raise BadRow(f"{what}: only content parts {{type: text, text: ...}} are read")
    if role == "tool" and isinstance(content, dict | list):
        content = json.dumps(content, ensure_ascii=False)
    return checked_text(content, what)


def _read_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Return tool calls of any spelling (OpenAI's, `{name, arguments}`, JSON text of either)."""
    value = parsed_json(value, object, f"{what}: the tool call")
    calls = []
    for given in value if isinstance(value, list) else [value]:
        function = given.get("function", given) if isinstance(given, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not function or not isinstance(name, str) or not name:
            raise BadRow(f"{what}: a tool call needs a name, as in {{name, arguments}}")
        arguments = function.get("arguments", function.get("parameters")) or {}
        arguments = parsed_json(arguments, dict, f"{what}: the arguments of tool call '{name}'")
        called = {"name": name, "arguments": arguments}
        checked_text(json.dumps(called, ensure_ascii=False), what)
        call = {"type": "function", "function": called}
        calls.append({"id": given["id"]} | call if given.get("id") else call)
    return calls


def read_history(value: Any, what: str) -> list[Message]:
    """Return earlier turns, as LLaMA-Factory writes them: pairs of a question and its answer."""
    messages: list[Message] = []
    for number, pair in enumerate(parsed_json(value, list, what)):
        turn = f"{what}, turn {number}"
        texts = parsed_json(pair, list, turn)
        if len(texts) != 2:
            raise BadRow(f"{turn}: expected a question and its answer, found {len(texts)} texts")
        for role, text in zip(("user", "assistant"), texts, strict=True):
            messages.append({"role": role, "content": checked_text(text, turn)})
    return messages


def message_texts(message: Mapping[str, Any]) -> list[str]:
    """Return all that a message says: its thoughts, its content, and its tool calls as JSON."""
    texts = [message["content"]]
    if "reasoning_content" in message:
        texts.insert(0, message["reasoning_content"])
    for call in message.get("tool_calls", ()):
        texts.append(json.dumps(call["function"], ensure_ascii=False))
    return texts


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
        expected = "expected user and assistant in turn, assistant last"
        raise BadRow(f"roles from message {number} on: {listed(roles[number:], 3)}; {expected}")
