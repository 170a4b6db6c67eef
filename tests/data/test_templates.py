from __future__ import annotations

import pytest
from conversation_samples import MARKED, TURNS

from recipes_lib.data.examples import BadRow, BadRows, Example, SettingError
from recipes_lib.data.supervision import Supervision, encode
from recipes_lib.errors import DataError
from recipes_lib.recipe.sections import DataSection


def conversation(messages=TURNS, line=1) -> Example:
    return Example("rows.jsonl", line, line, {"messages": messages})


def encode_chat(examples, tokenizer, *, template=None, train=None, **keys):
    section = DataSection(source="x", prompt_format="chat", **keys)
    settings = Supervision.of(section, {"max_length": 4096} | (train or {}), tokenizer)
    encoded = list(encode(examples, settings, tokenizer, template or tokenizer.chat_template))
    bad = BadRows()
    for example, item in zip(examples, encoded, strict=True):
        if isinstance(item, BadRow):
            bad.add(example, item)
    if bad.found:
        raise bad.error()
    return encoded


def supervised_text(item, tokenizer) -> list[str]:
    return [tokenizer.decode(item.ids[start:end].tolist(), clean_up_tokenization_spaces=False) for start, end in item.spans]


def test_every_assistant_turn_and_its_end_token_carry_loss(tiny_tokenizer):
    [item] = encode_chat([conversation()], tiny_tokenizer)
    assert supervised_text(item, tiny_tokenizer) == ["First\n  answer.</s>", "Second.</s>"]
    assert item.ends


def test_the_last_turn_alone_carries_loss_when_asked(tiny_tokenizer):
    [item] = encode_chat([conversation()], tiny_tokenizer, chat_loss="last")
    assert supervised_text(item, tiny_tokenizer) == ["Second.</s>"]


def test_generation_markers_and_prefixes_agree(tiny_tokenizer):
    [by_prefix] = encode_chat([conversation()], tiny_tokenizer)
    [by_marker] = encode_chat([conversation()], tiny_tokenizer, template=MARKED)
    assert (by_prefix.ids == by_marker.ids).all() and by_prefix.spans == by_marker.spans


def test_ids_are_those_of_apply_chat_template(tiny_tokenizer):
    [item] = encode_chat([conversation()], tiny_tokenizer, system_prompt="Brief.")
    messages = [{"role": "system", "content": "Brief."}, *TURNS]
    assert item.ids.tolist() == tiny_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


def test_the_whole_conversation_carries_loss_when_asked(tiny_tokenizer):
    [item] = encode_chat([conversation()], tiny_tokenizer, train={"completion_only_loss": False})
    assert (item.labels == item.ids).all()


def test_a_template_that_rewrites_earlier_turns_names_the_row(tiny_tokenizer):
    rewriting = (
        "{% for message in messages %}<|{{ message['role'] }}|>\n"
        "{{ message['content'] if loop.last or message['role'] == 'user' else '(cut)' }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    with pytest.raises(DataError, match="renders the first messages differently") as caught:
        encode_chat([conversation(TURNS[:2]), conversation(line=2)], tiny_tokenizer, template=rewriting)
    assert caught.value.line == 2 and "{% generation %}" in caught.value.hints[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system messages here') }}",
        "{% generation %}{{ raise_exception('no system messages here') }}{% endgeneration %}",
    ],
)
def test_a_template_that_refuses_a_row_names_it(tiny_tokenizer, template):
    with pytest.raises(DataError, match="the chat template refuses the conversation: no system messages here") as caught:
        encode_chat([conversation(line=7)], tiny_tokenizer, template=template)
    assert caught.value.line == 7


def test_a_template_without_an_end_token_is_noticed(tiny_tokenizer):
    endless = "{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}\n{% endfor %}"
    endless += "{% if add_generation_prompt %}assistant:\n{% endif %}"
    [item] = encode_chat([conversation(TURNS[:2])], tiny_tokenizer, template=endless)
    assert not item.ends and supervised_text(item, tiny_tokenizer) == ["First\n  answer.\n"]


def test_text_after_a_special_token_inside_a_turn_keeps_its_loss(tiny_tokenizer):
    messages = [TURNS[0], {"role": "assistant", "content": "a <|user|> b"}]
    [item] = encode_chat([conversation(messages)], tiny_tokenizer)
    assert supervised_text(item, tiny_tokenizer) == ["a <|user|> b</s>"]


@pytest.mark.parametrize("marked", ["", "{% generation %}{% endgeneration %}"])
def test_a_template_that_is_no_jinja_is_the_template_s_fault_and_not_the_rows(marked, tiny_tokenizer):
    with pytest.raises(SettingError, match="line 2 of the chat template is not Jinja") as caught:
        encode_chat([conversation()], tiny_tokenizer, template=marked + "{% for m in messages %}\n{{ m.content }")
    assert caught.value.key == "data.chat_template"
