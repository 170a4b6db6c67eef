"""Our token ids and labels are TRL's, token by token, wherever TRL does not lose or inject
anything.
"""

import json
from copy import deepcopy

import pytest
from conversation_samples import MARKED, TURNS
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.prompts import task_prompt

NO_SPLIT = {"method": "none"}


def pairs(rows) -> list[dict[str, str]]:
    prompts = [task_prompt("dolly", row["instruction"], row["context"]) for row in rows]
    return [
        {"prompt": prompt, "completion": row["response"]}
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def ours(recipe, tokenizer) -> list[dict[str, list[int]]]:
    return prepare_data(recipe, tokenizer).train.select_columns(["input_ids", "labels"]).to_list()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_tokenizer", "smollm2_tokenizer"])
def test_two_hundred_dolly_rows_are_equal(
    recipe_for, write_jsonl, trl_rows, request, shared_data, name, monkeypatch
):
    with (shared_data / "dolly" / "dolly-1k-stratified.jsonl").open(encoding="utf-8") as stream:
        dolly = [json.loads(next(stream)) for _ in range(200)]
    tokenizer, path = request.getfixturevalue(name), write_jsonl(dolly)
    monkeypatch.setattr("recipes_lib.data.audit.MOST_UNSUPERVISED", 1.0)
    for train in (
        {"max_length": 1024},
        {"max_length": 100},
        {"max_length": 100, "truncation_mode": "keep_end"},
        {"max_length": 512, "completion_only_loss": False},
    ):
        recipe = recipe_for(path, train=train, split=NO_SPLIT)
        assert ours(recipe, tokenizer) == trl_rows(pairs(dolly), tokenizer, **train), train


def test_made_rows_are_equal_in_the_raw_format(recipe_for, write_jsonl, trl_rows, tiny_tokenizer):
    rows = [{"prompt": f"Q{i}:\n", "completion": f" answer {i}\n\nend "} for i in range(30)]
    recipe = recipe_for(write_jsonl(rows), prompt_format="raw", split=NO_SPLIT)
    assert ours(recipe, tiny_tokenizer) == trl_rows(rows, tiny_tokenizer)
    texts = [{"text": row["prompt"] + row["completion"]} for row in rows]
    recipe = recipe_for(write_jsonl(texts), prompt_format="raw", split=NO_SPLIT)
    assert ours(recipe, tiny_tokenizer) == trl_rows(texts, tiny_tokenizer)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer of Llama-2's kind: spaces as ▁, no pre-tokenisation (so tokens cross the prompt's
    end), byte fallback.
    """
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, show_progress=False, max_token_length=8
    )
    bpe.train_from_iterator(
        ["\nIt is"] * 100
        + [task_prompt("dolly", f"What is {i}?") + f"It is {i}." for i in range(50)],
        trainer,
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_rows_are_equal_for_a_tokenizer_of_llama_2_s_kind(recipe_for, write_jsonl, trl_rows):
    tokenizer = sentencepiece_like()
    starts = ("It is", " \n–é")
    rows = [
        {"instruction": f"What is {i}?", "context": "", "response": f"{starts[i % 2]} {i}. "}
        for i in range(30)
    ]
    recipe = recipe_for(write_jsonl(rows), split=NO_SPLIT)
    assert ours(recipe, tokenizer) == trl_rows(pairs(rows), tokenizer)
    places = prepare_data(recipe, tokenizer).audit.places
    assert places["other_prompt"]  # the case is really there


def test_a_tokenizer_that_appends_the_end_token_by_itself_does_not_get_two(
    recipe_for, write_jsonl, tiny_tokenizer
):
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    rows = [{"instruction": f"What is {i}?", "response": f"It is {i}."} for i in range(9)]
    recipe = recipe_for(write_jsonl(rows), split=NO_SPLIT)
    assert ours(recipe, tokenizer) == ours(recipe, tiny_tokenizer)


def test_conversations_are_equal_to_assistant_only_loss(
    recipe_for, write_jsonl, trl_rows, tiny_tokenizer, monkeypatch
):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", MARKED)
    rows = [
        {"messages": [message | {"content": f"{message['content']} {i}"} for message in TURNS]}
        for i in range(20)
    ]
    recipe = recipe_for(write_jsonl(rows), prompt_format="chat", split=NO_SPLIT)
    assert ours(recipe, tiny_tokenizer) == trl_rows(rows, tiny_tokenizer, assistant_only_loss=True)


def test_assistant_turns_inside_a_prompt_carry_no_loss_as_in_trl(
    recipe_for, write_jsonl, trl_rows, tiny_tokenizer
):
    prompt = [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
    ]
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "A2"}]}] * 4
    recipe = recipe_for(write_jsonl(rows), split=NO_SPLIT, prompt_format="chat")
    for encoded in (ours(recipe, tiny_tokenizer)[0], trl_rows(rows, tiny_tokenizer)[0]):
        learned = tiny_tokenizer.decode([token for token in encoded["labels"] if token != -100])
        assert "A1" in tiny_tokenizer.decode(encoded["input_ids"])
        assert "A2" in learned and "A1" not in learned
