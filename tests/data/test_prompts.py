"""Prompts: the same text in training and when the model is asked."""

import pytest
from conversation_samples import encode_row
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from recipes_lib.config.recipe import DataSection
from recipes_lib.data.errors import SettingError
from recipes_lib.data.prompts import (
    chat_template,
    default_system_message,
    format_hash,
    generation_prompt,
    task_prompt,
)

ASKED = {"role": "user", "content": "a"}
TURNS = [ASKED, {"role": "assistant", "content": "b"}]
THINKING = (
    "{{ '' if enable_thinking | default(true) else '[fast]' }}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def section(prompt_format: str = "dolly", **keys) -> DataSection:
    return DataSection(source="x.jsonl", prompt_format=prompt_format, **keys)


def test_dolly_and_alpaca_are_the_published_formats():
    bare = "### Instruction:\nDo.\n\n### Response:\n"
    with_context = "### Instruction:\nDo.\n\n### Context:\nCtx.\n\n### Response:\n"
    assert task_prompt("dolly", "Do.", " \n") == bare
    assert task_prompt("dolly", "Do.", "Ctx.") == with_context
    assert "{context} {0}" in task_prompt("dolly", "{context} {0}", "{instruction}")
    below = "Below is an instruction that describes a task"
    assert task_prompt("alpaca", "Do.").startswith(f"{below}. Write a response")
    with_input = task_prompt("alpaca", "Do.", "In.")
    assert with_input.startswith(f"{below}, paired with an input that provides further context")
    assert with_input.endswith("### Instruction:\nDo.\n\n### Input:\nIn.\n\n### Response:")


def test_the_generation_prompt_is_the_training_prompt(tiny_tokenizer):
    dolly = f"{task_prompt('dolly', 'a')}b\n\n{task_prompt('dolly', 'a')}"
    chat = "<s><|system|>\nBrief.</s>\n<|user|>\na</s>\n<|assistant|>\n"
    for setting, messages, prompt in (
        (section("raw"), [ASKED], "a"),
        (section("chat", system_prompt="Brief."), [ASKED], chat),
        (section(), [*TURNS, ASKED], dolly),
    ):
        assert generation_prompt(setting, tiny_tokenizer, messages) == prompt


def test_a_template_is_the_tokenizer_s_inline_a_file_or_one_of_trl(tiny_tokenizer, tmp_path):
    trl = pytest.importorskip("trl.chat_template_utils")
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    for given, template in (
        (None, tiny_tokenizer.chat_template),
        (str(file), "{{ messages }}"),
        ("{{ m }}", "{{ m }}"),
        ("trl:llama3", trl.llama3_chat_template),
    ):
        chosen = chat_template(section("chat", chat_template=given), tiny_tokenizer)
        assert chosen == template
    for given, words, hint in (
        ("other.jinja", r"other\.jinja cannot be read: .*No such file", ".jinja file"),
        ("trl:lama3", "trl:lama3 cannot be read", "did you mean trl:llama3?"),
    ):
        with pytest.raises(SettingError, match=words) as caught:
            chat_template(section("chat", chat_template=given), tiny_tokenizer)
        assert hint in caught.value.hints[0]


def test_the_format_hash_changes_with_everything_that_shapes_a_prompt(tiny_tokenizer):
    sections = [
        *map(section, ("dolly", "alpaca", "raw", "chat")),
        section("chat", system_prompt="x"),
        section("chat", chat_template="{{ m }}"),
        section("chat", chat_template_kwargs={"enable_thinking": False}),
    ]
    hashes = [format_hash(setting, tiny_tokenizer) for setting in sections]
    hashes.append(format_hash(section(), tiny_tokenizer, eos_token="<unk>"))
    assert len(set(hashes)) == len(hashes)
    assert format_hash(section(max_examples=3), tiny_tokenizer) == hashes[0]


def test_template_arguments_act_in_training_and_generation_and_a_row_s_own_win(tiny_tokenizer):
    fast = {"prompt_format": "chat", "chat_template_kwargs": {"enable_thinking": False}}
    slow, quick = (
        generation_prompt(section(**keys, chat_template=THINKING), tiny_tokenizer, [ASKED])
        for keys in ({"prompt_format": "chat"}, fast)
    )
    assert quick == "[fast]" + slow
    own = {"messages": TURNS, "chat_template_kwargs": '{"enable_thinking": true}'}
    for fields, prompt in (({"messages": TURNS}, quick), (own, slow)):
        item = encode_row(fields, tiny_tokenizer, THINKING, **fast)
        assert tiny_tokenizer.decode(item.ids.tolist()).startswith(prompt)


def test_calls_that_the_template_does_not_render_are_refused_or_counted(tiny_tokenizer):
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    called = [ASKED, {**TURNS[1], "content": "", "tool_calls": [call]}]
    followed = [*called, {"role": "tool", "content": "3"}, TURNS[1]]
    silent = [ASKED, {**called[1], "weight": 0}, *followed[2:]]
    for messages in (called, followed):
        bad = encode_row({"messages": messages}, tiny_tokenizer, THINKING, prompt_format="chat")
        assert "the chat template leaves out the call of 'weather'" in bad.what
    # beside a text, and with the function's name elsewhere, the text alone would be learned
    beside = [{**ASKED, "content": "weather?"}, {**called[1], "content": "I look."}]
    bad = encode_row({"messages": beside}, tiny_tokenizer, THINKING, prompt_format="chat")
    assert "the chat template leaves out the call of 'weather'" in bad.what
    for messages, chat_loss in ((followed, "last"), (silent, "all")):
        keys = {"prompt_format": "chat", "chat_loss": chat_loss}
        assert encode_row({"messages": messages}, tiny_tokenizer, THINKING, **keys).changed


def test_the_system_message_that_a_template_adds_is_found() -> None:
    template = (
        "{% if messages[0].role != 'system' %}<s>You are Bot.</s>{% endif %}"
        "{% for m in messages %}"
        "{% if m.role == 'system' %}<s>{{ m.content }}</s>{% else %}[{{ m.content }}]{% endif %}"
        "{% endfor %}"
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    assert default_system_message([ASKED], tokenizer, template, {}) == "You are Bot."
    silent = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert default_system_message([ASKED], tokenizer, silent, {}) == ""
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}x"
    assert default_system_message([ASKED], tokenizer, refusing, {}) == ""
