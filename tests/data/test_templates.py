"""Every turn of the assistant and its end carry loss, under templates of any kind."""

import pytest
from conversation_samples import FOLDER, MARKED, TURNS, encode_row, learned, tokenizer_with
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes_lib.config.recipe import DataSection
from recipes_lib.data.encoding import prompt_ids
from recipes_lib.data.errors import BadRow
from recipes_lib.data.prompts import chat_template, render_chat, training_template

SECOND = ["Second.</s>"]
BOTH = ["First\n  answer.</s>", *SECOND]
CHAT = DataSection(source="x", prompt_format="chat")


def encode_chat(messages, tokenizer, **keys):
    item = encode_row({"messages": messages}, tokenizer, prompt_format="chat", **keys)
    if isinstance(item, BadRow):
        raise item
    return item


REWRITING = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] if loop.last"
    " or message['role'] == 'user' else '(cut)' }}{{ eos_token }}\n{% endfor %}{% if"
    " add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The prompt ends in a space, which the first word of an answer takes into its token.
SPACED = MARKED.replace("<|assistant|>\n", "<|assistant|> ")
# As SmolLM3's own template does it: the newline behind the end token stands in the markers.
NEWLINE_IN_MARKERS = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' }}{% if message.role =="
    " 'assistant' %}{% generation %}{{ message.content + '</s>\n' }}{% endgeneration %}{% else"
    " %}{{ message.content + '</s>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|assistant|>\n' }}{% endif %}"
)


def test_every_assistant_turn_and_its_end_token_carry_loss(tiny_tokenizer):
    silent = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
    for messages, keys, texts in (
        (TURNS, {}, BOTH),
        (TURNS, {"template": MARKED}, BOTH),
        (TURNS, {"template": NEWLINE_IN_MARKERS}, BOTH),
        (TURNS, {"chat_loss": "last"}, SECOND),
        (TURNS, {"template": MARKED, "chat_loss": "last"}, SECOND),
        (TURNS, {"template": REWRITING, "chat_loss": "last"}, SECOND),
        (silent, {}, SECOND),
        (silent, {"template": MARKED}, SECOND),
        ([*TURNS[:1], {**TURNS[1], "content": "a <|user|> b"}], {}, ["a <|user|> b</s>"]),
    ):
        item = encode_chat(messages, tiny_tokenizer, **keys)
        assert learned(item, tiny_tokenizer) == texts, (messages, keys)
        assert item.end_token == 2 and not item.other_prompt
        assert item.changed == (keys.get("template") == REWRITING)
    whole = encode_chat(TURNS, tiny_tokenizer, train={"completion_only_loss": False})
    assert (whole.labels == whole.ids).all()
    item = encode_chat(TURNS, tiny_tokenizer, system_prompt="Brief.")
    messages = [{"role": "system", "content": "Brief."}, *TURNS]
    ids = tiny_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert item.ids.tolist() == ids


def test_a_template_that_cannot_say_what_is_learned_names_the_row(tiny_tokenizer):
    refusing = "{{ raise_exception('no system messages here') }}"
    silent = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
    last = [*TURNS[:3], {**TURNS[3], "weight": 0}]
    qwen = (FOLDER / "qwen3.jinja").read_text(encoding="utf-8")
    for messages, keys, words, hint in (
        (TURNS, {"template": REWRITING}, "renders earlier messages diff", "{% generation %}"),
        (TURNS, {"template": qwen}, "renders earlier messages diff", "trl:NAME"),
        (TURNS, {"template": refusing}, "refuses the conversation: no system", "another template"),
        (silent, {"train": {"completion_only_loss": False}}, "weight 0: with train", ""),
        (last, {"chat_loss": "last"}, "nothing to train on", ""),
    ):
        with pytest.raises(BadRow, match=words) as caught:
            encode_chat(messages, tiny_tokenizer, **keys)
        assert hint in "\n".join(caught.value.hints)


def test_loss_is_inside_of_what_trl_s_training_templates_mark(tiny_tokenizer):
    of_pictures = {"idefics3_training", "smolvlm_training", "llava_next_training"}
    files = sorted(FOLDER.glob("*_training.jinja"))
    assert len(files) > 20
    for file in files:
        tokenizer = tokenizer_with(file.read_text(encoding="utf-8"), tiny_tokenizer)
        if file.stem in of_pictures:  # a content must be a list of parts
            with pytest.raises(BadRow, match=r"the chat template re(fuses|nders none)"):
                encode_chat(TURNS, tokenizer)
            continue
        item = encode_chat(TURNS, tokenizer)
        last = "".join(learned(encode_chat(TURNS, tokenizer, chat_loss="last"), tokenizer))
        assert item.end_token >= 0 and "Second." in last and "First" not in last, file
        keys = {"return_dict": True, "return_assistant_tokens_mask": True}
        whole = tokenizer.apply_chat_template(TURNS, **keys)
        assert item.ids.tolist() == whole["input_ids"], file
        marked = {index for index, mask in enumerate(whole["assistant_masks"]) if mask}
        assert {*(item.labels != -100).nonzero()[0]} <= marked, file


def test_the_training_template_is_the_one_that_trl_would_take(tiny_tokenizer):
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    for file in sorted({*FOLDER.glob("*.jinja")} - {*FOLDER.glob("*_training.jinja")}):
        template = file.read_text(encoding="utf-8")
        tokenizer = tokenizer_with(template, tiny_tokenizer)
        chosen = training_template(CHAT, tokenizer)
        if has_generation_markers(template):
            assert chosen is None, file
            continue
        try:
            expected = get_training_chat_template(tokenizer)
        except ValueError:  # TRL has none
            expected = None
        assert (chosen and chosen[1]) == expected, file
        brought = CHAT.model_copy(update={"chat_template": template})
        assert training_template(brought, tokenizer) is None
        assert chat_template(CHAT, tokenizer) == template
        named = CHAT.model_copy(update={"chat_template": f"trl:{file.stem}"})
        assert training_template(named, tiny_tokenizer) == chosen, file


def test_a_thought_that_the_prompt_begins_is_learned_without_its_beginning(tiny_tokenizer):
    template = (FOLDER / "deepseek_r1_distill.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_with(template, tiny_tokenizer)
    _, training = training_template(CHAT, tokenizer)
    answer = {"role": "assistant", "content": "<think>\nHmm.\n</think>\n\nFirst."}
    item = encode_chat([TURNS[0], answer], tokenizer, template=training)
    assert learned(item, tokenizer) == ["Hmm.\n</think>\n\nFirst.<｜end▁of▁sentence｜>"]
    assert not item.other_prompt and not item.changed
    assert encode_chat(TURNS[:2], tokenizer, template=training).other_prompt


CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=60, deadline=None)
@given(CHARACTERS, CHARACTERS, st.sampled_from([NEWLINE_IN_MARKERS, REWRITING, MARKED, SPACED]))
def test_a_prompt_s_tokens_are_told_from_the_row_s_as_if_it_were_tokenised_alone(
    tiny_tokenizer, question, answer, template
):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer + "."}]
    tokenizer = tokenizer_with(template, tiny_tokenizer)
    prompt, _ = render_chat(turns[:1], tokenizer, template, prompt=True)
    text, _ = render_chat(turns, tokenizer, template)
    asked = prompt_ids(CHAT, tokenizer, prompt)
    begins = prompt_ids(CHAT, tokenizer, text)[: len(asked)] == asked
    item = encode_chat(turns, tokenizer, template=template)
    assert item.other_prompt == (not begins or not text.startswith(prompt))
