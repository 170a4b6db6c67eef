from __future__ import annotations

import json

import pytest

from recipes_lib.data.conversations import check_roles, conversation_of, read_messages
from recipes_lib.data.rows import BadRow, DataRow


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{i}"} for i, role in enumerate(roles)]


def test_sharegpt_spelling_is_ours_in_other_words():
    messages = read_messages(
        [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
        ],
        "conversations",
    )
    assert messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "expected a list of messages, found None"),
        (["hi"], "expected {role, content}, found str"),
        ([{"role": "wizard", "content": "a"}], "unknown role 'wizard'"),
        ([{"role": "user", "content": None}], "(user): expected text, found None"),
        ([{"role": "user", "content": "\udc00"}], "lone surrogate"),
    ],
)
def test_a_bad_message_is_described(value, words):
    with pytest.raises(BadRow) as caught:
        read_messages(value, "messages")
    assert words in caught.value.what


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ((), "no messages"),
        (("system",), "only a system message"),
        (("user",), "no assistant turn"),
        (("user", "user", "assistant"), "message 1 is user, expected assistant"),
        (("assistant", "user", "assistant"), "message 0 is assistant, expected user"),
        (
            ("system", "user", "assistant", "system", "assistant"),
            "message 3 is system, expected user",
        ),
        (("user", "assistant", "user"), "the last message is not the assistant's"),
    ],
)
def test_roles_out_of_order_are_described(roles, words):
    with pytest.raises(BadRow) as caught:
        check_roles(turns(*roles))
    assert words in caught.value.what


def test_good_orders_have_no_problem():
    check_roles(turns("system", "user", "assistant", "user", "assistant"))
    check_roles(turns("user", "assistant"))


def test_a_task_becomes_one_user_and_one_assistant_turn():
    example = DataRow("f", 1, 1, {"instruction": "Do.", "context": "C", "response": "R"})
    assert conversation_of(example, None) == [
        {"role": "user", "content": "Do.\n\nC"},
        {"role": "assistant", "content": "R"},
    ]
    assert conversation_of(example, "S")[0] == {"role": "system", "content": "S"}


def test_a_system_message_of_the_row_wins_over_the_recipe_s():
    example = DataRow("f", 1, 1, {"messages": turns("system", "user", "assistant")})
    assert conversation_of(example, "other") == example.fields["messages"]


def test_a_content_of_text_parts_is_their_text_and_any_other_part_is_named():
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two."}]
    assert read_messages([{"role": "user", "content": parts}], "messages") == [
        {"role": "user", "content": "One two."}
    ]
    with pytest.raises(BadRow, match="message 0: content part 1 is 'image'; only "):
        read_messages(
            [{"role": "user", "content": [parts[0], {"type": "image", "image": "a.png"}]}],
            "messages",
        )


def test_only_a_weight_of_nought_or_one_is_understood():
    turns = [
        {"role": "user", "content": "a", "weight": 0},
        {"role": "assistant", "content": "b", "weight": 0},
    ]
    assert ["weight" in message for message in read_messages(turns, "messages")] == [False, True]
    for role, weight in (("assistant", 0.5), ("assistant", -1), ("user", 1), ("assistant", "0")):
        with pytest.raises(BadRow, match="is not supported: an assistant turn may have 0"):
            read_messages([{"role": role, "content": "a", "weight": weight}], "messages")


def test_a_message_in_two_spellings_that_differ_is_refused():
    both = {"role": "user", "from": "user", "content": "a", "value": "a"}
    assert read_messages([both], "messages") == [{"role": "user", "content": "a"}]
    with pytest.raises(BadRow, match="both content and value, and they differ"):
        read_messages([both | {"value": "b"}], "messages")


def test_a_conversation_that_ends_with_the_user_says_what_to_do():
    with pytest.raises(BadRow) as caught:
        check_roles(turns("user", "assistant", "user"))
    assert (
        "message 2 is the user's" in caught.value.what
        and "cut the conversation" in caught.value.hint
    )


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
RESULT = {"role": "tool", "content": "sunny"}
ASKED = {"role": "user", "content": "And in Bonn?"}
ANSWERED = {"role": "assistant", "content": "Sunny."}


@pytest.mark.parametrize(
    "call",
    [
        {**CALL, "id": "call_1"},
        {"name": "weather", "arguments": {"city": "Bonn"}},
        {"name": "weather", "arguments": '{"city": "Bonn"}'},
        {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}},
    ],
)
def test_tool_calls_of_every_spelling_become_one(call):
    spelt = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "tool_calls": json.dumps([call])},
        {"role": "assistant", "function_call": call},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "function_call", "value": json.dumps([call])},
    ]
    identity = {"id": "call_1"} if "id" in call else {}
    for message in spelt:
        assert read_messages([message], "messages") == [
            {"role": "assistant", "content": "", "tool_calls": [{**identity, **CALL}]}
        ]


def test_a_sharegpt_conversation_with_calls_is_the_openai_one():
    value = json.dumps({"name": "weather", "arguments": {"city": "Bonn"}})
    sharegpt = [
        {"from": "human", "value": "And in Bonn?"},
        {"from": "gpt", "value": "Let me see."},
        {"from": "function_call", "value": value},
        {"from": "observation", "value": "sunny"},
        {"from": "function_call", "value": value},
        {"from": "tool", "value": {"sky": "blue"}},
        {"from": "gpt", "value": "Sunny."},
    ]
    messages = read_messages(sharegpt, "conversations")
    assert messages == [
        ASKED,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
        RESULT,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sky": "blue"}'},
        ANSWERED,
    ]
    check_roles(messages)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_of_every_spelling_become_one(key):
    [message] = read_messages([{**ANSWERED, key: "Hm."}], "messages")
    assert message == {**ANSWERED, "reasoning_content": "Hm."}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"tool_calls": [{"name": "f", "arguments": "{city"}]}, "of tool call 'f': not JSON ("),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, "expected an object, found list"),
        ({"tool_calls": [{"arguments": {"a": 1}}]}, "a tool call needs a name"),
        ({"tool_calls": "weather"}, "the tool call: not JSON"),
        ({"thinking": "a", "reasoning": "b"}, "both thinking and reasoning, and they differ"),
        ({"reasoning_content": ["a"]}, "reasoning_content: expected text, found list"),
        ({"reasoning_content": "\udc00"}, "(assistant): lone surrogate"),
        ({"tool_calls": [{"name": "f"}], "function_call": {"name": "f"}}, "both tool_calls and"),
    ],
)
def test_a_bad_call_or_thought_is_described(message, words):
    with pytest.raises(BadRow) as caught:
        read_messages([ASKED, {**ANSWERED, **message}], "messages")
    assert "column 'messages', message 1" in caught.value.what and words in caught.value.what


def called(*ids):
    calls = [{**CALL, **({"id": id} if id else {})} for id in ids]
    return {"role": "assistant", "content": "", "tool_calls": calls}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([ASKED, called(None), ASKED, ANSWERED], "tool call without result: message 1 calls"),
        ([ASKED, called(None), RESULT], "message 2 is the tool's, and nothing answers it"),
        ([ASKED, called(None), RESULT, ASKED, ANSWERED], "message 3 is user, expected assistant"),
        ([ASKED, RESULT, ANSWERED], "message 1 is tool, expected assistant"),
        (
            [ASKED, {**ANSWERED, "content": " "}, ASKED, ANSWERED],
            "message 1 (assistant) is empty",
        ),
        ([ASKED, {**ANSWERED, "weight": 0}], "nothing to train on: every assistant turn has"),
    ],
)
def test_a_conversation_that_teaches_nothing_or_the_wrong_thing_is_described(messages, words):
    with pytest.raises(BadRow) as caught:
        check_roles(messages)
    assert words in caught.value.what


def test_results_may_be_several_or_one_for_several_calls_and_a_call_may_be_the_last_thing_said():
    check_roles([ASKED, called("a", "b"), RESULT, ANSWERED])
    check_roles([ASKED, called("a"), RESULT, RESULT, called("b")])
    check_roles([ASKED, ANSWERED, RESULT, ANSWERED])  # a call that is written in the text
    silent = {"role": "assistant", "content": "", "weight": 0}
    check_roles([ASKED, silent, ASKED, ANSWERED])
