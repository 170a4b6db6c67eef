"""Pairs of answers: every shape of rows becomes one prompt and two answers, and their tokens are
those that the model is asked with.
"""

import json
from pathlib import Path

import pytest
from conversation_samples import MARKED, tokenizer_with

from recipes_lib.config.recipe import DPO, DataSection, trl_templates
from recipes_lib.core.errors import DataError
from recipes_lib.data.encoding import Supervision
from recipes_lib.data.encoding_pairs import encode_pair
from recipes_lib.data.errors import BadRow, BadRows
from recipes_lib.data.leaks import EvalText, find_leaks
from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.prompts import generation_prompt, render_chat
from recipes_lib.data.reading import read_data, train_rows
from recipes_lib.data.rows import DataRow

NO_SPLIT = {"method": "none"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [said("user", "What is 2 plus 2?")]
GOOD = [said("assistant", "It is 4.")]
BAD = [said("assistant", "It is 5, I think.")]
TURNS = [*ASKED, said("assistant", "Four."), said("user", "Sure?")]
SYSTEM = [said("system", "Be short."), *ASKED]
TOOLS = [{"name": "add", "parameters": {"type": "object"}}]

# What files hold -> the messages of the prompt.
SHAPES = {
    "texts": ({"prompt": "What is 2 plus 2?", "chosen": "It is 4.", "rejected": "It is 5."}, ASKED),
    "whole conversations": ({"chosen": ASKED + GOOD, "rejected": ASKED + BAD}, ASKED),
    "several turns": ({"chosen": TURNS + GOOD, "rejected": TURNS + BAD}, TURNS),
    "with a system message": ({"chosen": SYSTEM + GOOD, "rejected": SYSTEM + BAD}, SYSTEM),
    "the prompt's text beside them": (  # UltraFeedback binarized, Tulu's mixtures
        {"prompt": ASKED[0]["content"], "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        ASKED,
    ),
    "a prompt of messages": ({"prompt": TURNS, "chosen": GOOD, "rejected": BAD}, TURNS),
    "a prompt of messages, and answers as texts": (
        {"prompt": ASKED, "chosen": "It is 4.", "rejected": "It is 5."},
        ASKED,
    ),
    "a prompt that the conversations repeat": (
        {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        ASKED,
    ),
    "answers alone as messages": (
        {"prompt": "What is 2 plus 2?", "chosen": GOOD, "rejected": BAD},
        ASKED,
    ),
    "one text of turns": (  # HH-RLHF
        {
            "chosen": "\n\nHuman: What is 2 plus 2?\n\nAssistant: It is 4.",
            "rejected": "\n\nHuman: What is 2 plus 2?\n\nAssistant: It is 5.",
        },
        ASKED,
    ),
    "an instruction": (
        {"instruction": "What is 2 plus 2?", "chosen": "It is 4.", "rejected": "It is 5."},
        ASKED,
    ),
    "a system column and tools": (
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "system": "Be short.", "tools": TOOLS},
        SYSTEM,
    ),
}

REFUSED = {
    "one is text": ({"prompt": "a", "chosen": "b", "rejected": GOOD}, "one is text"),
    "same": ({"prompt": "a", "chosen": "b", "rejected": "b "}, "are the same"),
    "same messages": ({"chosen": ASKED + GOOD, "rejected": ASKED + GOOD}, "are the same"),
    "empty": ({"prompt": "a", "chosen": "b", "rejected": "  "}, "rejected: the answer is empty"),
    "null": ({"prompt": "a", "chosen": "b", "rejected": None}, "expected text, found None"),
    "they differ from the first turn on": (
        {"chosen": ASKED + GOOD, "rejected": [said("user", "Other?"), *BAD]},
        "chosen: expected one answer behind what both share, found user, assistant",
    ),
    "another prompt": (
        {"prompt": "Who?", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        "not what the conversations ask",
    ),
    "no prompt": ({"chosen": GOOD, "rejected": BAD}, "share no prompt"),
    "texts without a prompt": ({"chosen": "Yes.", "rejected": "No."}, "a text without a prompt"),
    "the user speaks last": (
        {"chosen": ASKED + GOOD + ASKED, "rejected": ASKED + BAD + ASKED},
        "found assistant, user",
    ),
}


@pytest.fixture
def read(write_jsonl):
    """The pairs of rows, or the reasons why they cannot be used."""

    def read(rows, **keys):
        section = DataSection(source=str(write_jsonl(rows)), **{"prompt_format": "chat"} | keys)
        bad = BadRows()
        return read_data(section, bad, DPO).rows, bad

    return read


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_every_shape_are_one_prompt_and_two_answers(read, tiny_tokenizer, shape):
    values, messages = SHAPES[shape]
    ((row,), bad) = read([values])
    assert not bad
    section = DataSection(source="x", prompt_format="chat", chat_loss="last")
    tokenizer = tokenizer_with(trl_templates()["trl:qwen2_5"].read_text(), tiny_tokenizer)
    settings = Supervision.of(section, {"max_length": 4096}, tokenizer)
    pair = encode_pair(row, settings, tokenizer, tokenizer.chat_template)
    columns = {name: tokenizer.decode(ids) for name, ids in pair.columns.items()}
    tools = {"tools": json.loads(row.fields["tools"])} if "tools" in row.fields else {}
    asked, _ = render_chat(messages, tokenizer, tokenizer.chat_template, tools, prompt=True)
    assert columns["prompt_ids"] == asked
    assert columns["chosen_ids"] == "It is 4.<|im_end|>"  # and not the newline behind it
    assert columns["rejected_ids"].startswith("It is 5")
    assert ("add" in asked) == bool(tools)


@pytest.mark.parametrize("shape", REFUSED)
def test_pairs_that_prefer_nothing_are_named_with_their_line(read, shape):
    values, why = REFUSED[shape]
    rows, bad = read([SHAPES["whole conversations"][0], values])
    assert len(rows) == 1 and why in bad[0].what and bad[0].line == 2


def test_other_formats_read_texts_and_no_format_reads_rows_of_another_stage(
    read, write_jsonl, tiny_tokenizer
):
    values = {"instruction": "Add 2 and 2.", "input": "", "chosen": "4", "rejected": "5, perhaps"}
    for prompt_format in ("dolly", "alpaca"):
        ((row,), _) = read([values], prompt_format=prompt_format)
        section = DataSection(source="x", prompt_format=prompt_format)
        settings = Supervision.of(section, {}, tiny_tokenizer)
        pair = encode_pair(row, settings, tiny_tokenizer)
        prompt = generation_prompt(section, tiny_tokenizer, [said("user", "Add 2 and 2.")])
        assert tiny_tokenizer.decode(pair.columns["prompt_ids"]).endswith(prompt)
        assert tiny_tokenizer.decode(pair.columns["chosen_ids"]).startswith("4")
        assert pair.columns["rejected_ids"][-1] == tiny_tokenizer.eos_token_id
    ((row,), _) = read([{"prompt": "a", "chosen": "b", "rejected": "c"}], prompt_format="raw")
    assert row.fields == {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match="expected prompt") as caught:
        read([{"prompt": "a", "completion": "b"}])
    assert "stage sft" in caught.value.hints[-1]
    section = DataSection(source=str(write_jsonl([values])), prompt_format="dolly")
    with pytest.raises(DataError) as caught:
        read_data(section, BadRows())
    assert "stage: dpo" in caught.value.hints[-1]


def test_a_template_that_renders_two_prompts_and_a_pair_cut_to_nothing_are_refused(tiny_tokenizer):
    fields = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
    row = DataRow("rows.jsonl", 7, fields)
    section = DataSection(source="x", prompt_format="chat", chat_loss="last")
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'user' %}"
        "{{ messages[-1]['content'] | length }} {% endif %}{{ m['content'] }}{% if m['role'] =="
        " 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    settings = Supervision.of(section, {"max_length": 64}, tiny_tokenizer)
    with pytest.raises(BadRow, match="renders"):
        encode_pair(row, settings, tiny_tokenizer, template)
    settings = Supervision.of(section, {"max_length": 3}, tiny_tokenizer)
    with pytest.raises(BadRow, match=r"max_length: 3 leaves no token .* the prompt has"):
        encode_pair(row, settings, tiny_tokenizer, tiny_tokenizer.chat_template or MARKED)
    long = [said("assistant", "It is " + "very " * 30 + end) for end in ("good", "bad")]
    row = DataRow("rows.jsonl", 7, {"prompt": ASKED, "chosen": long[:1], "rejected": long[1:]})
    settings = Supervision.of(section, {"max_length": 40}, tiny_tokenizer)
    with pytest.raises(BadRow, match=r"the same tokens up to train\.max_length"):
        encode_pair(row, settings, tiny_tokenizer, tiny_tokenizer.chat_template or MARKED)


def pair_rows(count: int) -> list[dict[str, str]]:
    """Pairs of `count` prompts, three of each."""
    rows = []
    for number in range(count * 3):
        question = f"What is {number // 3} plus {number // 3}?"
        answer = f"It is {2 * (number // 3)}{'!' * (number % 3)}"
        rows.append({"prompt": question, "chosen": answer, "rejected": f"{answer} Or {number}."})
    return rows


@pytest.fixture
def of_pairs(recipe_for, write_jsonl):
    """A recipe of stage dpo that reads rows, without a split unless it is given."""

    def of_pairs(rows, **keys):
        return recipe_for(
            write_jsonl(rows), stage=DPO, **{"prompt_format": "chat", "split": NO_SPLIT} | keys
        )

    return of_pairs


def test_all_pairs_of_a_prompt_are_on_one_side_of_the_split(of_pairs, tiny_tokenizer):
    rows = pair_rows(30)
    rows[1]["prompt"] = [said("user", rows[1]["prompt"])]  # in another shape
    rows[1]["chosen"] = [said("assistant", rows[1]["chosen"])]
    rows[1]["rejected"] = [said("assistant", rows[1]["rejected"])]
    recipe = of_pairs(rows, split={"validation": 0.2, "test": 0.2})
    data = prepare_data(recipe, tiny_tokenizer)
    prompts = [
        {tuple(ids) for ids in part["prompt_ids"]}
        for part in (data.train, data.validation, data.test)
    ]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 30
    assert len(data.train) + len(data.validation) + len(data.test) == 90
    assert data.train.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "example_id"]


def test_the_audit_counts_pairs_and_says_which_answers_are_longer(of_pairs, tiny_tokenizer):
    rows = [*pair_rows(8), {"prompt": "a", "chosen": "b", "rejected": "b"}]
    recipe = of_pairs(rows, on_bad_row="skip")
    audit = prepare_data(recipe, tiny_tokenizer).audit
    assert list(audit.tokens) == ["prompt", "chosen", "rejected"]
    assert (audit.rows["read"], audit.rows["used"], audit.rows["bad"]) == (25, 24, 1)
    assert "1 x chosen and rejected are the same" in "\n".join(audit.notes)
    longer = [line for line in audit.warnings if "DPO may learn to write shorter" in line]
    assert longer and f"rejected {audit.tokens['rejected']['median']}" in longer[0]
    longest = audit.tokens["prompt"]["max"] + audit.tokens["chosen"]["max"]
    recipe.train = {"max_length": longest + 1}  # the newline; it cuts rejected answers alone
    places = prepare_data(recipe, tiny_tokenizer).audit.places
    assert 0 < len(places["truncated"]) == len(places["lost_end"])
    assert not places["without_end_token"] and not places["no_supervised_tokens"]
    recipe.data = recipe.data.model_copy(update={"on_bad_row": "error"})
    with pytest.raises(DataError, match="are the same") as caught:
        prepare_data(recipe, tiny_tokenizer)
    assert caught.value.line == 25 and "rows.jsonl" in str(caught.value.file)


def test_pairs_whose_answers_are_cut_are_counted_and_train(of_pairs, tiny_tokenizer):
    rows = pair_rows(8)
    for row in rows[:3]:  # both answers, the chosen one, the rejected one
        row["chosen"] += " And so on." * 40
        row["rejected"] += " And on." * 40
    rows[1]["rejected"] = "No."
    rows[2]["chosen"] = "Yes."
    data = prepare_data(of_pairs(rows, train={"max_length": 96}), tiny_tokenizer)
    places = {name: len(rows) for name, rows in data.audit.places.items()}
    assert (places["truncated"], places["lost_end"], places["without_end_token"]) == (3, 3, 0)
    assert len(data.train) == 24


def test_the_hash_of_tokens_says_where_an_answer_begins(of_pairs, tiny_tokenizer):
    """The same tokens in a row, divided between prompt and answers in another way."""
    divided = [("a b", " c", " d"), ("a", " b c", " d")]
    hashes, columns = [], []
    for prompt, chosen, rejected in divided:
        rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]
        data = prepare_data(of_pairs(rows, prompt_format="raw"), tiny_tokenizer)
        row = data.train[0]
        columns.append(row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"])
        hashes.append(data.tokens_hash)
    assert columns[0] == columns[1] and hashes[0] != hashes[1]


def test_leaks_are_found_in_the_prompt_and_in_both_answers(of_pairs):
    text = "A sentence of the evaluation that holds more than twelve words, as they say, all told."
    rows = pair_rows(4)
    for number, field in ((0, "prompt"), (4, "chosen"), (8, "rejected")):
        rows[number][field] = f"{text} {rows[number][field]}"
    leaks = find_leaks(train_rows(of_pairs(rows)), {"suite": [EvalText("q1", "question", text)]})[
        "suite"
    ]
    assert leaks.leaked_rows == 3
    assert [leak.place.rpartition(":")[2] for leak in leaks.found] == ["1", "5", "9"]
