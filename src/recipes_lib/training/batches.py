"""Which rows a step trains on: the same on any number of processes, and in a resumed run.

An epoch is shuffled by seed and cut to whole global batches. accelerate would repeat rows until
every process has a full batch, and would make the rows of a step depend on the number of processes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

FILLER = {"input_ids": [0, 0], "labels": [-100, -100]}  # a row without loss


class WholeBatches(Sampler[list[int]]):
    """The micro-batches of one process: step k of an epoch has the rows
    `order[k * G : (k + 1) * G]` on any number of processes, G being the global batch.

    Args:
        rows: how many there are; each epoch leaves out `rows % G` others of them.
        seed: of the order, together with the epoch; None for the order of the rows.
        lengths: tokens of each row, to put rows of like length into one step.
    """

    def __init__(
        self,
        rows: int,
        per_device: int,
        accumulation: int,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
        lengths: list[int] | None = None,
    ) -> None:
        self.rows, self.per_device, self.seed, self.lengths = rows, per_device, seed, lengths
        self.share = per_device * world_size  # of all processes in one micro-batch
        self.first = rank * per_device
        self.global_batch = self.share * accumulation
        self.whole = rows // self.global_batch * self.global_batch
        self.epoch = 0

    @property
    def batch_sampler(self) -> WholeBatches:
        """Itself: the Trainer looks for `set_epoch` there, whether it skips batches or not."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own."""
        self.epoch = epoch

    def order(self) -> list[int]:
        """Return the rows of this epoch, cut before grouping: else the shortest are never in it."""
        if self.seed is None:
            return list(range(self.whole))
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows = torch.randperm(self.rows, generator=draw).tolist()[: self.whole]
        if self.lengths is None or not rows:
            return rows
        lengths, size = self.lengths, self.global_batch
        rows.sort(key=lambda row: -lengths[row])
        steps = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [row for step in torch.randperm(len(steps), generator=draw) for row in steps[step]]

    def rows_of_step(self, step: int) -> list[int]:
        """Return the rows of a step of this epoch, those of all processes."""
        return self.order()[step * self.global_batch : (step + 1) * self.global_batch]

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.order()
        for start in range(self.first, len(rows), self.share):
            yield rows[start : start + self.per_device]

    def __len__(self) -> int:
        return self.whole // self.share


def row_lengths(rows: Dataset) -> list[int]:
    """Return the tokens of each row, read from arrow's offsets."""
    return pyarrow.compute.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_pylist()


def make_loader(rows: Dataset, batches: Any, collate: Any, args: TrainingArguments) -> DataLoader:
    """Return a loader that draws nothing from the random state that dropout uses."""
    workers = args.dataloader_num_workers
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        persistent_workers=bool(workers and args.dataloader_persistent_workers),
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        generator=torch.Generator(),
        worker_init_fn=_ignore_sigterm,
    )


def _ignore_sigterm(worker: int) -> None:
    # Slurm sends it to every process, and the step that is being trained needs its rows
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def validation_batches(
    rows: Dataset, per_device: int, rank: int, world_size: int
) -> tuple[Dataset, list[list[int]]]:
    """Return the rows, filled up to full batches of all processes, and the batches of one."""
    if missing := -len(rows) % (per_device * world_size):
        filler = Dataset.from_list([FILLER], features=rows.features)
        rows = concatenate_datasets([rows, *[filler] * missing])
    starts = range(rank * per_device, len(rows), per_device * world_size)
    return rows, [list(range(start, start + per_device)) for start in starts]
