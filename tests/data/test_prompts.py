from __future__ import annotations

import pytest

from recipes_lib.config.sections import DataSection
from recipes_lib.data.examples import SettingError
from recipes_lib.data.prompts import chat_template, format_hash, generation_prompt, task_prompt


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


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"instruction": "a", "messages": []},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "a"}]},
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(tiny_tokenizer, keys):
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
