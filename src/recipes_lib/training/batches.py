"""Which rows a step trains on, in which order, and in how many forward passes: the same on any
number of processes, and in a resumed run.

accelerate repeats the first rows of an epoch until every process has a full batch, and
`dataloader_drop_last` drops by micro-batches of each process. Here an epoch is filled with rows
that carry no loss, or cut to whole steps (`config.batch.rows_per_epoch`).

The rows of a step go forward and backward in passes: its micro-batches, or under a cap on tokens
(`run.max_tokens_per_micro_batch`, or what a GPU has room for) rows without padding cut anew as full
as the cap allows, and padded micro-batches cut into pieces. The loss is a sum over the tokens of
the step, so only the order of float sums changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from recipes_lib.training.loss import supervised_places

Batch = dict[str, Any]
"""What a collator makes of examples, or one example: tensors or lists by name."""
ROW = "example_row"
SUPERVISED = "supervised"
FILLER = -1
"""The row number of a row without loss."""
FILLER_TOKENS = 2


def with_fillers(rows: Dataset, number: int) -> Dataset:
    """Return the rows and `number` more that carry no loss."""
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
    packed rows get a row number.
    """
    if ROW not in rows.features:
        numbers = Dataset.from_dict(
            {ROW: [None] * len(rows)}, features=Features({ROW: Value("int64")})
        )
        rows = concatenate_datasets([rows.flatten_indices(), numbers], axis=1)
    return with_fillers(rows, 1)


class EpochRows(Sampler[int]):
    """The rows of an epoch in the order of another sampler, cut to `length` or filled up with the
    row `filler`.
    """

    def __init__(self, order: Any, length: int, filler: int) -> None:
        self.order, self.length, self.filler = order, length, filler

    def __iter__(self) -> Iterator[int]:
        rows = itertools.chain(self.order, itertools.repeat(self.filler))
        return itertools.islice(rows, self.length)

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own."""
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)


class LengthGroups(LengthGroupedSampler):
    """transformers' groups of like length, drawn from the seed and the epoch: its own draws come
    from dropout's random state, which differs between processes and in a resumed run.
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
    """transformers' batches of like cost, with rows without loss where a last step has too few."""

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


# ---- Which rows are in a batch ----


class RowTrackingCollator:
    """Wraps a collator: hands the row numbers on as a tensor, so that a loss that is not finite can
    name its examples, and adds where the supervised tokens are.
    """

    def __init__(self, collate: Callable[[list[Batch]], Batch]) -> None:
        self.collate = collate

    def __call__(self, examples: list[Batch]) -> Batch:
        """Collate, without fillers where there are other rows; packed rows carry no row number, and
        a batch of a filler an empty list.
        """
        real = [example for example in examples if example.get(ROW) != FILLER]
        rows = [example[ROW] for example in real if example.get(ROW) is not None]
        batch = self.collate(
            [
                {key: value for key, value in example.items() if key != ROW}
                for example in real or examples[:1]
            ]
        )
        if rows or not real:
            batch[ROW] = torch.tensor(rows, dtype=torch.long)
        batch[SUPERVISED] = supervised_places(batch["labels"])
        return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch on a GPU without waiting for the copy, as memory that may be paged out makes
    one.
    """
    if device.type != "cuda":
        return batch
    return {
        key: value.pin_memory().to(device, non_blocking=True)
        if isinstance(value, torch.Tensor) and value.device.type == "cpu"
        else value
        for key, value in batch.items()
    }


def name_rows(rows: Sequence[int], ids: Sequence[str], at_most: int = 12) -> str:
    """Return the ids of rows, shortened.

    Example:
        >>> name_rows([0, 2], ["a", "b", "c"])
        'examples a, c'
    """
    if not rows:
        return "examples not known (packed rows)"
    names = ", ".join(ids[row] for row in rows[:at_most])
    return f"examples {names}{' ...' if len(rows) > at_most else ''}"


# ---- The passes of a step ----


def passes_of(batches: list[Batch], max_tokens: int) -> list[Batch]:
    """Return the forward passes of a step's micro-batches, of at most `max_tokens` computed tokens.
    Rows without padding are joined across micro-batches; padded ones are not.
    """
    real = [batch for batch in batches if ROW not in batch or batch[ROW].numel()]
    if not real:
        return [filler(batches[0])]
    if "attention_mask" not in real[0]:
        keys = ("input_ids", "labels", "position_ids")
        real = [{key: torch.cat([batch[key] for batch in real], 1) for key in keys}]
    return [piece for batch in real for piece in split_batch(batch, max_tokens)]


def split_batch(batch: Batch, max_tokens: int) -> list[Batch]:
    """Cut a collated batch into pieces of at most `max_tokens` computed tokens, padding counted; a
    single longer example stays whole.

    Args:
        batch: padded (`input_ids`, `labels`, `attention_mask` of shape (examples, tokens)) or
            flattened (shape (1, tokens), `position_ids` that begin at 0 with each example).
    """
    if (mask := batch.get("attention_mask")) is not None:
        lengths = mask.sum(1).tolist()
        return [
            _with_supervised(
                {
                    key: batch[key][rows, : max(lengths[row] for row in rows)]
                    for key in ("input_ids", "labels", "attention_mask")
                }
            )
            for rows in _groups(lengths, max_tokens, padded=True)
        ]
    bounds = _bounds(batch["position_ids"])
    pieces = []
    for rows in _groups(bounds.diff().tolist(), max_tokens, padded=False):
        tokens = slice(int(bounds[rows[0]]), int(bounds[rows[-1] + 1]))
        piece = {key: batch[key][:, tokens] for key in ("input_ids", "labels")}
        piece |= _for_kernels(batch["position_ids"][:, tokens])
        pieces.append(_with_supervised(piece))
    return pieces


def filler(like: Batch) -> Batch:
    """Return a pass of two tokens without loss, for a rank that has fewer passes: collectives must
    meet.
    """
    ids = torch.zeros(1, FILLER_TOKENS, dtype=torch.long, device=like["input_ids"].device)
    nothing = ids[0, :0]
    labels = torch.full_like(ids, -100)
    piece = {"input_ids": ids, "labels": labels, SUPERVISED: nothing, ROW: nothing}
    if "attention_mask" in like:
        return piece | {"attention_mask": torch.ones_like(ids)}
    return piece | _for_kernels(torch.arange(FILLER_TOKENS, device=ids.device)[None])


def _groups(lengths: list[int], max_tokens: int, padded: bool) -> Iterator[list[int]]:
    """Neighbouring examples together as long as their cost stays within the cap: padded, each costs
    as much as the longest.
    """
    group: list[int] = []
    for index, length in enumerate(lengths):
        inside = [*(lengths[other] for other in group), length]
        if group and (max(inside) * len(inside) if padded else sum(inside)) > max_tokens:
            yield group
            group = []
        group.append(index)
    yield group


def _with_supervised(piece: Batch) -> Batch:
    return {**piece, SUPERVISED: supervised_places(piece["labels"])}


def _bounds(position_ids: torch.Tensor) -> torch.Tensor:
    """Return where each example of a flattened row begins, and where the last one ends."""
    starts = (position_ids[0] == 0).nonzero().flatten()
    end = torch.tensor([position_ids.shape[1]], device=starts.device)
    return torch.cat([starts, end]).to(torch.int32)


def _for_kernels(position_ids: torch.Tensor) -> Batch:
    """Return what variable-length kernels need beside the tokens, as TRL's collator gives it."""
    bounds = _bounds(position_ids)
    lengths = bounds.diff()
    longest = int(lengths.max())
    examples = torch.arange(len(lengths), dtype=torch.int32, device=bounds.device)
    return {
        "position_ids": position_ids,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.repeat_interleave(examples, lengths)[None],
    }
