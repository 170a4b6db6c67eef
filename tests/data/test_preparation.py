from __future__ import annotations

import json
from pathlib import Path

import pytest
from conversation_samples import MARKED

from recipes_lib.core.errors import DataError, ExitCode
from recipes_lib.data.audit import describe_template, warnings_of
from recipes_lib.data.examples import SettingError
from recipes_lib.data.preparation import prepare_data
from recipes_lib.data.prompts import Twin


@pytest.fixture
def prepare(recipe_for, tiny_tokenizer):
    def prepare(source, **keys):
        return prepare_data(recipe_for(source, **keys), tiny_tokenizer)

    return prepare


def test_the_data_sets_have_the_columns_that_training_reads(prepare, write_jsonl, tasks):
    data = prepare(write_jsonl(tasks(60)), split={"validation": 0.2, "test": 0.1})
    assert data.train.column_names == ["input_ids", "labels", "example_id"]
    assert len(data.train) + len(data.validation) + len(data.test) == 60
    row = data.train[0]
    assert (
        len(row["input_ids"]) == len(row["labels"])
        and row["labels"][0] == -100
        and row["labels"][-1] == row["input_ids"][-1]
    )


def test_it_is_deterministic_and_json_able(prepare, write_jsonl, tasks):
    path = write_jsonl(tasks(60))
    first, second = prepare(path), prepare(path)
    assert json.dumps(first.audit) == json.dumps(second.audit)
    assert json.dumps(first.splits) == json.dumps(second.splits)
    assert (first.fingerprint, first.prompt_format_hash) == (
        second.fingerprint,
        second.prompt_format_hash,
    )
    assert first.train.to_list() == second.train.to_list()


def test_the_fingerprint_follows_every_used_row(prepare, write_jsonl, tasks):
    rows = tasks(30)
    before = prepare(write_jsonl(rows)).fingerprint
    assert prepare(write_jsonl(rows[::-1])).fingerprint != before
    rows[7]["response"] += " Yes."
    assert prepare(write_jsonl(rows)).fingerprint != before


def test_the_audit_counts_rows_and_tokens(prepare, write_jsonl, tasks):
    data = prepare(write_jsonl(tasks(60)), filters={"categories": ["open_qa", "closed_qa"]})
    audit = data.audit
    assert (
        audit["rows"]["read"] == 60
        and audit["rows"]["filtered"] == {"categories": 20}
        and audit["rows"]["used"] == 40
    )
    assert (
        audit["rows"]["train"]
        == data.splits["train"]["count"]
        == len(data.splits["train"]["ids"])
        == len(data.train)
    )
    total = sum(map(len, data.train["input_ids"])) + sum(map(len, data.validation["input_ids"]))
    assert (
        audit["tokens"]["total"]
        == total
        == audit["prompt_tokens"]["total"] + audit["completion_tokens"]["total"]
    )
    assert audit["supervised_tokens"]["total"] == audit["completion_tokens"]["total"]
    assert audit["end_token_supervised"] == {
        "untruncated_rows": 40,
        "of_which_supervised": 40,
    } and audit["end_tokens"] == {"</s>": 40}
    assert [len(example["spans"]) for example in audit["examples"]] == [2, 2, 2]


def test_all_prompts_too_long_says_how_long_they_are(prepare, write_jsonl):
    rows = [{"instruction": f"{i} " * 200, "response": "b"} for i in range(10, 26)]
    with pytest.raises(
        SettingError,
        match=r"16/16 rows have no supervised token at max_length=16; p95 prompt is \d{3}\n",
    ) as caught:
        prepare(write_jsonl(rows), train={"max_length": 16})
    assert caught.value.exit_code == ExitCode.DATA and caught.value.key == "train.max_length"
    assert caught.value.audit["no_supervised_tokens"]["count"] == 16


def test_rows_without_loss_are_dropped_and_named(prepare, write_jsonl, tasks):
    rows = [*tasks(40), {"instruction": "long " * 300, "response": "b"}]
    data = prepare(write_jsonl(rows), train={"max_length": 200}, split={"method": "none"})
    bare = data.audit["no_supervised_tokens"]
    assert (
        bare["count"] == 1
        and bare["places"][0].endswith("rows.jsonl:41")
        and data.splits["train"]["without_supervision"] == bare["ids"]
    )
    assert len(data.train) == 40 and bare["ids"][0] not in data.train["example_id"]
    assert (
        data.audit["truncated"]["ids"] == bare["ids"]
        and data.audit["truncated"]["lost_end_token"] == 1
    )
    assert any(bare["ids"][0] in line for line in warnings_of(data.audit))


def test_too_many_rows_without_loss_are_refused(prepare, write_jsonl, tasks):
    rows = [*tasks(10), {"instruction": "long " * 300, "response": "b"}]
    with pytest.raises(SettingError, match="1/11 rows have no supervised token") as caught:
        prepare(write_jsonl(rows), train={"max_length": 200})
    assert "5%" in caught.value.hints[0]
    assert (
        len(
            prepare(
                write_jsonl(rows),
                train={"max_length": 200},
                max_unsupervised_fraction=0.1,
                split={"method": "none"},
            ).train
        )
        == 10
    )


def test_empty_completions_are_counted_or_dropped(prepare, write_jsonl, tasks):
    path = write_jsonl([*tasks(20), {"instruction": "a", "response": " "}])
    audit = prepare(path).audit
    assert audit["empty_completions"]["count"] == 1 and any(
        "empty completion" in line for line in warnings_of(audit)
    )
    audit = prepare(path, filters={"drop_empty_completions": True}).audit
    assert (
        audit["rows"]["filtered"] == {"drop_empty_completions": 1}
        and audit["empty_completions"]["count"] == 0
    )


def test_empty_texts_warn_and_are_an_error_when_all_are(prepare, write_jsonl):
    with pytest.raises(SettingError, match="4/4 rows have an empty completion"):
        prepare(write_jsonl([{"text": ""}] * 4), prompt_format="raw")
    assert (
        prepare(
            write_jsonl([{"text": ""}, {"text": "a"}, {"text": "b"}]), prompt_format="raw"
        ).audit["empty_completions"]["count"]
        == 1
    )


def test_injections_are_counted_per_row(prepare, write_jsonl, tasks):
    rows = [
        *tasks(20),
        {"instruction": "What is </s>?", "response": "### Response: [INST] </s> </s>"},
    ]
    audit = prepare(write_jsonl(rows)).audit
    special, markers = audit["special_token_injections"], audit["template_markers"]
    assert (
        special["count"] == {"</s>": 3}
        and special["num_rows"] == 1
        and special["treated_as"] == "text"
    )
    assert markers["count"] == {"### Response:": 1, "[INST]": 1} and list(markers["rows"]) == list(
        special["rows"]
    )


def test_injections_in_chat_act_and_are_warned_about(prepare, write_jsonl, tasks):
    rows = [*tasks(20), {"instruction": "What is </s>?", "response": "A token."}]
    audit = prepare(write_jsonl(rows), prompt_format="chat").audit
    assert audit["special_token_injections"]["treated_as"] == "special tokens"
    assert any("ACTING as special tokens" in line for line in warnings_of(audit))


def test_duplicates_are_reported(prepare, write_jsonl, tasks):
    audit = prepare(
        write_jsonl(
            [*tasks(20), tasks(20)[3], tasks(20)[3] | {"response": "IT IS 6.  that is twice 3."}]
        )
    ).audit
    assert audit["duplicates"]["exact_rows"] == 1 and len(audit["duplicates"]["near_groups"]) == 1
    assert audit["duplicates"]["across_splits"] == []


def test_chat_without_an_end_token_is_refused(prepare, write_jsonl, tasks):
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    with pytest.raises(
        SettingError, match="20/20 rows do not end with a supervised end token"
    ) as caught:
        prepare(write_jsonl(tasks(20)), prompt_format="chat", chat_template=template)
    assert caught.value.key == "data.chat_template"
    assert "rows.jsonl:1, " in caught.value.what and "(17 more)" in caught.value.what


def test_a_turn_end_that_is_not_the_tokenizer_s_eos_is_warned_about(prepare, write_jsonl, tasks):
    template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<unk>{%"
        " endfor %}"
    )
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    audit = prepare(write_jsonl(tasks(20)), prompt_format="chat", chat_template=template).audit
    assert audit["end_tokens"] == {"<unk>": 20} and any(
        "set train.eos_token" in line for line in warnings_of(audit)
    )


def test_white_space_that_a_template_puts_behind_an_answer_does_not_count_as_its_end(
    prepare, write_jsonl, tasks
):
    """With loss on the whole text the line break behind </s> carries loss as well; generation stops
    at </s> all the same.
    """
    data = prepare(
        write_jsonl(tasks(20)), prompt_format="chat", train={"completion_only_loss": False}
    )
    assert data.audit["end_tokens"] == {"</s>": 20}
    assert not [line for line in warnings_of(data.audit) if "turns end with" in line]


def test_a_mixture_keeps_rows_and_ids_apart(prepare, write_jsonl, tasks):
    first = write_jsonl([row | {"id": i} for i, row in enumerate(tasks(10))], "a.jsonl")
    second = write_jsonl(
        [
            {"id": i, "question": row["instruction"] + "?", "response": row["response"]}
            for i, row in enumerate(tasks(10))
        ],
        "b.jsonl",
    )
    source = [
        str(first),
        {"source": str(second), "columns": {"instruction": "question"}, "max_examples": 4},
    ]
    data = prepare(source, split={"method": "none"})
    ids = data.train["example_id"]
    assert (
        len(ids) == 14
        and sum(name.startswith("0:") for name in ids) == 10
        and sum(name.startswith("1:") for name in ids) == 4
    )


def test_the_same_rows_in_two_sources_are_duplicates(prepare, write_jsonl, tasks):
    source = [str(write_jsonl(tasks(10), "a.jsonl")), str(write_jsonl(tasks(10), "b.jsonl"))]
    audit = prepare(source).audit
    assert audit["duplicates"]["exact_rows"] == 10 and audit["duplicates"]["across_splits"] == []


def test_the_same_row_lands_in_the_same_split_for_every_recipe(prepare, write_jsonl, tasks):
    path = write_jsonl(tasks(80))
    first = prepare(path, split={"validation": 0.2}).splits
    for keys in (
        {"prompt_format": "alpaca"},
        {"prompt_format": "chat"},
        {"train": {"max_length": 300, "completion_only_loss": False}},
    ):
        assert prepare(path, split={"validation": 0.2}, **keys).splits == first


def test_max_examples_and_max_tokens_are_applied_and_counted(prepare, write_jsonl, tasks):
    rows = [*tasks(30), {"instruction": "long " * 300, "response": "b"}]
    assert prepare(write_jsonl(rows), filters={"max_tokens": 200}).audit["rows"]["filtered"] == {
        "max_tokens": 1
    }
    assert prepare(write_jsonl(tasks(30)), max_examples=12).audit["rows"]["used"] == 12
    with pytest.raises(SettingError, match="all 31 rows are longer than 2 tokens"):
        prepare(write_jsonl(rows), filters={"max_tokens": 2})


@pytest.mark.parametrize(
    ("categories", "words"),
    [(["poetry"], "no row has the category poetry"), ([], "filters leave none")],
)
def test_filters_that_leave_nothing_are_refused(prepare, write_jsonl, tasks, categories, words):
    with pytest.raises(SettingError, match=words):
        prepare(write_jsonl(tasks(9)), filters={"categories": categories})


def test_no_validation_rows_gives_none(prepare, write_jsonl, tasks):
    data = prepare(write_jsonl(tasks(9)), split={"validation": 0})
    assert data.validation is None and data.test is None and len(data.train) == 9


def test_errors_about_a_key_stand_at_the_recipe_and_errors_about_a_row_at_the_file(
    prepare, write_jsonl
):
    with pytest.raises(DataError) as caught:
        prepare("nowhere.jsonl")
    assert str(caught.value).startswith("recipe.yaml:1: no such file or folder: nowhere.jsonl")
    with pytest.raises(DataError) as caught:
        prepare(write_jsonl([{"instruction": "a", "response": 1}]))
    assert caught.value.file.endswith("rows.jsonl") and caught.value.line == 1


def test_trl_packs_the_prepared_rows(prepare, write_jsonl, tasks):
    from trl import pack_dataset

    data = prepare(
        write_jsonl(tasks(40)), train={"max_length": 256, "packing": True}, split={"method": "none"}
    )
    packed = pack_dataset(data.train.select_columns(["input_ids", "labels"]), 256, "bfd")
    assert len(packed) < 40
    assert sum(map(len, packed["labels"])) == data.audit["tokens"]["total"]


def test_bad_rows_are_left_out_when_asked_and_counted_with_the_reason(prepare, write_jsonl):
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "First."}]
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, turns[1]]} for i in range(20)]
    path = write_jsonl(
        [
            *rows,
            {"messages": turns[:1]},
            {"messages": turns, "history": [["Nought?", "None."]]},
            {"messages": turns[:1]},
        ]
    )
    with path.open("a") as file:
        file.write("{torn\n")
    with pytest.raises(DataError, match="no assistant turn") as caught:
        prepare(path, prompt_format="chat")
    assert "(4 of 24): data.on_bad_row: skip" in str(caught.value)
    audit = prepare(path, prompt_format="chat", on_bad_row="skip").audit
    assert audit["rows"]["read"] == 24 and audit["rows"]["bad"] == 4 and audit["rows"]["used"] == 20
    assert [int(place.rpartition(":")[2]) for place in audit["bad_rows"]["places"]] == [
        21,
        22,
        23,
        24,
    ]
    assert audit["bad_rows"]["reasons"]["no assistant turn"] == 2
    notes = warnings_of(audit)
    assert (
        "4 of 24 rows cannot be used and are left out (data.on_bad_row: skip):" in notes
        and "  2 x no assistant turn" in notes
    )


def test_rows_that_the_reader_and_rows_that_the_template_refuses_are_named_together(
    prepare, write_jsonl
):
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "First."}]
    system = [{"role": "system", "content": "Be brief."}, *turns]
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + MARKED
    )
    path = write_jsonl([{"messages": turns}, {"messages": turns[:1]}, {"messages": system}])
    with pytest.raises(DataError) as caught:
        prepare(path, prompt_format="chat", chat_template=template)
    assert "rows.jsonl:2: no assistant turn" in str(
        caught.value
    ) and "rows.jsonl:3: the chat template refuses" in str(caught.value)


def test_a_file_of_which_no_line_is_a_row_says_what_is_wrong_with_its_lines(prepare, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"instruction": "caf\xe9", "response": "x"}\n' * 3)
    for on_bad_row in ("error", "skip"):
        with pytest.raises(DataError, match="is not UTF-8") as caught:
            prepare(tmp_path / "rows.jsonl", on_bad_row=on_bad_row)
        assert (
            caught.value.line == 1
            and "2 more" in str(caught.value)
            and "on_bad_row" not in str(caught.value)
        )
    assert (
        prepare(tmp_path / "rows.jsonl", encoding="latin-1", split={"method": "none"}).audit[
            "rows"
        ]["used"]
        == 3
    )


def test_unused_columns_and_texts_that_the_template_changes_are_notes(prepare, write_jsonl):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": "Yes."},
            ],
            "score": i,
        }
        for i in range(9)
    ]
    rows[4]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    without_system = MARKED.replace(
        "{% else %}{{ message['content'] }}",
        "{% elif message['role'] == 'user' %}{{ message['content'] }}",
    )
    audit = prepare(write_jsonl(rows), prompt_format="chat", chat_template=without_system).audit
    notes = "\n".join(warnings_of(audit))
    assert (
        "columns that are not used: score" in notes and audit["changed_by_template"]["count"] == 1
    )
    assert (
        "1 rows have a message of which the chat template leaves out or changes something" in notes
        and "rows.jsonl:5" in notes
    )


def test_a_name_in_drop_columns_that_is_not_a_column_is_refused(prepare, write_jsonl, tasks):
    with pytest.raises(SettingError, match="the data has no column 'categry'") as caught:
        prepare(write_jsonl(tasks(9)), drop_columns=["categry"])
    assert caught.value.hints[0] == "did you mean category?"
    assert prepare(write_jsonl(tasks(9)), drop_columns=["category"]).audit["unused_columns"] == {}


def test_the_tokens_are_named_by_a_hash_of_ours_and_not_pickled_whole(
    prepare, write_jsonl, tasks, monkeypatch
):
    def pickled(*args, **keys):
        raise AssertionError(
            "datasets pickles the table, which takes three times the memory of the tokens"
        )

    monkeypatch.setattr("datasets.arrow_dataset.generate_fingerprint", pickled)
    rows = tasks(60)
    first, again = (prepare(write_jsonl(rows)).train._fingerprint for _ in range(2))
    rows[7]["response"] += " Yes."
    assert first == again != prepare(write_jsonl(rows)).train._fingerprint


def test_the_audit_says_what_the_rows_were_rendered_with(
    prepare, write_jsonl, tasks, tiny_tokenizer, monkeypatch
):
    rows = write_jsonl(tasks(20))
    before = prepare(rows, prompt_format="chat")
    assert before.twin is None and describe_template(before.audit) == []
    twin = Twin(Path("tiny_training.jinja"), MARKED)
    own = tiny_tokenizer.chat_template
    monkeypatch.setattr("recipes_lib.data.prompts.trl_twins", lambda: {own: twin})
    data = prepare(rows, prompt_format="chat")
    assert data.train.to_list() == before.train.to_list()  # SmolLM-like: the markers say the same
    assert data.prompt_format_hash == before.prompt_format_hash
    assert data.audit["training_template"] == {"file": "tiny_training.jinja", "sha256": twin.hash}
    [line] = describe_template(data.audit)
    assert "trained through TRL's tiny_training.jinja" in line
    given = prepare(rows, prompt_format="chat", chat_template=own)
    assert given.twin is None and given.audit["training_template"] is None
    other = Twin(twin.file, MARKED.replace("{{ bos_token }}", ""))
    monkeypatch.setattr("recipes_lib.data.prompts.trl_twins", lambda: {own: other})
    with pytest.raises(DataError, match="renders another text than the plain template"):
        prepare(rows, prompt_format="chat")


def test_answers_that_do_not_go_on_from_the_prompt_are_counted(prepare, write_jsonl, tasks):
    thinks = MARKED.replace(
        "{% if add_generation_prompt %}<|assistant|>\n",
        "{% if add_generation_prompt %}<|assistant|>\n<think>",
    )
    rows = tasks(20)
    rows[4]["response"] = "<think>Hmm.</think>Four."
    audit = prepare(write_jsonl(rows), prompt_format="chat", chat_template=thinks).audit
    assert audit["unlike_prompt"]["count"] == 19
    [note] = [line for line in warnings_of(audit) if "does not go on from" in line]
    assert "19 rows" in note and "rows.jsonl:1" in note
    whole = prepare(write_jsonl(rows), prompt_format="chat", chat_template=MARKED).audit
    assert whole["unlike_prompt"]["count"] == 0


def test_rows_whose_last_turn_must_not_be_learned_are_no_question_of_length(prepare, write_jsonl):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    silent = [*turns, turns[0], {**turns[1], "weight": 0}]
    with pytest.raises(
        SettingError, match=r"1/1 rows have nothing to train on: .*weight 0"
    ) as caught:
        prepare(write_jsonl([{"messages": silent}]), prompt_format="chat", chat_loss="last")
    assert caught.value.key == "data.chat_loss" and "rows.jsonl:1" in caught.value.what
