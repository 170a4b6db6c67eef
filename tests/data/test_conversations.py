from __future__ import annotations

import pytest

from recipes_lib.data.conversations import check_roles, conversation_of, read_messages
from recipes_lib.data.examples import BadRow, Example


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
        ([{"role": "tool", "content": "a"}], "tool calls are not supported"),
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
    example = Example("f", 1, 1, {"instruction": "Do.", "context": "C", "response": "R"})
    assert conversation_of(example, None) == [
        {"role": "user", "content": "Do.\n\nC"},
        {"role": "assistant", "content": "R"},
    ]
    assert conversation_of(example, "S")[0] == {"role": "system", "content": "S"}


def test_a_system_message_of_the_row_wins_over_the_recipe_s():
    example = Example("f", 1, 1, {"messages": turns("system", "user", "assistant")})
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
