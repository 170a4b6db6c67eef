"""A cap on the tokens of one forward pass, so that a batch of long examples does not decide how
small every batch must be.

A micro-batch over the cap is cut into pieces that go forward and backward one after the other. The
loss is a sum over tokens divided by the tokens of the whole step, so the pieces add up to the same
gradient; only the order of float sums changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from recipes_lib.training.row_tracking import ROW


def split_batch(batch: dict[str, Any], max_tokens: int) -> list[dict[str, Any]]:
    """Cut a collated batch into pieces of at most `max_tokens` computed tokens, padding counted; a
    single longer example stays whole.

    Args:
        batch: padded (`input_ids`, `labels`, `attention_mask` of shape (examples, tokens)) or
            flattened without padding (shape (1, tokens) with `position_ids` that begin again at 0
            with each example).
        max_tokens: tokens per piece.
    """
    if "attention_mask" in batch:
        return [
            _rows(batch, rows)
            for rows in _groups(batch["attention_mask"].sum(1).tolist(), max_tokens, padded=True)
        ]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], batch["input_ids"].shape[1]]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    groups = _groups(lengths, max_tokens, padded=False)
    return [_slice(batch, starts[group[0]], ends[group[-1]]) for group in groups]


def filler(like: dict[str, Any]) -> dict[str, Any]:
    """A piece of two tokens without loss and without rows, for a rank that has fewer pieces than
    another: collectives must meet.
    """
    device = like["input_ids"].device
    piece = {
        "input_ids": torch.zeros(1, 2, dtype=torch.long, device=device),
        "labels": torch.full((1, 2), -100, device=device),
    }
    piece[ROW] = torch.zeros(0, dtype=torch.long, device=device)
    if "attention_mask" in like:
        return piece | {"attention_mask": torch.ones(1, 2, dtype=torch.long, device=device)}
    return piece | _sequence_bounds(torch.arange(2, device=device)[None])


def _groups(lengths: list[int], max_tokens: int, padded: bool) -> Iterator[list[int]]:
    """Neighbouring examples together as long as their cost stays within the cap: padded, each costs
    as much as the longest.
    """
    group: list[int] = []
    for index, length in enumerate(lengths):
        inside = [lengths[other] for other in group]
        cost = max([*inside, length]) * (len(group) + 1) if padded else sum(inside) + length
        if group and cost > max_tokens:
            yield group
            group = []
        group.append(index)
    yield group


def _rows(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    longest = int(batch["attention_mask"][rows].sum(1).max())
    return {key: batch[key][rows, :longest] for key in ("input_ids", "labels", "attention_mask")}


def _slice(batch: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    piece = {key: batch[key][:, start:end] for key in ("input_ids", "labels")}
    return piece | _sequence_bounds(batch["position_ids"][:, start:end])


def _sequence_bounds(position_ids: torch.Tensor) -> dict[str, Any]:
    """What the variable-length attention kernels need beside the positions, as TRL's collator gives
    it.
    """
    starts = (position_ids[0] == 0).nonzero().flatten()
    bounds = torch.cat([starts, torch.tensor([position_ids.shape[1]], device=starts.device)]).to(
        torch.int32
    )
    longest = int(bounds.diff().max())
    index = torch.repeat_interleave(
        torch.arange(len(starts), dtype=torch.int32, device=starts.device), bounds.diff()
    )[None]
    return {
        "position_ids": position_ids,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": index,
    }
