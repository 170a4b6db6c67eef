"""The rows of an epoch: which ones, in which order, on any number of processes; pieces of a
micro-batch hold the same tokens and respect the cap.
"""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, SequentialSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipes_lib.config.batch import rows_per_epoch
from recipes_lib.training.batches import (
    ROW,
    EpochRows,
    LengthGroups,
    RebalancedRows,
    RowTrackingCollator,
    filler,
    passes_of,
    split_batch,
    with_fillers,
    with_training_filler,
)

LENGTHS = [5, 9, 2, 7, 3, 8, 4, 6, 1, 11, 12, 10, 13]


def padded(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)
    ids = [
        example["input_ids"] + [0] * (longest - len(example["input_ids"])) for example in examples
    ]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}


def test_a_filler_stands_in_no_batch_with_other_rows_and_alone_it_is_a_batch_without_rows() -> None:
    rows = Dataset.from_dict({"input_ids": [[7, 7, 7]], "labels": [[7, 7, 7]], ROW: [0]})
    real, filler = with_training_filler(rows)
    collate = RowTrackingCollator(padded)
    assert collate([filler, real, filler])["input_ids"].tolist() == [[7, 7, 7]]
    assert collate([real, filler])[ROW].tolist() == [0]
    alone = collate([filler, filler])
    assert alone["input_ids"].shape == (1, 2) and alone[ROW].tolist() == []


def test_packed_rows_are_told_from_fillers_though_they_have_no_number() -> None:
    packed = Dataset.from_dict(
        {"input_ids": [[7, 7, 7]], "labels": [[7, 7, 7]], "seq_lengths": [[1, 2]]}
    )
    real, filler = with_training_filler(packed)
    collate = RowTrackingCollator(padded)
    assert ROW not in collate([real]) and collate([filler])[ROW].tolist() == []
    assert filler["seq_lengths"] == [2]


def test_validation_rows_are_filled_in_number() -> None:
    rows = Dataset.from_dict({"input_ids": [[7, 7, 7]], "labels": [[7, 7, 7]]})
    filled = with_fillers(rows, 3)
    assert filled["labels"][:] == [[7, 7, 7], *[[-100, -100]] * 3]
    assert filled["input_ids"][:] == [[7, 7, 7], *[[0, 0]] * 3]  # an id that every vocabulary has


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_steps_of_an_epoch_have_the_same_rows_on_any_number_of_processes(
    drop_last: bool,
) -> None:
    from accelerate.data_loader import BatchSamplerShard

    rows = Dataset.from_dict({"row": list(range(26))})
    epochs = []
    for processes in (1, 2, 3):
        shape = {"per_device": 2, "accumulation": 6 // processes, "world_size": processes}
        length = rows_per_epoch(len(rows), **shape, drop_last=drop_last)
        batches = DataLoader(
            rows, batch_size=2, sampler=EpochRows(SequentialSampler(rows), length, filler=26)
        ).batch_sampler
        shards = [
            list(BatchSamplerShard(batches, processes, rank)) if processes > 1 else list(batches)
            for rank in range(processes)
        ]
        assert len({len(shard) for shard in shards}) == 1
        each = shape["accumulation"]
        steps = [
            [row for shard in shards for batch in shard[at : at + each] for row in batch]
            for at in range(0, len(shards[0]), each)
        ]
        epochs.append([sorted(row for row in step if row != 26) for step in steps])
    assert epochs[0] == epochs[1] == epochs[2]
    assert [len(step) for step in epochs[0]] == ([12, 12] if drop_last else [12, 12, 2])


def test_an_epoch_says_its_length_filled_or_cut() -> None:
    assert [
        len(EpochRows(SequentialSampler(range(26)), length, filler=26)) for length in (24, 30)
    ] == [24, 30]


def test_length_groups_depend_on_the_seed_and_the_epoch_and_not_on_the_random_state() -> None:
    one, other = LengthGroups(4, LENGTHS, seed=7), LengthGroups(4, LENGTHS, seed=7)
    first = list(one)
    torch.rand(5)
    assert list(other) == first and sorted(first) == list(range(len(LENGTHS)))
    one.set_epoch(1)
    assert list(one) != first


@pytest.mark.parametrize("rank", [0, 1])
def test_whole_steps_of_rebalanced_batches_are_those_of_transformers(rank: int) -> None:
    shape = {
        "effective_batch_size": 12,
        "dp_size": 2,
        "grad_accum": 2,
        "rank": rank,
        "drop_last": True,
    }
    lengths = [
        2 ** (row % 9) for row in range(24)
    ]  # unlike enough that batches have unlike numbers of rows
    assert list(RebalancedRows(lengths, **shape)) == list(BatchRebalanceSampler(lengths, **shape))


def test_a_last_step_of_rebalanced_batches_repeats_no_row() -> None:
    ranks = [
        RebalancedRows(LENGTHS, 12, dp_size=3, grad_accum=2, seed=1, rank=rank, drop_last=False)
        for rank in range(3)
    ]
    handed_out = [row for sampler in ranks for batch in sampler for row in batch]
    assert sorted(row for row in handed_out if row < len(LENGTHS)) == list(range(len(LENGTHS)))
    assert handed_out.count(len(LENGTHS)) == 5  # six micro-batches, one example


# ---- Pieces of a micro-batch ----

SOME_LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=12)


def collate(lengths: list[int], padding_free: bool) -> dict[str, torch.Tensor]:
    rows = [
        {"input_ids": list(range(100 * index + 1, 100 * index + 1 + length))}
        for index, length in enumerate(lengths)
    ]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
    return RowTrackingCollator(collator)(rows)


@given(lengths=SOME_LENGTHS, cap=st.integers(2, 200))
def test_padded_pieces_hold_every_row_once_and_stay_under_the_cap(
    lengths: list[int], cap: int
) -> None:
    batch = collate(lengths, padding_free=False)
    pieces = split_batch(batch, cap)
    assert [row[row > 0].tolist() for piece in pieces for row in piece["input_ids"]] == [
        row[row > 0].tolist() for row in batch["input_ids"]
    ]
    assert all(
        piece["input_ids"].numel() <= cap or len(piece["input_ids"]) == 1 for piece in pieces
    )
    assert sum(int((piece["labels"] != -100).sum()) for piece in pieces) == int(
        (batch["labels"] != -100).sum()
    )


@given(lengths=SOME_LENGTHS, cap=st.integers(2, 200))
def test_flattened_pieces_are_what_the_collator_would_have_made_of_their_rows(
    lengths: list[int], cap: int
) -> None:
    batch = collate(lengths, padding_free=True)
    pieces = split_batch(batch, cap)
    assert (
        torch.cat([piece["input_ids"] for piece in pieces], 1).tolist()
        == batch["input_ids"].tolist()
    )
    assert torch.cat([piece["labels"] for piece in pieces], 1).tolist() == batch["labels"].tolist()
    whole = collate(lengths, padding_free=True)
    if len(pieces) == 1:
        assert all(
            torch.equal(torch.as_tensor(pieces[0][key]), torch.as_tensor(whole[key]))
            for key in whole
        )
    for piece in pieces:
        assert piece["cu_seq_lens_q"][-1] == piece["input_ids"].shape[1]
        assert piece["input_ids"].shape[1] <= cap or len(piece["cu_seq_lens_q"]) == 2


@pytest.mark.parametrize("padding_free", [False, True])
def test_only_rows_without_padding_share_a_pass_with_those_of_another_micro_batch(
    padding_free: bool,
) -> None:
    batches = [collate(lengths, padding_free) for lengths in ([3, 4], [30, 2], [5])]
    nothing = filler(batches[0])
    passes = passes_of([batches[0], nothing, *batches[1:]], 40)
    shapes = [tuple(one["input_ids"].shape) for one in passes]
    assert shapes == ([(1, 39), (1, 5)] if padding_free else [(2, 4), (1, 30), (1, 2), (1, 5)])
    assert sum(len(one["supervised"]) for one in passes) == 3 + 4 + 30 + 2 + 5 - 5
    (alone,) = passes_of([nothing, nothing], 40)
    assert alone["input_ids"].shape == (1, 2) and not alone[ROW].numel()


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_filler_has_the_keys_of_a_batch_and_no_loss(padding_free: bool) -> None:
    batch = collate([3, 4], padding_free)
    piece = filler(batch)
    assert piece.keys() == {*batch.keys(), ROW}
    assert int((piece["labels"] != -100).sum()) == 0 and not piece[ROW].numel()
    assert {tuple(piece[key].shape) for key in ("input_ids", "labels")} == {(1, 2)}


def test_flattened_pieces_are_as_full_as_the_cap_allows() -> None:
    """A long example beside short ones costs its own length there, and not the longest of all as in
    a padded batch.
    """
    pieces = split_batch(collate([30, 2, 2, 2, 4], padding_free=True), 40)
    assert [piece["input_ids"].shape[1] for piece in pieces] == [40]
