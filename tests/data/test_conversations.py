"""Messages of every spelling become one, and who speaks when is checked."""

from __future__ import annotations

import json

import pytest

from recipes_lib.data.rows import (
    BadRow,
    DataRow,
    check_roles,
    conversation_of,
    read_messages,
)

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
RESULT = {"role": "tool", "content": "sunny"}
ASKED = {"role": "user", "content": "And in Bonn?"}
ANSWERED = {"role": "assistant", "content": "Sunny."}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{i}"} for i, role in enumerate(roles)]


def refused(check, cases) -> list[str]:
    """The cases that `check` does not refuse in these words."""
    wrong = []
    for value, words in cases:
        with pytest.raises(BadRow) as caught:
            check(value)
        if words not in caught.value.what:
            wrong.append(f"{words}: {caught.value.what}")
    return wrong


def test_a_bad_message_is_described():
    parts = [{"type": "text", "text": "One "}, {"type": "image", "image": "a.png"}]
    cases = (
        (3, "expected dict, found int"),
        ({"role": "bot", "content": "a"}, "unknown role 'bot'"),
        ({"role": "user", "content": None}, "(user): expected text, found None"),
        ({"role": "user", "content": "\udc00"}, "lone surrogate"),
        ({"role": "user", "content": parts}, "only content parts {type: text"),
        ({"role": "user", "content": "a", "weight": 1}, "weight 1: "),
        ({**ANSWERED, "weight": 0.5}, "weight 0.5: "),
        ({**ANSWERED, "reasoning_content": ["a"]}, "thoughts: expected text, found list"),
        ({**ANSWERED, "tool_calls": [{"name": "f", "arguments": "{city"}]}, "'f': not JSON ("),
        ({**ANSWERED, "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "dict, found list"),
        ({**ANSWERED, "tool_calls": [{"arguments": {"a": 1}}]}, "a tool call needs a name"),
        ({**ANSWERED, "tool_calls": "weather"}, "the tool call: not JSON"),
    )
    assert not refused(lambda message: read_messages([message], "messages"), cases)
    with pytest.raises(BadRow, match="expected list, found None"):
        read_messages(None, "messages")


def test_roles_parts_thoughts_and_weights_of_other_spellings_are_ours():
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two."}]
    thought = {**ANSWERED, "reasoning_content": "Hm."}
    for given, expected in (
        ({"from": "human", "value": "a"}, {"role": "user", "content": "a"}),
        ({"role": "model", "content": "a"}, {"role": "assistant", "content": "a"}),
        ({"from": "observation", "value": "a"}, {"role": "tool", "content": "a"}),
        ({"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
        ({"role": "user", "content": parts}, {"role": "user", "content": "One two."}),
        ({**ANSWERED, "thinking": "Hm."}, thought),
        ({**ANSWERED, "reasoning": "Hm."}, thought),
        ({**ASKED, "weight": 0}, ASKED),
        ({**ANSWERED, "weight": 1}, ANSWERED),
        ({**ANSWERED, "weight": 0}, {**ANSWERED, "weight": 0}),
    ):
        assert read_messages([given], "messages") == [expected], given


def test_tool_calls_of_every_spelling_become_one():
    arguments = '{"city": "Bonn"}'
    for call in (
        {**CALL, "id": "call_1"},
        {"name": "weather", "arguments": {"city": "Bonn"}},
        {"type": "function", "function": {"name": "weather", "arguments": arguments}},
    ):
        identity = {"id": "call_1"} if "id" in call else {}
        expected = {**CALLED, "tool_calls": [{**identity, **CALL}]}
        for message in (
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "assistant", "tool_calls": json.dumps([call])},
            {"from": "function_call", "value": json.dumps([call])},
        ):
            assert read_messages([message], "messages") == [expected], message


def test_a_sharegpt_conversation_with_calls_is_the_openai_one():
    value = json.dumps({"name": "weather", "arguments": {"city": "Bonn"}})
    sharegpt = [
        {"from": "human", "value": "And in Bonn?"},
        {"from": "function_call", "value": value},
        {"from": "observation", "value": "sunny"},
        {"from": "function_call", "value": value},
        {"from": "tool", "value": {"sky": "blue"}},
        {"from": "gpt", "value": "Sunny."},
    ]
    messages = read_messages(sharegpt, "conversations")
    result = {"role": "tool", "content": '{"sky": "blue"}'}
    assert messages == [ASKED, CALLED, RESULT, CALLED, result, ANSWERED]
    check_roles(messages)


def test_who_speaks_when_is_checked():
    cases = (
        ((), "no assistant turn"),
        (turns("user"), "no assistant turn"),
        (turns("user", "user", "assistant"), "message 1 is user, expected assistant"),
        (turns("assistant", "user", "assistant"), "message 0 is assistant, expected user"),
        (turns("user", "assistant", "system", "assistant"), "message 2 is system, expected user"),
        (turns("user", "assistant", "user"), "the last message is not the assistant's"),
        ([ASKED, CALLED, RESULT, ASKED, ANSWERED], "message 3 is user, expected assistant"),
        ([ASKED, RESULT, ANSWERED], "message 1 is tool, expected assistant"),
    )
    assert not refused(check_roles, cases)
    check_roles(turns("system", "user", "assistant", "user", "assistant"))
    check_roles([ASKED, CALLED, RESULT, RESULT, CALLED])
    check_roles([ASKED, ANSWERED, RESULT, ANSWERED])  # a call that is written in the text


def test_a_row_becomes_a_conversation_whose_own_system_message_wins():
    task = DataRow("f", 1, 1, {"instruction": "Do.", "context": "C", "response": "R"})
    answer = {"role": "assistant", "content": "R"}
    assert conversation_of(task, None) == [{"role": "user", "content": "Do.\n\nC"}, answer]
    assert conversation_of(task, "S")[0] == {"role": "system", "content": "S"}
    row = DataRow("f", 1, 1, {"messages": turns("system", "user", "assistant")})
    assert conversation_of(row, "other") == row.fields["messages"]
