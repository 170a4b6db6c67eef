"""From files and a recipe to the rows that train: what is used, held out, refused, warned of and
kept for the next start.
"""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conversation_samples import MARKED

from recipes_lib.config.recipe import DataSection, SplitSection, trl_templates
from recipes_lib.core.errors import DataError, ExitCode
from recipes_lib.data import prepare as preparing
from recipes_lib.data.errors import SettingError
from recipes_lib.data.prepare import prepare_data
from recipes_lib.data.prompts import (
    chat_template,
    generation_prompt,
    template_date,
    training_template,
)
from recipes_lib.data.rows import DataRow
from recipes_lib.data.splits import split_rows

NO_SPLIT = {"method": "none"}
TURNS = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "First."}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test's prepared rows."""
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def prepare(recipe_for, tiny_tokenizer):
    def prepare(source, **keys):
        return prepare_data(recipe_for(source, **keys), tiny_tokenizer)

    return prepare


@pytest.fixture
def audit_of(prepare, write_jsonl):
    """What the audit names and says of rows."""

    def audit_of(rows, **keys):
        audit = prepare(write_jsonl(rows), **keys).audit
        return audit.places, "\n".join(audit.warnings)

    return audit_of


def test_the_data_sets_have_the_columns_that_training_reads(prepare, write_jsonl, tasks):
    data = prepare(write_jsonl(tasks(60)), split={"validation": 0.2, "test": 0.1})
    assert data.train.column_names == ["input_ids", "labels", "example_id"]
    parts = data.train, data.validation, data.test
    assert sum(map(len, parts)) == 60
    row = data.train[0]
    assert len(row["input_ids"]) == len(row["labels"]) and row["labels"][0] == -100
    assert row["labels"][-1] == row["input_ids"][-1]
    total = sum(len(ids) for part in parts for ids in part["input_ids"])
    assert data.audit.tokens["row, as trained"]["total"] == total
    assert data.audit.end_tokens == {"</s>": 60}
    assert data.audit.rows["train"] == data.splits["train"]["count"] == len(data.train)
    data = prepare(write_jsonl(tasks(9)), split={"validation": 0})
    assert data.validation is None and data.test is None and len(data.train) == 9


def test_a_mixture_never_trains_on_rows_that_one_of_its_sources_holds_out_alone(
    prepare, write_jsonl, tasks
):
    first = write_jsonl([{**row, "id": i} for i, row in enumerate(tasks(200))], "x.jsonl")
    other = [{"id": i, "instruction": f"Name {i}.", "response": "A"} for i in range(200)]
    second = write_jsonl(other, "y.jsonl")
    split = {"validation": 0.1, "test": 0.1}
    alone = prepare(first, split=split)
    held_out = {*map(str, alone.validation["input_ids"]), *map(str, alone.test["input_ids"])}
    assert len(held_out) > 20
    for source in ([str(first), str(second)], [str(second), str(first)]):
        train = prepare(source, split=split).train
        assert not held_out & {*map(str, train["input_ids"])}


def test_the_side_of_a_row_depends_on_nothing_but_its_content(prepare, write_jsonl, tasks):
    split = {"validation": 0.2}
    whole = prepare(write_jsonl(tasks(80)), split=split).splits
    for keys in ({"prompt_format": "alpaca"}, {"prompt_format": "chat"}):
        assert prepare(write_jsonl(tasks(80)), split=split, **keys).splits == whole
    held_out = {*whole["validation"]["ids"]}
    more = prepare(write_jsonl(tasks(80)), split={**split, "test": 0.15}).splits
    assert {*more["validation"]["ids"]} == held_out
    assert {*more["test"]["ids"]} < {*whole["train"]["ids"]}  # a later test split
    turned = prepare(write_jsonl(tasks(80)[::-1]), split=split).splits
    assert {*turned["validation"]["ids"]} == held_out
    part = prepare(write_jsonl(tasks(40)), split=split).splits
    assert {*part["validation"]["ids"]} <= held_out
    # equal rows fall on one side, whatever their ids
    rows = [{**row, "id": i} for i, row in enumerate([*tasks(100), *tasks(100)])]
    data = prepare(write_jsonl(rows), split=split)
    assert not {*map(str, data.train["input_ids"])} & {*map(str, data.validation["input_ids"])}
    assert len(data.audit.places["duplicates"]) == 100
    assert len(prepare(write_jsonl(tasks(4)), split={"validation": 0.01}).validation) == 1


def test_the_published_split_repeats_two_calls_of_train_test_split():
    import datasets

    first = datasets.Dataset.from_dict({"i": range(100)}).train_test_split(test_size=0.3, seed=42)
    second = first["test"].train_test_split(test_size=2 / 3, seed=42)
    found = published(100, 0.1, 0.2)
    parts = {"train": first["train"], "validation": second["train"], "test": second["test"]}
    for name, part in parts.items():
        assert {row.line for row in found[name]} == {*part["i"]}
    assert [len(part) for part in published(15_011, 0.1, 0.2).values()] == [10_507, 1_501, 3_003]
    with pytest.raises(SettingError, match="published needs validation"):
        published(100, 0.1, 0)


def published(num_rows, validation, test):
    rows = [DataRow("f", number, {}) for number in range(num_rows)]
    section = SplitSection(method="published", validation=validation, test=test, seed=42)
    return split_rows(rows, section)


def test_ids_are_labels_that_stay_unique(prepare, write_jsonl, tasks):
    first = write_jsonl([{**row, "id": i} for i, row in enumerate(tasks(5))], "a.jsonl")
    ids = ["x", "x", None, 3, "", "x#2"]
    rows = [{**row, "id": id} for row, id in zip(tasks(10)[4:], ids, strict=True)]
    second = write_jsonl(rows, "b.jsonl")
    labels = prepare([str(first), str(second)], split=NO_SPLIT).train["example_id"]
    assert len({*labels}) == 11 and {"0", "3", "3#2", "x", "x#2"} < {*labels}


def test_weights_take_a_share_of_a_source_or_repeat_its_training_rows_alone(prepare, write_jsonl):
    source = []
    for name, count, weight in (("half", 40, 0.25), ("more", 20, 2.5)):
        rows = [
            {"id": f"{name}{i}", "instruction": f"{name} {i}?", "response": f"{i}"}
            for i in range(count)
        ]
        source.append({"source": str(write_jsonl(rows, f"{name}.jsonl")), "weight": weight})
    data = prepare(source, split={"validation": 0.1})
    assert data.audit.rows["used"] == 10 + 20
    times = Counter(data.train["example_id"])
    repeated = [count for name, count in times.items() if name.startswith("more")]
    assert {*repeated} == {2, 3} and sum(repeated) == round(2.5 * len(repeated))
    assert not {*data.validation["example_id"]} & {*times}
    assert prepare([source[1], {**source[0], "weight": 0.001}]).audit.rows["used"] == 20 + 1


def test_a_part_of_a_weight_is_rounded_to_the_nearest_number_of_rows(prepare, write_jsonl, tasks):
    source = [{"source": str(write_jsonl(tasks(5))), "weight": 1.75}]
    assert len(prepare(source, split=NO_SPLIT).train) == 9  # 5 and round(3.75)


def test_max_examples_takes_rows_of_the_training_and_the_validation_side_alike(
    prepare, write_jsonl, tasks
):
    rows = prepare(write_jsonl(tasks(100)), split={"validation": 0.5}, max_examples=20).audit.rows
    assert min(rows["train"], rows["validation"]) > 4


def test_all_bad_rows_are_named_at_once_or_left_out_when_asked(prepare, write_jsonl):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    keys = {"prompt_format": "chat", "chat_template": refusing + MARKED}
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, TURNS[1]]} for i in range(20)]
    bad = [
        {"messages": TURNS[:1]},
        {"messages": TURNS, "tools": "weather"},
        {"messages": TURNS[:1]},
        {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]},
    ]
    path = write_jsonl([*rows, *bad])
    with path.open("a") as file:
        file.write("{torn\n")
    with pytest.raises(DataError, match="roles from message 0 on") as caught:
        prepare(path, **keys)
    said = str(caught.value)
    assert caught.value.line == 21
    for words in (
        "22: column 'tools': not JSON",
        "23: roles from message 0 on",
        "24: the chat template refuses",
        "25: the row: not JSON",
    ):
        assert f"rows.jsonl:{words}" in said
    assert "(5 of 25): data.on_bad_row: skip" in said
    audit = prepare(path, **keys, on_bad_row="skip").audit
    assert (audit.rows["read"], audit.rows["bad"], audit.rows["used"]) == (25, 5, 20)
    assert len(audit.bad_rows) == 5
    assert "5 of 25 rows cannot be used" in "\n".join(audit.warnings)


def test_a_misspelt_template_argument_is_named_in_the_recipe_and_in_a_row(prepare, write_jsonl):
    template = "{{ 'think' if enable_thinking }}" + MARKED
    rows = [{"messages": TURNS, "chat_template_kwargs": {"enable_thinking": True}}] * 3
    misspelt = {"messages": TURNS, "chat_template_kwargs": {"enable_thinkng": True}}
    keys = {"prompt_format": "chat", "chat_template": template, "split": NO_SPLIT}
    assert len(prepare(write_jsonl(rows), **keys).train) == 3
    with pytest.raises(DataError, match="does not read 'enable_thinkng'") as caught:
        prepare(write_jsonl([*rows, misspelt]), **keys)
    assert caught.value.line == 4 and "did you mean enable_thinking?" in str(caught.value)
    with pytest.raises(SettingError, match=r"data\.chat_template_kwargs: .*'thinking'"):
        prepare(write_jsonl(rows), **keys, chat_template_kwargs={"thinking": True})


def test_data_that_cannot_teach_is_refused_with_its_numbers(prepare, write_jsonl, tasks):
    long = {"instruction": "long " * 300, "response": "b"}
    endless = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    for rows, keys, key, words in (
        ([*tasks(10), long], {"train": {"max_length": 200}}, "train.max_length", "1/11 rows"),
        (
            *(tasks(9), {"prompt_format": "chat", "chat_template": endless}),
            *("data.chat_template", "9/9 rows: no supervised end token"),
        ),
    ):
        with pytest.raises(SettingError, match=words) as caught:
            prepare(write_jsonl(rows), **keys)
        assert caught.value.key == key and caught.value.exit_code == ExitCode.DATA


def test_long_rows_are_cut_or_left_out_counted_and_named(prepare, write_jsonl, tasks):
    path = write_jsonl([*tasks(30), {"instruction": "long " * 300, "response": "b"}])
    data = prepare(path, train={"max_length": 200}, split=NO_SPLIT)
    [bare] = data.audit.places["no_supervised_tokens"]
    assert bare.endswith("rows.jsonl:31") and bare in "\n".join(data.audit.warnings)
    assert data.audit.places["truncated"] == data.audit.places["lost_end"] == [bare]
    assert len(data.train) == data.splits["train"]["count"] == 30
    rows = prepare(path, filters={"max_tokens": 200}).audit.rows
    assert rows["used"] == 30 and rows["too_long"] == 1
    assert prepare(path, max_examples=12).audit.rows["used"] == 12
    with pytest.raises(SettingError, match=r"(?s)0 rows are left .*max_tokens"):
        prepare(path, filters={"max_tokens": 2})


def test_empty_completions_and_special_tokens_are_warned_of_with_their_places(audit_of, tasks):
    rows = tasks(20)
    rows[6]["response"] = ""
    rows[8]["response"] = "### Response: [INST] </s> </s>"
    places, said = audit_of(rows)
    assert len(places["empty_completions"]) == len(places["special_tokens"]) == 1
    assert "1 of 20 rows: an empty completion" in said and "rows.jsonl:7" in said
    assert "read as text" in said and "rows.jsonl:9" in said
    assert "ACTING as such" in audit_of(rows, prompt_format="chat")[1]


def test_a_row_that_does_not_begin_as_the_model_is_asked_is_named(audit_of, tasks):
    pairs = [{"prompt": f"What is {i}?\nAnswer: ", "completion": "the answer"} for i in range(20)]
    thoughts = tasks(20)
    thoughts[4]["response"] = "<think>Hmm.</think>Four."
    space = MARKED.replace("<|assistant|>\n", "<|assistant|> ")
    thinks = MARKED.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>{% endif %}")
    for rows, number, keys in (
        (tasks(20), 0, {}),
        (pairs, 20, {"prompt_format": "raw"}),
        (tasks(20), 20, {"prompt_format": "chat", "chat_template": space}),
        (thoughts, 19, {"prompt_format": "chat", "chat_template": thinks}),
    ):
        places, said = audit_of(rows, **keys)
        assert len(places["other_prompt"]) == number
        assert (f"{number} of {len(rows)} rows: do not begin with" in said) == bool(number)


def test_what_a_template_changes_or_ends_otherwise_is_warned_of(audit_of, tasks):
    ends = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<unk>{% endfor %}"
    ends += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    _, said = audit_of(tasks(20), prompt_format="chat", chat_template=ends)
    assert "set train.eos_token" in said
    other = "{% elif message['role'] == 'user' %}{{ message['content'] }}"
    other = MARKED.replace("{% else %}{{ message['content'] }}", other)
    rows = [{"messages": [TURNS[0], {**TURNS[1], "content": f"{i}."}]} for i in range(9)]
    rows[4]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    places, said = audit_of(rows, prompt_format="chat", chat_template=other)
    assert len(places["changed_by_template"]) == 1 and "rows.jsonl:5" in said


def test_a_date_that_a_template_prints_is_the_recipe_s_or_the_day_the_run_was_created(
    recipe_for, tiny_tokenizer, write_jsonl, tasks
):
    dated = "{{ strftime_now('%d %B %Y') }}\n" + MARKED
    keys = {"prompt_format": "chat", "chat_template": dated, "split": NO_SPLIT}
    recipe = recipe_for(write_jsonl(tasks(9)), **keys, template_date="2026-11-28")
    data = prepare_data(recipe, tiny_tokenizer)
    assert "28 November 2026" in tiny_tokenizer.decode(data.train[0]["input_ids"])
    assert "28 November 2026" in generation_prompt(recipe.data, tiny_tokenizer, TURNS[:1])
    assert "2026-11-28" in "\n".join(data.audit.notes)
    section = recipe_for("x", **keys).data
    for changed, date in (
        ({}, "2020-01-02"),
        ({"template_date": "2021-01-02"}, "2021-01-02"),
        ({"chat_template": MARKED}, None),
    ):
        asked = section.model_copy(update=changed)
        assert template_date(asked, tiny_tokenizer, "2020-01-02") == date
    assert template_date(section, tiny_tokenizer, None) > "2026-01-01"


def test_a_second_start_reads_the_rows_that_the_first_one_kept(
    prepare, write_jsonl, tasks, cache, monkeypatch, capfd
):
    from datasets import Dataset

    rows = Dataset.from_list(tasks(60))
    for module in ("prepare", "sources"):
        monkeypatch.setattr(f"recipes_lib.data.{module}.hub_data_set", lambda source: rows)
    for source in (write_jsonl(tasks(60)), "somebody/rows"):
        first = prepare(source, split={"test": 0.1})
        with monkeypatch.context() as patch:
            patch.setattr(preparing, "_prepare", None)  # nothing is read or tokenised again
            again = prepare(source, split={"test": 0.1})
        for name in ("splits", "fingerprint", "prompt_format_hash", "audit"):
            assert getattr(again, name) == getattr(first, name)
        for name in ("train", "validation", "test"):
            assert getattr(again, name).to_list() == getattr(first, name).to_list()
    assert len([*cache.iterdir()]) == 2 and not capfd.readouterr().err


def test_two_that_prepare_the_same_rows_at_once_write_them_once(
    prepare, write_jsonl, tasks, cache, monkeypatch
):
    import datasets

    save, path, written = datasets.DatasetDict.save_to_disk, write_jsonl(tasks(20)), []
    with ThreadPoolExecutor() as pool:
        others = []

        def save_late(self, folder):
            written.append(folder)
            others.append(pool.submit(prepare, path))
            time.sleep(1)
            save(self, folder)

        monkeypatch.setattr(datasets.DatasetDict, "save_to_disk", save_late)
        first = prepare(path)
        (other,) = others
        assert other.result().train.to_list() == first.train.to_list()
    assert len(written) == len([*cache.iterdir()]) == 1


def test_whatever_decides_the_rows_makes_them_anew(prepare, write_jsonl, tasks, cache):
    prepare(write_jsonl(tasks(60)))
    rows = tasks(60)
    rows[7]["response"] = rows[7]["response"].replace("14", "15")  # as long as it was
    for keys in ({}, {"train": {"max_length": 99}}, {"prompt_format": "alpaca"}):
        prepare(write_jsonl(rows), **keys)
    assert len([*cache.iterdir()]) == 4


def test_the_training_version_of_a_template_is_found_by_the_one_that_a_run_saved():
    """A run saves its template with the date in it."""
    asked = DataSection(source="x", prompt_format="chat", template_date="2026-11-28")
    plain = trl_templates()["trl:gptoss"].read_text("utf-8")
    of_base = SimpleNamespace(chat_template=plain)
    of_run = SimpleNamespace(chat_template=chat_template(asked, of_base))
    assert "strftime_now" not in of_run.chat_template
    found = training_template(asked, of_base)
    assert found is not None and training_template(asked, of_run) == found


def test_a_conversation_is_tokenised_once(prepare, write_jsonl, tiny_tokenizer, monkeypatch):
    texts = []
    tokenise = type(tiny_tokenizer)._encode_plus

    def counted(self, text, *args, **keys):
        texts.append(text)
        return tokenise(self, text, *args, **keys)

    monkeypatch.setattr(type(tiny_tokenizer), "_encode_plus", counted)
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, TURNS[1]]} for i in range(30)]
    keys = {"prompt_format": "chat", "chat_template": MARKED, "split": NO_SPLIT}
    assert len(prepare(write_jsonl(rows), **keys).train) == 30
    assert len(texts) == len(rows) + 1  # and what every prompt ends with, once
