"""How many tokens a training has seen, and how many of those that count it ranked first; added up
where they are, read once per log.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class TokenCounts:
    """Counts kept on the device until somebody asks: reading one makes the processor wait for the
    GPU, and summing one for all ranks.

    Args:
        device: where the micro-batches are.
    """

    def __init__(self, device: torch.device) -> None:
        self._tokens = torch.zeros(1, dtype=torch.long, device=device)
        self._scored = torch.zeros(2, dtype=torch.long, device=device)

    def add(
        self,
        tokens: torch.Tensor | int,
        supervised: torch.Tensor | int,
        correct: torch.Tensor | int,
    ) -> None:
        """Count one micro-batch of this rank."""
        self._tokens += tokens
        self._scored[0] += supervised
        self._scored[1] += correct

    def take_tokens(self) -> int:
        """Return the tokens of all ranks since the last call; every rank has to call."""
        tokens = _sum(self._tokens)[0]
        self._tokens.zero_()
        return tokens

    def scored(self) -> list[int]:
        """Return the supervised tokens of all ranks, and how many of them were ranked first, since
        `take_accuracy`; every rank has to call.
        """
        return _sum(self._scored)

    def take_accuracy(self) -> float | None:
        """Return the share of supervised tokens of all ranks that were ranked first since the last
        call; every rank has to call.
        """
        supervised, correct = self.scored()
        self._scored.zero_()
        return correct / supervised if supervised else None


def _sum(counts: torch.Tensor) -> list[int]:
    total = counts.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return [int(value) for value in total.tolist()]
