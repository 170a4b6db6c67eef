from __future__ import annotations

import copy
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from conversation_samples import MARKED, TURNS

from recipes_lib.config.sections import DataSection
from recipes_lib.core.errors import DataError
from recipes_lib.data.prompts import Twin, chat_template, twin_of
from recipes_lib.data.rows import BadRow, BadRows, DataRow, SettingError
from recipes_lib.data.supervision import Supervision, encode, turn_beginning


def conversation(messages=TURNS, line=1) -> DataRow:
    return DataRow("rows.jsonl", line, line, {"messages": messages})


def encode_chat(examples, tokenizer, *, template=None, train=None, twin=None, **keys):
    section = DataSection(source="x", prompt_format="chat", **keys)
    settings = Supervision.of(section, {"max_length": 4096} | (train or {}), tokenizer)
    template = template or tokenizer.chat_template
    encoded = list(encode(examples, settings, tokenizer, template, twin))
    bad = BadRows()
    for example, item in zip(examples, encoded, strict=True):
        if isinstance(item, BadRow):
            bad.add(example, item)
    if bad.found:
        raise bad.error()
    return encoded


def supervised_text(item, tokenizer) -> list[str]:
    return [
        tokenizer.decode(item.ids[start:end].tolist(), clean_up_tokenization_spaces=False)
        for start, end in item.spans
    ]


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
    assert (
        item.ids.tolist()
        == tiny_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    )


def test_the_whole_conversation_carries_loss_when_asked(tiny_tokenizer):
    [item] = encode_chat([conversation()], tiny_tokenizer, train={"completion_only_loss": False})
    assert (item.labels == item.ids).all()


REWRITING = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] if loop.last"
    " or message['role'] == 'user' else '(cut)' }}{{ eos_token }}\n{% endfor %}{% if"
    " add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_names_the_row(tiny_tokenizer):
    with pytest.raises(DataError, match="renders the first messages differently") as caught:
        encode_chat(
            [conversation(TURNS[:2]), conversation(line=2)], tiny_tokenizer, template=REWRITING
        )
    assert caught.value.line == 2 and "{% generation %}" in caught.value.hints[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system messages here') }}",
        "{% generation %}{{ raise_exception('no system messages here') }}{% endgeneration %}",
    ],
)
def test_a_template_that_refuses_a_row_names_it(tiny_tokenizer, template):
    with pytest.raises(
        DataError, match="the chat template refuses the conversation: no system messages here"
    ) as caught:
        encode_chat([conversation(line=7)], tiny_tokenizer, template=template)
    assert caught.value.line == 7 and "choose another template" in caught.value.hints[0]


def test_a_template_without_an_end_token_is_noticed(tiny_tokenizer):
    endless = (
        "{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}\n{%"
        " endfor %}"
    )
    endless += "{% if add_generation_prompt %}assistant:\n{% endif %}"
    [item] = encode_chat([conversation(TURNS[:2])], tiny_tokenizer, template=endless)
    assert not item.ends and supervised_text(item, tiny_tokenizer) == ["First\n  answer.\n"]


def test_text_after_a_special_token_inside_a_turn_keeps_its_loss(tiny_tokenizer):
    messages = [TURNS[0], {"role": "assistant", "content": "a <|user|> b"}]
    [item] = encode_chat([conversation(messages)], tiny_tokenizer)
    assert supervised_text(item, tiny_tokenizer) == ["a <|user|> b</s>"]


@pytest.mark.parametrize("marked", ["", "{% generation %}{% endgeneration %}"])
def test_a_template_that_is_not_jinja_is_blamed_and_not_the_rows(marked, tiny_tokenizer):
    with pytest.raises(SettingError, match="line 2 of the chat template is not Jinja") as caught:
        encode_chat(
            [conversation()],
            tiny_tokenizer,
            template=marked + "{% for m in messages %}\n{{ m.content }",
        )
    assert caught.value.key == "data.chat_template"


TRAINING_TEMPLATES = sorted(
    (Path(str(find_spec("trl").origin)).parent / "chat_templates").glob("*_training.jinja")
)
READ_PARTS_ONLY = {
    "idefics3_training",
    "smolvlm_training",
    "llava_next_training",
}  # of models that see images


def with_special_tokens_of(template: str, tokenizer):
    """The tokenizer with what looks like a special token in the template, as the model's own
    tokenizer has it.
    """
    tokenizer = copy.deepcopy(tokenizer)
    names = re.findall(r"<[|｜][^<>\s'\"{}]+?[|｜]>|<end_of_\w+>|<turn\|>", template)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(names))})
    return tokenizer


@pytest.mark.parametrize("file", TRAINING_TEMPLATES, ids=lambda file: file.stem)
def test_trl_s_marked_templates_are_accepted_with_every_turn_and_its_end(file, tiny_tokenizer):
    template = file.read_text(encoding="utf-8")
    tokenizer = with_special_tokens_of(template, tiny_tokenizer)
    if file.stem in READ_PARTS_ONLY:
        with pytest.raises(DataError, match=r"the chat template re(fuses|nders nothing)"):
            encode_chat([conversation()], tokenizer, template=template)
        return
    [item] = encode_chat([conversation()], tokenizer, template=template)
    [last] = encode_chat([conversation()], tokenizer, template=template, chat_loss="last")
    said = "".join(supervised_text(item, tokenizer))
    assert (
        item.ends
        and "First\n  answer." in said
        and "Second." in said
        and "One?" not in said
        and "Two?" not in said
    )
    said = "".join(supervised_text(last, tokenizer))
    assert last.ends and "Second." in said and "First" not in said
    whole = tokenizer.apply_chat_template(
        TURNS, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert item.ids.tolist() == whole["input_ids"]
    marked = [index for index, mask in enumerate(whole["assistant_masks"]) if mask]
    learned = [index for start, end in item.spans for index in range(start, end)]
    assert set(learned) <= set(marked)
    begin = turn_beginning(tokenizer, template)  # some mark what a prompt ends with, too
    for index in set(marked) - set(learned):  # white space behind the end of a turn
        rest = tokenizer.decode([item.ids[index]]).strip()
        assert not rest or (rest in begin and any(start > index for start, _ in item.spans))


def test_there_are_marked_templates_to_try():
    assert len(TRAINING_TEMPLATES) > 20


def test_a_turn_of_weight_nought_carries_no_loss(tiny_tokenizer):
    silent = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
    for template in (None, MARKED):
        [item] = encode_chat([conversation(silent)], tiny_tokenizer, template=template)
        [whole] = encode_chat([conversation()], tiny_tokenizer, template=template)
        assert (
            supervised_text(item, tiny_tokenizer) == ["Second.</s>"]
            and (item.ids == whole.ids).all()
        )
    last = [*TURNS[:3], {**TURNS[3], "weight": 0}]
    assert encode_chat([conversation(last)], tiny_tokenizer, chat_loss="last")[0].supervised == 0
    with pytest.raises(DataError, match="weight 0: with train"):
        encode_chat([conversation(silent)], tiny_tokenizer, train={"completion_only_loss": False})


@pytest.mark.parametrize("dropped", ["system", "assistant"])
def test_a_template_that_leaves_out_what_a_message_says_is_noticed(dropped, tiny_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *TURNS]
    cut = "message['content'][:5]" if dropped == "assistant" else "''"
    template = (
        f"{{% for message in messages %}}<|{{{{ message['role'] }}}}|>\n{{{{ {cut} if"
        f" message['role'] == '{dropped}' else message['content'] }}}}{{{{ eos_token }}}}{{% endfor"
        " %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    [changed] = encode_chat([conversation(messages)], tiny_tokenizer, template=template)
    [whole] = encode_chat([conversation(messages)], tiny_tokenizer)
    assert changed.changed and not whole.changed


def test_a_template_that_rewrites_earlier_turns_can_teach_the_last_one(tiny_tokenizer):
    [item] = encode_chat([conversation()], tiny_tokenizer, template=REWRITING, chat_loss="last")
    assert supervised_text(item, tiny_tokenizer) == ["Second.</s>"]


PLAIN_TEMPLATES = sorted(
    file for file in TRAINING_TEMPLATES[0].parent.glob("*.jinja") if file not in TRAINING_TEMPLATES
)


def own_template(text, tokenizer):
    """The tokenizer with a template of its own."""
    tokenizer = with_special_tokens_of(text, tokenizer)
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize("file", PLAIN_TEMPLATES, ids=lambda file: file.stem)
def test_the_twin_is_the_one_that_trl_would_take(file, tiny_tokenizer):
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = file.read_text(encoding="utf-8")
    tokenizer, section = (
        own_template(template, tiny_tokenizer),
        DataSection(source="x", prompt_format="chat"),
    )
    twin = twin_of(section, tokenizer)
    if has_generation_markers(template):
        assert twin is None
        return
    try:
        expected = get_training_chat_template(tokenizer)
    except ValueError:  # TRL has none
        expected = None
    assert (twin and twin.text) == expected
    brought = section.model_copy(update={"chat_template": template})
    assert twin_of(brought, tokenizer) is None and chat_template(section, tokenizer) == template
    named = section.model_copy(update={"chat_template": f"trl:{file.stem}"})
    assert twin_of(named, tiny_tokenizer) == twin


# As SmolLM3's own template does it: the newline behind the end token stands in the markers.
NEWLINE_IN_MARKERS = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' }}{% if message.role =="
    " 'assistant' %}{% generation %}{{ message.content + '</s>\n' }}{% endgeneration %}{% else"
    " %}{{ message.content + '</s>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|assistant|>\n' }}{% endif %}"
)


def test_the_newline_in_the_markers_behind_the_end_token_carries_no_loss(tiny_tokenizer):
    [item] = encode_chat([conversation()], tiny_tokenizer, template=NEWLINE_IN_MARKERS)
    assert supervised_text(item, tiny_tokenizer) == ["First\n  answer.</s>", "Second.</s>"]
    assert item.ends and not item.unlike_prompt


MARKED_PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda text: text.replace("<|{{", "<|the {{"), ["<|user|>", "<|the user|>"]),
        (lambda text: text.replace("{% generation %}", "{% generation %}Well: "), ["Well: First"]),
        (lambda text: text.replace("{{ bos_token }}", ""), ["'<s><|user|>", "'<|user|>"]),
    ],
)
def test_a_twin_that_renders_another_text_is_an_error_with_both_texts(
    change, shown, tiny_tokenizer
):
    twin = Twin(Path("some_training.jinja"), change(MARKED))
    rows = [conversation(line=4)]
    with pytest.raises(SettingError) as caught:
        encode_chat(rows, tiny_tokenizer, template=MARKED_PLAIN, twin=twin)
    assert caught.value.key == "data.chat_template" and "rows.jsonl:4: TRL's" in caught.value.what
    for text in shown:
        assert text in "\n".join(caught.value.hints)
    assert "set data.chat_template" in caught.value.hints[-1]
    same = Twin(Path("some_training.jinja"), MARKED)
    [item] = encode_chat(rows, tiny_tokenizer, template=MARKED_PLAIN, twin=same)
    assert supervised_text(item, tiny_tokenizer) == ["First\n  answer.</s>", "Second.</s>"]


def test_a_twin_may_keep_the_thought_that_the_plain_template_leaves_out(tiny_tokenizer):
    folder = TRAINING_TEMPLATES[0].parent
    template = (folder / "deepseek_r1_distill.jinja").read_text(encoding="utf-8")
    tokenizer = own_template(template, tiny_tokenizer)
    twin = twin_of(DataSection(source="x", prompt_format="chat"), tokenizer)
    answer = {"role": "assistant", "content": "<think>\nHmm.\n</think>\n\nFirst."}
    [item] = encode_chat([conversation([TURNS[0], answer])], tokenizer, twin=twin)
    [said] = supervised_text(item, tokenizer)
    assert said == "Hmm.\n</think>\n\nFirst.<｜end▁of▁sentence｜>"  # the prompt began the thought
    assert not item.unlike_prompt and not item.changed
    [item] = encode_chat([conversation(TURNS[:2])], tokenizer, twin=twin)
    assert item.unlike_prompt  # without a thought, the answer does not go on from the prompt


def test_a_brought_template_that_trl_has_a_twin_of_is_told_its_name(tiny_tokenizer):
    template = (TRAINING_TEMPLATES[0].parent / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer = with_special_tokens_of(template, tiny_tokenizer)
    with pytest.raises(DataError, match="renders the first messages differently") as caught:
        encode_chat([conversation()], tokenizer, template=template)
    assert "data.chat_template: trl:qwen3" in caught.value.hints[0]
