from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes_lib.config.sections import DataSection
from recipes_lib.data.prompts import task_prompt
from recipes_lib.data.rows import DataRow, SettingError
from recipes_lib.data.supervision import (
    Supervision,
    check_settings,
    decoded_spans,
    encode,
    plain_backend,
    prompt_ids,
)

BOS, EOS = 1, 2


def task(instruction: str, response: str, context: str = "") -> DataRow:
    return DataRow(
        "f", 1, 1, {"instruction": instruction, "context": context, "response": response}
    )


def pair(prompt: str, completion: str) -> DataRow:
    return DataRow("f", 1, 1, {"prompt": prompt, "completion": completion})


def encode_one(
    example: DataRow,
    tokenizer,
    *,
    prompt_format: str = "dolly",
    special_tokens: str = "text",
    **train,
):
    section = DataSection(source="x", prompt_format=prompt_format, special_tokens=special_tokens)
    [item] = encode(
        [example], Supervision.of(section, {"max_length": 4096} | train, tokenizer), tokenizer
    )
    return item


def supervised_text(item, tokenizer) -> str:
    return tokenizer.decode(
        [int(t) for t in item.labels if t != -100], clean_up_tokenization_spaces=False
    )


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS, TEXTS)
def test_no_prompt_token_carries_loss_and_the_completion_comes_back(
    tiny_tokenizer, instruction, context, response
):
    item = encode_one(task(instruction, response, context), tiny_tokenizer)
    prompt = task_prompt("dolly", instruction, context)
    with plain_backend(tiny_tokenizer, split_special=True):
        encoding = tiny_tokenizer.backend_tokenizer.encode(prompt + response)
    offsets = [*encoding.offsets, (len(prompt + response), len(prompt + response) + 1)]
    for token, label in enumerate(item.labels):
        assert (label != -100) == (offsets[token][1] > len(prompt))
    assert supervised_text(item, tiny_tokenizer).removesuffix("</s>").endswith(response)
    if not item.other_prompt_ids:
        assert supervised_text(item, tiny_tokenizer) == response + "</s>"


def test_tokens_are_bos_text_eos_and_eos_carries_loss(tiny_tokenizer):
    item = encode_one(task("Do.", "Yes."), tiny_tokenizer)
    assert item.ids[0] == BOS and item.ids[-1] == EOS and item.labels[-1] == EOS and item.ends
    assert (item.ids == EOS).sum() == 1


def test_the_whole_text_carries_loss_when_asked(tiny_tokenizer):
    item = encode_one(task("Do.", "Yes."), tiny_tokenizer, completion_only_loss=False)
    assert (item.labels == item.ids).all() and 0 < item.prompt_tokens < len(item.ids)


def test_a_token_across_the_boundary_belongs_to_the_completion(tiny_tokenizer):
    item = encode_one(pair("Answer: th", "e answer"), tiny_tokenizer, prompt_format="raw")
    assert item.other_prompt_ids and supervised_text(item, tiny_tokenizer).endswith(
        "the answer</s>"
    )
    assert not encode_one(
        pair("Answer:", " the"), tiny_tokenizer, prompt_format="raw"
    ).other_prompt_ids


def test_an_empty_completion_leaves_the_end_token_alone(tiny_tokenizer):
    item = encode_one(task("Do.", ""), tiny_tokenizer)
    assert item.supervised == 1 and item.labels[-1] == EOS


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_cuts_ids_and_mask_together(tiny_tokenizer, mode):
    whole = encode_one(task("Do this.", "Yes and no and yes."), tiny_tokenizer)
    cut = encode_one(
        task("Do this.", "Yes and no and yes."),
        tiny_tokenizer,
        max_length=len(whole.ids) - 3,
        truncation_mode=mode,
    )
    part = slice(None, -3) if mode == "keep_start" else slice(3, None)
    assert (cut.ids == whole.ids[part]).all() and (cut.labels == whole.labels[part]).all()
    assert cut.ends == (mode == "keep_end") and cut.tokens_before == len(whole.ids)


def test_a_prompt_that_fills_max_length_leaves_no_loss(tiny_tokenizer):
    item = encode_one(task("Do " * 50, "Yes."), tiny_tokenizer, max_length=16)
    assert len(item.ids) == 16 and item.supervised == 0 and (item.labels == -100).all()


@pytest.mark.parametrize(
    ("strategy", "length"), [("bfd", 16), ("bfd_split", None), ("wrapped", None)]
)
def test_packing_that_splits_rows_itself_gets_them_whole(tiny_tokenizer, strategy, length):
    train = {"packing": True, "packing_strategy": strategy, "max_length": 16}
    assert Supervision.of(DataSection(source="x"), train, tiny_tokenizer).max_length == length


def test_special_tokens_in_the_text_are_text(tiny_tokenizer):
    item = encode_one(task("Say </s> and <s>.", "ok </s> <|user|> done"), tiny_tokenizer)
    assert (item.ids == EOS).sum() == 1 and (item.ids == BOS).sum() == 1
    assert supervised_text(item, tiny_tokenizer) == "ok </s> <|user|> done</s>"


def test_special_tokens_can_be_kept(tiny_tokenizer):
    item = encode_one(task("Do.", "ok </s>"), tiny_tokenizer, special_tokens="keep")
    assert (item.ids == EOS).sum() == 1 and item.ids[
        -1
    ] == EOS  # not appended again, as TRL does not


def test_the_tokenizer_is_left_as_it_was(tiny_tokenizer):
    backend = tiny_tokenizer.backend_tokenizer
    backend.enable_truncation(7)
    try:
        item = encode_one(task("Do.", "ok " * 20), tiny_tokenizer)
        assert len(item.ids) > 7
        assert backend.truncation["max_length"] == 7 and backend.encode_special_tokens is False
    finally:
        backend.no_truncation()


def test_offsets_that_leave_white_space_out_do_not_move_the_boundary(tiny_tokenizer):
    from copy import deepcopy

    from tokenizers import processors

    trimming = deepcopy(tiny_tokenizer)
    trimming.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
        ]
    )
    for response in ("\n\n two lines", " x", "plain", ""):
        plain, trimmed = (
            encode_one(task("Do.", response), tiny_tokenizer),
            encode_one(task("Do.", response), trimming),
        )
        assert (plain.ids == trimmed.ids).all() and (plain.labels == trimmed.labels).all()


def test_completion_only_loss_on_text_rows_is_refused(tiny_tokenizer):
    section = DataSection(source="x", prompt_format="raw")
    with pytest.raises(
        SettingError, match=r"train\.completion_only_loss: true needs prompt and completion"
    ) as caught:
        check_settings(1, section, {"completion_only_loss": True}, tiny_tokenizer)
    assert caught.value.key == "train.completion_only_loss"
    check_settings(1, section, {"completion_only_loss": None}, tiny_tokenizer)


def test_assistant_only_loss_without_chat_is_refused(tiny_tokenizer):
    with pytest.raises(SettingError, match="needs prompt_format chat"):
        check_settings(0, DataSection(source="x"), {"assistant_only_loss": True}, tiny_tokenizer)


def test_text_rows_carry_loss_on_every_token(tiny_tokenizer):
    item = encode_one(
        DataRow("f", 1, 1, {"text": "Once upon"}), tiny_tokenizer, prompt_format="raw"
    )
    assert (item.labels == item.ids).all() and item.prompt_tokens == 0


def test_generation_ids_are_the_prompt_s_training_ids(tiny_tokenizer):
    section = DataSection(source="x")
    item = encode_one(task("Say </s>.", "Yes."), tiny_tokenizer)
    ids = prompt_ids(section, tiny_tokenizer, task_prompt("dolly", "Say </s>."))
    assert ids == item.ids[: len(ids)].tolist() and (item.labels[: len(ids)] == -100).all()


def test_decoded_spans_cover_the_row_and_mark_its_end(tiny_tokenizer):
    item = encode_one(task("Do.", "Yes."), tiny_tokenizer)
    prompt, completion = decoded_spans(tiny_tokenizer, item.ids, item.labels)
    assert prompt == {"text": "<s>### Instruction:\nDo.\n\n### Response:\n", "supervised": False}
    assert completion == {"text": "Yes.</s>", "supervised": True, "end_token": "</s>"}


def test_int32_holds_every_id(tiny_tokenizer):
    item = encode_one(task("Do.", "Yes."), tiny_tokenizer)
    assert item.ids.dtype == np.int32 and item.labels.dtype == np.int32
