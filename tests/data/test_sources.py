from __future__ import annotations

import json
import time

import pytest

from recipes_lib.config.sections import DataSection
from recipes_lib.core.errors import DataError
from recipes_lib.data.examples import BadRows, SettingError
from recipes_lib.data.rows import read_data
from recipes_lib.data.sources import Source, data_files, listed_sources, load_tables


def source(name, **keys) -> Source:
    return Source(source=str(name), columns={}, **keys)


def test_a_folder_is_read_in_name_order(write_jsonl, tmp_path):
    write_jsonl([{"x": "2"}], "d/b.jsonl")
    write_jsonl([{"x": "1"}], "d/a.jsonl")
    (tmp_path / "d" / "README.md").write_text("x")
    tables = load_tables(source(tmp_path / "d"))
    assert [row["x"] for table in tables for row in table.rows] == ["1", "2"]


def test_test_files_of_a_folder_do_not_become_training_rows(write_jsonl, tmp_path):
    write_jsonl([{"x": "train"}], "d/data/train-00000-of-00001.jsonl")
    write_jsonl([{"x": "test"}], "d/data/test-00000-of-00001.jsonl")
    assert [path.name for path in data_files(tmp_path / "d", "train")] == [
        "train-00000-of-00001.jsonl"
    ]
    with pytest.raises(
        SettingError, match="no file of the split 'validation'; splits: test, train"
    ):
        data_files(tmp_path / "d", "validation")


def test_mixed_schemas_name_the_first_differing_file_and_column(write_jsonl, tmp_path):
    write_jsonl([{"x": "1"}], "d/a.jsonl")
    write_jsonl([{"x": "1"}], "d/b.jsonl")
    path = write_jsonl([{"x": "1", "output": "2"}], "d/c.jsonl")
    with pytest.raises(DataError, match=r"column 'output' is not in .*a\.jsonl") as caught:
        load_tables(source(tmp_path / "d"))
    assert caught.value.file.endswith(path.name)


def test_a_missing_column_in_a_later_file_is_named(write_jsonl, tmp_path):
    write_jsonl([{"x": "1", "y": "1"}], "d/a.jsonl")
    write_jsonl([{"x": "1"}], "d/b.jsonl")
    with pytest.raises(DataError, match=r"column 'y' of .*a\.jsonl is missing"):
        load_tables(source(tmp_path / "d"))


@pytest.mark.parametrize("offline", [True, False])
def test_offline_is_one_line_within_a_second(monkeypatch, tmp_path, offline):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")
    if not offline:  # the network is there but nothing answers
        import datasets  # noqa: F401 - its import is not what is timed here

        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(SettingError) as caught:
        load_tables(source("databricks/databricks-dolly-15k"))
    assert time.monotonic() - start < 1
    assert (
        caught.value.what
        == "offline: put a file at databricks/databricks-dolly-15k/train.jsonl or set data.source"
        " to a path"
    )


def test_a_relative_folder_named_like_a_hub_id_wins(write_jsonl, tmp_path, monkeypatch):
    write_jsonl([{"x": "1"}], "databricks/databricks-dolly-15k/train.jsonl")
    monkeypatch.chdir(tmp_path)
    tables = load_tables(source("databricks/databricks-dolly-15k"))
    assert tables[0].rows == [{"x": "1"}]


def test_a_missing_file_names_a_similar_one(write_jsonl, tmp_path, monkeypatch):
    write_jsonl([{"x": "1"}], "instructions.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError) as caught:
        load_tables(source(tmp_path / "instruction.jsonl"))
    assert "no such file or folder: instruction.jsonl" in caught.value.what
    assert "did you mean instructions.jsonl?" in caught.value.hints


def test_a_folder_without_data_says_which_endings_count(tmp_path):
    with pytest.raises(DataError, match=r"no data file in this folder; known endings: \.jsonl"):
        load_tables(source(tmp_path))


def test_a_cached_hub_data_set_is_used_offline(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "datasets" / "someone___something").mkdir(parents=True)
    seen = {}

    def load(path, subset, **keys):
        seen.update(path=path, subset=subset, **keys)
        return datasets.Dataset.from_list([{"x": "1"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = load_tables(source("someone/something", subset="en", revision="abc"))[0]
    assert table.rows == [{"x": "1"}] and table.file == "someone/something"
    assert seen == {
        "path": "someone/something",
        "subset": "en",
        "split": "train",
        "revision": "abc",
    }


def test_a_mixture_entry_takes_what_it_does_not_say_from_the_section():
    section = DataSection(
        source=[
            "a.jsonl",
            {"source": "b/c", "source_split": "test", "columns": {"response": "answer"}},
        ],
        columns={"id": "key"},
    )
    first, second = listed_sources(section)
    assert (first.source, first.source_split, first.columns) == ("a.jsonl", "train", {"id": "key"})
    assert (second.source_split, second.columns) == ("test", {"id": "key", "response": "answer"})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"source": "a", "max_example": 3}, "unknown key 'max_example'"),
        ({"source": "a", "max_examples": 0}, "max_examples: expected int"),
        ({"source": "a", "max_examples": True}, "max_examples: expected int"),
        ({"subset": "a"}, "names no `source`"),
        (3, "expected a mapping"),
    ],
)
def test_a_wrong_mixture_entry_is_named(entry, words):
    with pytest.raises(SettingError, match=words) as caught:
        listed_sources(DataSection(source=["a.jsonl", entry]))
    assert "data.source[1]" in caught.value.what


def test_an_empty_mixture_is_refused():
    with pytest.raises(SettingError, match="mixture is empty"):
        listed_sources(DataSection(source=[]))


def test_fifteen_thousand_rows_load_in_well_under_a_second(shared_data):
    parts = sorted((shared_data / "dolly").glob("*.part*.jsonl"))
    start = time.process_time()
    tables = [table for part in parts for table in load_tables(source(part))]
    assert sum(len(table.rows) for table in tables) == 15_011
    assert time.process_time() - start < 1.0


def test_json_lines_with_numbers_keep_them_as_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"x": 1, "y": float("nan")}))
    assert load_tables(source(path))[0].rows[0]["x"] == 1


def test_files_of_a_folder_that_are_not_read_are_listed(write_jsonl, tmp_path):
    for name in (
        "all/train.jsonl",
        "all/extra.jsonl",
        "all/test.jsonl",
        "all/more/train-2.jsonl",
        "all/.git/x.jsonl",
    ):
        write_jsonl([{"instruction": "a", "response": "b"}], name)
    for name in ("README.md", "LICENSE", "part2.jsonl.zst", "dataset_info.json"):
        (tmp_path / "all" / name).write_text("x")
    rows = read_data(DataSection(source=str(tmp_path / "all")), BadRows())
    [files] = rows.unread.values()
    assert (
        files == ["extra.jsonl", "more/train-2.jsonl", "part2.jsonl.zst", "test.jsonl"]
        and len(rows) == 1
    )
    assert read_data(DataSection(source=str(tmp_path / "all/train.jsonl")), BadRows()).unread == {}


@pytest.mark.parametrize("encoding", ["latin-7x", "rot13", "hex", "", "a\0"])
def test_an_encoding_that_python_cannot_read_text_with_is_refused(encoding):
    with pytest.raises(SettingError, match="Python knows no text encoding"):
        listed_sources(DataSection(source="a.csv", encoding=encoding))


def test_a_delimiter_is_one_character():
    with pytest.raises(SettingError, match="expected one character, found ', '"):
        listed_sources(DataSection(source="a.csv", delimiter=", "))


@pytest.mark.parametrize("key", ["system_prompt", "chat_template", "chat_loss"])
def test_what_acts_in_chat_alone_is_not_ignored_in_another_format(key):
    assert listed_sources(DataSection(source="a.csv", prompt_format="chat", **{key: "last"}))
    with pytest.raises(
        SettingError, match=f"{key} acts in prompt_format chat alone, not in dolly"
    ) as caught:
        listed_sources(DataSection(source="a.csv", **{key: "last"}))
    assert caught.value.key == f"data.{key}"


def test_a_weight_takes_a_share_of_the_rows_that_max_examples_leaves():
    taken = [
        Source(source="a", columns={}, weight=weight, max_examples=limit).num_taken(101)
        for weight, limit in ((1, None), (0.5, None), (0.5, 20), (3, 20), (2.5, None))
    ]
    assert taken == [101, 50, 10, 20, 101]


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan"), True, "0.5", None])
def test_a_weight_that_is_no_number_above_nought_is_refused(weight):
    with pytest.raises(SettingError, match="weight: expected a number above 0, found") as caught:
        listed_sources(DataSection(source=["a.jsonl", {"source": "b.jsonl", "weight": weight}]))
    assert caught.value.what.startswith("data.source[1].weight: ") and caught.value.hints
