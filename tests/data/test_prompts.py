from __future__ import annotations

import json

import pytest
from conversation_samples import FOLDER

from recipes_lib.config.sections import DataSection
from recipes_lib.data.conversations import read_messages, read_tools
from recipes_lib.data.prompts import (
    chat_template,
    format_hash,
    generation_prompt,
    render_chat,
    task_prompt,
)
from recipes_lib.data.rows import DataRow, SettingError
from recipes_lib.data.supervision import render_turns


def section(prompt_format: str = "dolly", **keys) -> DataSection:
    return DataSection(source="x.jsonl", prompt_format=prompt_format, **keys)


def test_dolly_is_the_original_study_s_format():
    assert (
        task_prompt("dolly", "Do.", "Ctx.")
        == "### Instruction:\nDo.\n\n### Context:\nCtx.\n\n### Response:\n"
    )
    assert task_prompt("dolly", "Do.", " \n") == "### Instruction:\nDo.\n\n### Response:\n"


def test_alpaca_is_stanford_s_format():
    assert task_prompt("alpaca", "Do.").startswith(
        "Below is an instruction that describes a task. Write a response"
    )
    assert task_prompt("alpaca", "Do.", "In.").endswith(
        "### Instruction:\nDo.\n\n### Input:\nIn.\n\n### Response:"
    )
    assert "paired with an input that provides further context" in task_prompt(
        "alpaca", "Do.", "In."
    )


def test_braces_in_the_data_are_left_alone():
    assert "{context} {0}" in task_prompt("dolly", "{context} {0}", "{instruction}")


def test_the_generation_prompt_is_the_training_prompt(tiny_tokenizer):
    assert generation_prompt(
        section(), tiny_tokenizer, instruction="Do.", context="C"
    ) == task_prompt("dolly", "Do.", "C")
    assert generation_prompt(section("raw"), tiny_tokenizer, instruction="Do.") == "Do."
    chat = generation_prompt(
        section("chat", system_prompt="Brief."), tiny_tokenizer, instruction="Do."
    )
    assert chat == "<s><|system|>\nBrief.</s>\n<|user|>\nDo.</s>\n<|assistant|>\n"


def test_earlier_turns_of_a_plain_format_are_repeated_as_trained(tiny_tokenizer):
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "a."},
        {"role": "user", "content": "B?"},
    ]
    prompt = generation_prompt(section(), tiny_tokenizer, messages=turns)
    assert (
        prompt
        == "### Instruction:\nA?\n\n### Response:\na.\n\n### Instruction:\nB?\n\n### Response:\n"
    )


def test_a_prompt_that_cannot_be_continued_is_refused(tiny_tokenizer):
    answer = {"role": "assistant", "content": "a"}
    for keys in (
        {},
        {"instruction": "a", "messages": []},
        {"messages": []},
        {"messages": [answer]},
    ):
        with pytest.raises(ValueError, match=r"either an instruction|must end with a user turn"):
            generation_prompt(section(), tiny_tokenizer, **keys)


def test_chat_without_a_template_names_the_keys(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(SettingError, match="needs a chat template") as caught:
        chat_template(section("chat"), tiny_tokenizer)
    assert "data.chat_template" in caught.value.hints[0]


def test_a_template_may_be_inline_or_a_file_beside_the_recipe(tiny_tokenizer, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    assert (
        chat_template(section("chat", chat_template=str(file)), tiny_tokenizer) == "{{ messages }}"
    )
    assert chat_template(section("chat", chat_template="{{ m }}"), tiny_tokenizer) == "{{ m }}"
    with pytest.raises(SettingError, match=r"no such file: other\.jinja"):
        chat_template(section("chat", chat_template="other.jinja"), tiny_tokenizer)


def test_a_template_of_trl_is_read_from_the_installed_trl_by_its_name(tiny_tokenizer):
    trl = pytest.importorskip("trl.chat_template_utils")
    named = chat_template(section("chat", chat_template="trl:llama3"), tiny_tokenizer)
    assert named == trl.llama3_chat_template
    with pytest.raises(SettingError, match="TRL ships no template 'trl:lama3'") as caught:
        chat_template(section("chat", chat_template="trl:lama3"), tiny_tokenizer)
    assert caught.value.hints == ("did you mean trl:llama3?",)
    with pytest.raises(SettingError, match="TRL ships no template 'trl:chatml'") as caught:
        chat_template(section("chat", chat_template="trl:chatml"), tiny_tokenizer)
    assert "ChatML is trl:qwen2_5" in caught.value.hints[0]


def test_the_format_hash_changes_with_everything_that_shapes_a_prompt(tiny_tokenizer):
    sections = [
        section(),
        section("alpaca"),
        section("raw"),
        section("chat"),
        section("chat", system_prompt="x"),
        section("chat", chat_template="{{ m }}"),
    ]
    hashes = [format_hash(one, tiny_tokenizer) for one in sections] + [
        format_hash(section(), tiny_tokenizer, eos_token="<unk>")
    ]
    assert len(set(hashes)) == len(hashes)
    assert format_hash(section(max_examples=3), tiny_tokenizer) == hashes[0]


THINKING = (
    "{{ '' if enable_thinking | default(true) else '[fast]' }}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_template_arguments_act_in_training_and_generation_and_a_row_s_own_win(tiny_tokenizer):
    without = section("chat", chat_template=THINKING)
    fast = without.model_copy(update={"chat_template_kwargs": {"enable_thinking": False}})
    prompts = [generation_prompt(one, tiny_tokenizer, instruction="a") for one in (without, fast)]
    assert prompts[1] == "[fast]" + prompts[0]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    own = {"messages": turns, "chat_template_kwargs": '{"enable_thinking": true}'}
    texts = [
        render_turns(DataRow("f", 1, 1, fields), fast, tiny_tokenizer, THINKING).text
        for fields in ({"messages": turns}, own)
    ]
    assert texts[0].startswith(prompts[1]) and texts[1].startswith(prompts[0])
    assert format_hash(fast, tiny_tokenizer) != format_hash(without, tiny_tokenizer)


def test_tools_calls_results_and_thoughts_reach_templates_of_today(tiny_tokenizer):
    call = {"id": "call_0001", "name": "sky", "arguments": '{"place": "Bonn"}'}
    messages = read_messages(
        [
            {"role": "user", "content": "Well?"},
            {"role": "assistant", "thinking": "Look up.", "tool_calls": [call]},
            {"role": "tool", "content": "blue", "tool_call_id": "call_0001"},
        ],
        "messages",
    )
    nothing = {"type": "object", "properties": {}}
    sky = {"name": "sky", "description": "Its colour.", "parameters": nothing}
    tools = json.loads(read_tools([sky], "tools"))
    for name in ("qwen3", "llama3_1", "gptoss", "glm4moe", "deepseekv3", "gemma4"):
        template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        text, _ = render_chat(messages, tiny_tokenizer, template, {"tools": tools}, prompt=True)
        said = ["sky", "place", "Bonn", "blue"]
        said += [] if name == "deepseekv3" else ["Its colour."]  # it knows no tools, only calls
        said += ["Look up."] if name in ("qwen3", "gptoss", "glm4moe", "gemma4") else []
        assert [word for word in said if word not in text] == [], name


def test_calls_that_the_template_does_not_render_are_refused(tiny_tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = {"messages": [turns[0], {**turns[1], "tool_calls": [call]}]}
    bad = render_turns(DataRow("f", 1, 1, row), section("chat"), tiny_tokenizer, THINKING)
    assert bad.drop == ("messages.tool_calls",) and "not rendered by the chat template" in bad.what
