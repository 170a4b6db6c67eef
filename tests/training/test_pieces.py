"""Pieces of a micro-batch hold the same tokens and respect the cap."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipes_lib.training.batches import ROW, filler, split_batch

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=12)


def collate(lengths: list[int], padding_free: bool) -> dict[str, torch.Tensor]:
    rows = [
        {"input_ids": list(range(100 * index + 1, 100 * index + 1 + length))}
        for index, length in enumerate(lengths)
    ]
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)(rows)


@given(lengths=LENGTHS, cap=st.integers(2, 200))
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


@given(lengths=LENGTHS, cap=st.integers(2, 200))
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
