"""Which rows a step trains on and a validation reads, and the loaders that bring them."""

import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments


@dataclass(eq=False)
class WholeBatches(Sampler[list[int]]):
    """The micro-batches of one process, the same rows a step on any number of processes and in a
    resumed run: step k of an epoch has `order[k * G : (k + 1) * G]`, G being the global batch.

    Args:
        rows: how many there are; each epoch leaves out `rows % G` others of them.
        seed: of the order, together with the epoch; None for the order of the rows.
        lengths: tokens of each row, to put rows of like length into one step.
    """

    rows: int
    per_device: int
    accumulation: int
    seed: int | None
    rank: int = 0
    world_size: int = 1
    lengths: list[int] | None = None
    epoch: int = 0

    def __post_init__(self) -> None:
        self.share = self.per_device * self.world_size  # of all processes in one micro-batch
        self.global_batch = self.share * self.accumulation
        self.steps = self.rows // self.global_batch  # in an epoch

    @property
    def batch_sampler(self) -> "WholeBatches":
        """Itself: the Trainer looks for `set_epoch` there, whether it skips batches or not."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own."""
        self.epoch = epoch

    def order(self) -> list[int]:
        """Return the rows of this epoch, cut before grouping: else the shortest are never in it."""
        num_used = self.steps * self.global_batch
        if self.seed is None:
            return list(range(num_used))
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows = torch.randperm(self.rows, generator=draw).tolist()[:num_used]
        if self.lengths is None:
            return rows
        # those of like length in one step, and the steps in random order
        lengths = self.lengths
        by_length = sorted(rows, key=lambda row: -lengths[row])
        grouped: list[int] = []
        for step in torch.randperm(self.steps, generator=draw).tolist():
            start = step * self.global_batch
            grouped += by_length[start : start + self.global_batch]
        return grouped

    def rows_of_step(self, step: int) -> list[int]:
        """Return the rows of a step of this epoch, those of all processes."""
        start = step * self.global_batch
        return self.order()[start : start + self.global_batch]

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.order()
        for start in range(self.rank * self.per_device, len(rows), self.share):
            yield rows[start : start + self.per_device]

    def __len__(self) -> int:
        return self.steps * self.global_batch // self.share


def validation_batches(
    rows: Dataset, filler: Mapping[str, Any], per_device: int, rank: int, world_size: int
) -> tuple[Dataset, WholeBatches]:
    """Return the rows of a validation set, filled up with `filler`, a row without loss, to full
    batches of all processes; and the batches of this one.
    """
    num_missing = -len(rows) % (per_device * world_size)
    if num_missing:
        fillers = Dataset.from_list([dict(filler)] * num_missing, features=rows.features)
        rows = concatenate_datasets([rows, fillers])
    batches = WholeBatches(
        rows=len(rows),
        per_device=per_device,
        accumulation=1,
        seed=None,
        rank=rank,
        world_size=world_size,
    )
    return rows, batches


def make_loader(
    rows: Dataset, batches: WholeBatches, collate: Any, args: TrainingArguments
) -> DataLoader:
    """Return a loader that draws nothing from the random state that dropout uses."""
    num_workers = args.dataloader_num_workers
    prefetch_factor = None  # torch refuses both without workers
    persistent_workers = False
    if num_workers:
        prefetch_factor = args.dataloader_prefetch_factor
        persistent_workers = args.dataloader_persistent_workers
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        persistent_workers=persistent_workers,
        prefetch_factor=prefetch_factor,
        generator=torch.Generator(),
        worker_init_fn=_ignore_sigterm,
    )


def _ignore_sigterm(worker: int) -> None:
    # Slurm sends it to every process, and the step that is being trained needs its rows
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
