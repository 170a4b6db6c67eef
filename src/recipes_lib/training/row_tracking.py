"""Which rows are in the current step: so that a loss that explodes can name the examples it
exploded on.

Rows that only fill a batch (`row_order`) are known by their number, and stand in no batch that has
others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

ROW = "example_row"
FILLER = -1
"""The number of a row without loss."""


class RowTrackingCollator:
    """Wraps a collator: takes the row number out of each example and passes it on as a tensor of
    shape (examples,).
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
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
        return batch


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
