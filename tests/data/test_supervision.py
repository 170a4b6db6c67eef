"""Text pairs: which tokens carry loss, what is cut, and which settings cannot act."""

import numpy as np
import pytest
from conversation_samples import encode_row, learned
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes_lib.config.recipe import DataSection
from recipes_lib.data.encoding import Supervision, decoded_spans
from recipes_lib.data.errors import SettingError
from recipes_lib.data.prompts import task_prompt

BOS, EOS = 1, 2


def encode_task(tokenizer, instruction, response, context="", **train):
    fields = {"instruction": instruction, "context": context, "response": response}
    return encode_row(fields, tokenizer, train=train)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS, TEXTS)
def test_the_completion_carries_loss_and_comes_back(tiny_tokenizer, instruction, context, response):
    item = encode_task(tiny_tokenizer, instruction, response, context)
    prompt = task_prompt("dolly", instruction, context)
    keys = {"split_special_tokens": True, "return_offsets_mapping": True}
    offsets = tiny_tokenizer(prompt + response, **keys)["offset_mapping"]
    for label, (_, end) in zip(item.labels, offsets, strict=False):
        assert label != -100 or end <= len(prompt)
    assert "".join(learned(item, tiny_tokenizer)).removesuffix("</s>").endswith(response)
    if not item.other_prompt:
        assert learned(item, tiny_tokenizer) == [response + "</s>"]


def test_tokens_are_bos_text_eos_and_eos_carries_loss(tiny_tokenizer):
    item = encode_task(tiny_tokenizer, "Do.", "Yes.")
    assert item.ids[0] == BOS and item.ids[-1] == EOS and item.labels[-1] == item.end_token == EOS
    assert (item.ids == EOS).sum() == 1
    assert item.ids.dtype == np.int32 and item.labels.dtype == np.int32
    prompt, completion = decoded_spans(tiny_tokenizer, item.ids, item.labels)
    assert prompt == ("<s>### Instruction:\nDo.\n\n### Response:\n", False)
    assert completion == ("Yes.</s>", True)
    empty = encode_task(tiny_tokenizer, "Do.", "")
    assert empty.supervised == 1 and empty.labels[-1] == EOS


def test_a_token_across_the_boundary_belongs_to_the_completion(tiny_tokenizer):
    pair = {"prompt": "Answer: th", "completion": "e answer"}
    item = encode_row(pair, tiny_tokenizer, prompt_format="raw")
    assert item.other_prompt and learned(item, tiny_tokenizer)[0].endswith("the answer</s>")
    pair = {"prompt": "Answer:", "completion": " the"}
    assert not encode_row(pair, tiny_tokenizer, prompt_format="raw").other_prompt


def test_truncation_cuts_ids_and_mask_together(tiny_tokenizer):
    whole = encode_task(tiny_tokenizer, "Do this.", "Yes and no and yes.")
    for mode, part in (("keep_start", slice(None, -3)), ("keep_end", slice(3, None))):
        train = {"max_length": len(whole.ids) - 3, "truncation_mode": mode}
        cut = encode_task(tiny_tokenizer, "Do this.", "Yes and no and yes.", **train)
        assert (cut.ids == whole.ids[part]).all() and (cut.labels == whole.labels[part]).all()
        assert (cut.end_token == EOS) == (mode == "keep_end")
        assert cut.tokens_before == len(whole.ids)
    item = encode_task(tiny_tokenizer, "Do " * 50, "Yes.", max_length=16)
    assert len(item.ids) == 16 and item.supervised == 0 and (item.labels == -100).all()


def test_special_tokens_in_the_text_are_text(tiny_tokenizer):
    item = encode_task(tiny_tokenizer, "Say </s> and <s>.", "ok </s> <|user|> done")
    assert (item.ids == EOS).sum() == 1 and (item.ids == BOS).sum() == 1
    assert learned(item, tiny_tokenizer) == ["ok </s> <|user|> done</s>"]


def test_settings_that_would_not_act_are_refused(tiny_tokenizer):
    section = DataSection(source="x")
    with pytest.raises(SettingError, match="needs prompt_format chat"):
        Supervision.of(section, {"assistant_only_loss": True}, tiny_tokenizer)
    with pytest.raises(SettingError, match="a fast tokenizer"):
        Supervision.of(section, {}, object())
    train = {"packing": True, "packing_strategy": "bfd_split", "max_length": 16}
    assert Supervision.of(section, train, tiny_tokenizer).max_length is None  # TRL splits rows
