from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes_lib.config.sections import SplitSection
from recipes_lib.data.examples import BadRows, Example, SettingError
from recipes_lib.data.rows import first_in_hash_order, identify, named_uniquely
from recipes_lib.data.splits import SPLITS, split_rows


def rows_of(texts: list[str], ids: list[str] | None = None) -> list[Example]:
    examples = []
    for i, text in enumerate(texts):
        fields = {"instruction": text, "response": "r"}
        explicit = ids[i] if ids else None
        examples.append(Example("f", i + 1, i + 1, fields, explicit_id=explicit))
        identify(examples[-1], 0)
    return named_uniquely(examples, BadRows())


def contents(rows: list[Example], indices) -> set[bytes]:
    return {rows[index].content for index in indices}


def sides(rows: list[Example], **keys) -> dict[str, str]:
    splits = split_rows(rows, SplitSection(**keys))
    return {rows[index].id: name for name in SPLITS for index in splits.rows[name]}


@pytest.mark.parametrize(
    ("validation", "test", "sizes"),
    [
        (0.1, 0.2, (10_507, 1_501, 3_003)),
        (0.1, 0.1, (12_008, 1_501, 1_502)),
        (0.1, 0.0, (13_509, 1_502, 0)),
    ],
)
def test_published_splits_have_the_published_sizes(validation, test, sizes):
    splits = split_rows(
        rows_of([str(i) for i in range(15_011)]),
        SplitSection(method="published", validation=validation, test=test),
    )
    assert tuple(len(splits.rows[name]) for name in SPLITS) == sizes


def test_published_steps_are_the_original_s():
    for validation, test, batch, steps in (
        (0.1, 0.2, 32, 987),
        (0.1, 0.1, 32, 1_128),
        (0.1, 0.1, 64, 564),
    ):
        splits = split_rows(
            rows_of([str(i) for i in range(15_011)]),
            SplitSection(method="published", validation=validation, test=test),
        )
        assert 3 * -(-len(splits.rows["train"]) // batch) == steps


def test_the_published_split_repeats_two_calls_of_train_test_split():
    import datasets

    rows = datasets.Dataset.from_dict({"i": range(100)})
    first = rows.train_test_split(test_size=0.3, seed=42)
    second = first["test"].train_test_split(test_size=2 / 3, seed=42)
    splits = split_rows(
        rows_of([str(i) for i in range(100)]),
        SplitSection(method="published", validation=0.1, test=0.2, seed=42),
    )
    for name, expected in (
        ("train", first["train"]),
        ("validation", second["train"]),
        ("test", second["test"]),
    ):
        assert set(splits.rows[name]) == set(expected["i"])


@given(st.permutations([f"row {i}" for i in range(60)]))
def test_the_hash_split_does_not_depend_on_order(texts):
    def train(texts):
        rows = rows_of(texts)
        return contents(
            rows, split_rows(rows, SplitSection(validation=0.2, test=0.2)).rows["train"]
        )

    assert train(texts) == train(sorted(texts))


def test_the_hash_split_of_a_row_does_not_depend_on_other_rows():
    many = rows_of([f"{i}" for i in range(400)], [f"{i}" for i in range(400)])
    whole, part = sides(many), sides(many[::2])
    assert all(part[name] == whole[name] for name in part)
    assert 20 < sum(side == "validation" for side in whole.values()) < 60


def test_another_seed_gives_another_split():
    many = rows_of([f"{i}" for i in range(200)])
    assert sides(many, seed=1) != sides(many, seed=2)


def test_a_larger_validation_part_keeps_the_test_rows():
    many = rows_of([f"{i}" for i in range(400)])
    small, large = sides(many, test=0.1, validation=0.1), sides(many, test=0.1, validation=0.3)
    assert {n for n, s in small.items() if s == "test"} == {
        n for n, s in large.items() if s == "test"
    }


def test_exact_duplicates_never_straddle_a_hash_split():
    many = rows_of([f"{i // 2}" for i in range(400)])
    splits = split_rows(many, SplitSection(validation=0.3, test=0.2))
    assert len(splits.exact_groups) == 200 and splits.across == [] and splits.moved == []


def test_duplicates_with_different_ids_are_moved_into_training():
    many = rows_of([f"{i // 2}" for i in range(400)], [f"id{i}" for i in range(400)])
    splits = split_rows(many, SplitSection(validation=0.3))
    assert splits.across and splits.moved
    train = contents(many, splits.rows["train"])
    assert not train & contents(many, splits.rows["validation"])
    assert {many[index].id for index in splits.rows["train"]} >= set(splits.moved)


def test_the_published_split_only_reports_duplicates():
    splits = split_rows(
        rows_of([f"{i // 2}" for i in range(400)]),
        SplitSection(method="published", validation=0.25, test=0.25),
    )
    assert len(splits.rows["train"]) == 200 and splits.across and splits.moved == []


def test_rows_that_differ_in_case_or_space_are_reported():
    splits = split_rows(
        rows_of(["What is it?", "what  is it?", "Else", "Else"]), SplitSection(validation=0)
    )
    assert [len(group) for group in splits.near_groups] == [2]
    assert [len(group) for group in splits.exact_groups] == [2]


def test_a_small_data_set_still_has_a_validation_row():
    splits = split_rows(rows_of(["a", "b", "c", "d"]), SplitSection(validation=0.01))
    assert len(splits.rows["validation"]) == 1 and len(splits.rows["train"]) == 3


def test_none_trains_on_every_row():
    splits = split_rows(rows_of(["a", "b"]), SplitSection(method="none"))
    assert len(splits.rows["train"]) == 2 and not splits.rows["validation"]


def test_fractions_that_leave_nothing_are_refused():
    with pytest.raises(SettingError, match="leaves no training rows"):
        split_rows(rows_of(["a", "b"]), SplitSection(validation=0.5, test=0.5))


def test_the_first_rows_in_hash_order_fall_on_all_sides():
    many = rows_of([f"{i}" for i in range(2_000)])
    chosen = first_in_hash_order(many, 400, seed=42)
    assert len(chosen) == 400 and list(chosen) == sorted(chosen)
    backwards = rows_of([f"{i}" for i in range(2_000)][::-1])
    assert contents(backwards, first_in_hash_order(backwards, 400, seed=42)) == contents(
        many, chosen
    )
    some = [many[index] for index in chosen]
    assert 20 < len(split_rows(some, SplitSection()).rows["validation"]) < 70
    assert len(first_in_hash_order(many, None, seed=42)) == 2_000
