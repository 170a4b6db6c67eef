"""Which rows a step trains on, and in which order: the same on any number of processes, and in a
resumed run.

accelerate repeats the first rows of an epoch until every process has a full batch, and drops with
`dataloader_drop_last` what does not fill a micro-batch of each process: both depend on the number
of processes. Here an epoch is filled with rows that carry no loss, or cut to whole steps
(`recipe.batch.rows_per_epoch`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from recipes_lib.training.row_tracking import FILLER, ROW

FILLER_TOKENS = 2


def with_fillers(rows: Dataset, number: int) -> Dataset:
    """Return the rows and `number` more that carry no loss: two tokens of the id 0, with the row
    number `FILLER` where rows have one.
    """
    values = {
        "input_ids": [0] * FILLER_TOKENS,
        "labels": [-100] * FILLER_TOKENS,
        "seq_lengths": [FILLER_TOKENS],
        ROW: FILLER,
    }
    fillers = {name: [values[name]] * number for name in rows.features}
    return concatenate_datasets([rows, Dataset.from_dict(fillers, features=rows.features)])


def with_training_filler(rows: Dataset) -> Dataset:
    """Return the rows and one filler behind them, which a sampler may hand out any number of times;
    packed rows get a row number too.
    """
    if ROW not in rows.features:
        numbers = Dataset.from_dict(
            {ROW: [None] * len(rows)}, features=Features({ROW: Value("int64")})
        )
        rows = concatenate_datasets([rows.flatten_indices(), numbers], axis=1)
    return with_fillers(rows, 1)


class EpochRows(Sampler[int]):
    """The rows of an epoch in the order of another sampler, cut or filled to a length.

    Args:
        order: over the real rows.
        length: rows to hand out.
        filler: the row to fill up with.
    """

    def __init__(self, order: Any, length: int, filler: int) -> None:
        self.order, self.length, self.filler = order, length, filler

    def __iter__(self) -> Iterator[int]:
        missing = max(self.length - len(self.order), 0)
        return itertools.chain(
            itertools.islice(self.order, self.length), itertools.repeat(self.filler, missing)
        )

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own."""
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)


class LengthGroups(LengthGroupedSampler):
    """transformers' groups of like length, drawn from the seed and the epoch.

    Its own draws come from the random state of dropout, which differs between processes and in a
    resumed run: from the second epoch on each process would cut the data in another way.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has groups of its own."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return iter(super().__iter__())


class RebalancedRows(BatchRebalanceSampler):
    """transformers' batches of like cost, where a last step with fewer rows than micro-batches is
    filled with rows without loss.
    """

    def _yield_global_batch(self, batch_indices: list[int]) -> Iterator[list[int]]:
        filler = len(self.lengths)
        if len(batch_indices) < self.effective_batch_size:
            batch_indices = batch_indices[: self.remainder] + [filler] * (
                len(batch_indices) - self.remainder
            )
        lengths = [
            FILLER_TOKENS if index == filler else self.lengths[index] for index in batch_indices
        ]
        yield from self._assign(batch_indices, lengths)[self.rank]
