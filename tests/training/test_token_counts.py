"""The counts of tokens beside the loss."""

from __future__ import annotations

import torch

from recipes_lib.training.trainer import TokenCounts


def test_counts_start_again_after_they_were_taken() -> None:
    counts = TokenCounts(torch.device("cpu"))
    assert counts.take_accuracy() is None
    counts.add(10, torch.tensor(4), torch.tensor(1))
    counts.add(torch.tensor(6), torch.tensor(4), torch.tensor(3))
    counts.add(5, 0, 0, step=1)
    assert (counts.take_tokens(), counts.take_tokens()) == ([16, 5], [])
    assert (counts.take_accuracy(), counts.take_accuracy()) == (0.5, None)
