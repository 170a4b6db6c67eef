"""Which rows a step trains on: whole global batches, the same on any number of processes."""

from collections import Counter

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from recipes_lib.training.batches import WholeBatches, make_loader, validation_batches
from recipes_lib.training.sft import FILLER, SupervisedTrainer

ROWS = 54
LENGTHS = [3 + 7 * row % 41 for row in range(ROWS)]
SHAPES = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (4, 1, 2), (1, 4, 2), (2, 2, 2), (1, 2, 4), (2, 1, 4)]


def steps_of(per_device: int, accumulation: int, world: int, epoch: int, **more: object) -> list:
    """The rows of each step of an epoch, dealt out to all ranks."""
    ranks = []
    for rank in range(world):
        batches = WholeBatches(ROWS, per_device, accumulation, 7, rank, world, **more)
        batches.set_epoch(epoch)
        ranks.append([*batches])
        assert len(ranks[-1]) == len(batches)
    steps = len(ranks[0]) // accumulation
    return [
        sorted(
            row
            for batches in ranks
            for batch in batches[step * accumulation : (step + 1) * accumulation]
            for row in batch
        )
        for step in range(steps)
    ]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["random", "by length"])
def test_a_step_has_the_same_rows_on_any_number_of_processes(lengths) -> None:
    for epoch in (0, 1):
        found = [steps_of(*shape, epoch, lengths=lengths) for shape in SHAPES]
        assert all(steps == found[0] for steps in found)
        assert [len(step) for step in found[0]] == [8] * 6


def test_an_epoch_leaves_out_what_fills_no_step_and_each_epoch_other_rows() -> None:
    epochs = [[row for step in steps_of(8, 1, 1, epoch) for row in step] for epoch in range(4)]
    assert all(len(rows) == len({*rows}) == 48 for rows in epochs)
    assert {row for rows in epochs for row in rows} == {*range(ROWS)}
    assert len({tuple(rows) for rows in epochs}) == 4


def test_rows_of_like_length_share_a_step_and_none_is_left_out_for_its_length() -> None:
    kept: Counter[int] = Counter()
    for epoch in range(20):
        for step in steps_of(8, 1, 1, epoch, lengths=LENGTHS):
            kept.update(step)
    assert kept.keys() == {*range(ROWS)} and min(kept.values()) >= 10
    for step in steps_of(8, 1, 1, 0, lengths=LENGTHS):
        lengths = [LENGTHS[row] for row in step]
        assert max(lengths) - min(lengths) < max(LENGTHS) - min(LENGTHS)


def test_without_a_seed_rows_keep_their_order_and_an_error_can_name_the_rows_of_a_step() -> None:
    batches = WholeBatches(10, 2, 2, None)
    assert [*batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert batches.rows_of_step(1) == [4, 5, 6, 7]


def test_validation_rows_are_each_evaluated_once_by_one_rank() -> None:
    rows = Dataset.from_dict({"input_ids": [[7] * length for length in LENGTHS[:11]]})
    rows = rows.add_column("labels", [[1]] * 11)
    assert SupervisedTrainer.row_lengths(rows.shuffle(seed=1)) == [
        len(row["input_ids"]) for row in rows.shuffle(seed=1)
    ]
    seen: list[int] = []
    for rank in range(2):
        filled, batches = validation_batches(rows, FILLER, 4, rank, 2)
        assert len(batches) == 2 and all(len(batch) == 4 for batch in batches)
        seen += [row for batch in batches for row in batch]
    assert sorted(seen) == [*range(16)]
    assert filled[11:]["labels"] == [[-100, -100]] * 5


def test_a_loader_draws_nothing_from_the_random_state_that_dropout_uses() -> None:
    rows = Dataset.from_dict({"input_ids": [[1]] * 4})
    args = TrainingArguments(use_cpu=True, output_dir="unused")

    before = torch.get_rng_state()
    assert len([*make_loader(rows, [[0, 1], [2, 3]], list, args)]) == 2
    assert torch.equal(before, torch.get_rng_state())
