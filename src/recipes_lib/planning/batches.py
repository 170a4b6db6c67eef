"""Steps, micro-batches and what padding costs: the recipe's batches drawn once from the real
lengths.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from recipes_lib.config.batch import planned_steps
from recipes_lib.planning.lengths import Lengths
from recipes_lib.planning.settings import Settings

PACKED = 0.9995  # share of a packed row that is filled; measured with TRL's bfd on Dolly
_MOST_ROWS = 20_000


@dataclass(frozen=True)
class Batches:
    """The batch arithmetic of one training.

    Args:
        forward_passes: per step and process.
        tokens: per step over all processes, without padding, which `computed` has.
        largest: tokens of the largest forward pass, padding counted; `largest_row` of a row of it.
        context: tokens that attention looks over, averaged over computed tokens.
        rows: training rows (after packing).
    """

    steps: int
    steps_per_epoch: int
    accumulation: int
    examples_per_step: int
    forward_passes: float
    tokens: float
    computed: float
    largest: int
    largest_row: int
    context: float
    rows: int

    @property
    def epochs(self) -> float:
        """Passes over the rows."""
        return self.steps / self.steps_per_epoch

    @property
    def padding(self) -> float:
        """Computed tokens for each real one."""
        return self.computed / self.tokens


def batches_of(
    settings: Settings, lengths: Lengths, train: dict[str, Any], accumulation: int
) -> Batches:
    """Return the batches of a training.

    Args:
        train: the recipe's `train` section.
        accumulation: micro-batches per step and process.
    """
    # rows without padding share passes across the micro-batches of a step
    joined = accumulation if settings.flattened and settings.max_tokens is not None else 1
    tokens, rows = _cut(lengths.tokens, _MOST_ROWS, settings.max_length), lengths.train
    if settings.packing:
        cut = settings.max_length or max(lengths.tokens)
        rows = max(1, math.ceil(sum(tokens) / len(tokens) * rows / (cut * PACKED)))
        tokens = (cut,)
    size, kind = settings.per_device * joined, (settings.flattened, settings.masked)
    drawn = _draw(tokens, size, *kind, settings.grouped, settings.max_tokens)
    per_epoch, steps = planned_steps(
        rows,
        per_device=settings.per_device,
        accumulation=accumulation,
        world_size=settings.world_size,
        epochs=float(train.get("num_train_epochs", 3)),
        max_steps=int(train.get("max_steps", -1)),
    )
    drawn_per_step = accumulation // joined
    scale = drawn_per_step * settings.world_size
    return Batches(
        steps=steps,
        steps_per_epoch=per_epoch,
        accumulation=accumulation,
        examples_per_step=settings.per_device * accumulation * settings.world_size,
        forward_passes=drawn.passes * drawn_per_step,
        tokens=drawn.tokens * scale * (PACKED if settings.packing else 1),
        computed=drawn.computed * scale,
        largest=drawn.largest,
        largest_row=drawn.largest_row,
        context=drawn.context,
        rows=rows,
    )


def validation_tokens(settings: Settings, lengths: Lengths) -> tuple[int, float]:
    """Return the tokens of the largest validation batch, and those computed for all its rows."""
    size = settings.eval_per_device
    if not size or not lengths.validation:
        return 0, 0.0
    drawn = _draw(_cut(lengths.tokens, 5000, settings.max_length), size, settings.padding_free)
    largest = round(drawn.largest * min(lengths.validation, size) / size)
    return largest, drawn.computed / size * lengths.validation


def validations(steps: int, per_epoch: int, train: dict[str, Any]) -> int:
    """Return how often the validation set is read."""
    strategy = train.get("eval_strategy", "no")
    if strategy == "no":
        return 0
    written = train.get("eval_steps") or train.get("logging_steps") or 500
    every: float = per_epoch if strategy == "epoch" else written
    every = every * steps if every < 1 else every
    return math.ceil(steps / max(every, 1)) + bool(train.get("eval_on_start"))


@lru_cache(maxsize=16)
def _cut(tokens: tuple[int, ...], rows: int, length: int | None) -> tuple[int, ...]:
    """Return the lengths of the first rows, cut."""
    return tuple(min(one, length or one) for one in tokens[:rows])


@dataclass(frozen=True)
class _Drawn:
    """Averages over the micro-batches that were drawn, and the largest forward pass among them."""

    tokens: float
    computed: float
    passes: float
    largest: int
    largest_row: int
    context: float


@lru_cache(maxsize=256)
def _draw(
    lengths: tuple[int, ...],
    size: int,
    flattened: bool,
    masked: bool = False,
    grouped: bool = False,
    cap: int | None = None,
) -> _Drawn:
    """Draw the micro-batches of three epochs and measure them; kept for a plan's many settings.

    Args:
        lengths: tokens per example, cut.
        size: examples per micro-batch.
        cap: tokens above which a micro-batch is cut into pieces.
    """
    pool = list(lengths)
    while len(pool) < 4 * size:
        pool += pool
    order, generator = list(pool), random.Random(0)
    batches = real = computed = passes = squares = 0
    largest = largest_row = 0
    for _ in range(1 if grouped else 3):
        generator.shuffle(order)
        if grouped:
            order.sort()
        for start in range(0, len(order) - size + 1, size):
            batch = order[start : start + size]
            batches += 1
            real += sum(batch)
            for group in _groups(batch, cap, flattened):
                cost, row = _cost(group, flattened), max(group)
                square = cost * row  # pairs of tokens that attention looks at, before the mask
                if flattened and masked:
                    row, square = cost, cost * cost
                elif flattened:
                    square = sum(length * length for length in group)
                passes, computed, squares = passes + 1, computed + cost, squares + square
                if cost > largest:
                    largest, largest_row = cost, row
    return _Drawn(
        real / batches,
        computed / batches,
        passes / batches,
        largest,
        largest_row,
        squares / computed,
    )


def _groups(batch: list[int], cap: int | None, flattened: bool) -> list[list[int]]:
    """Return the examples of each forward pass of a micro-batch."""
    if cap is None:
        return [batch]
    groups: list[list[int]] = [[]]
    for length in batch:
        if groups[-1] and _cost([*groups[-1], length], flattened) > cap:
            groups.append([])
        groups[-1].append(length)
    return groups


def _cost(group: Sequence[int], flattened: bool) -> int:
    return sum(group) if flattened else max(group) * len(group)
