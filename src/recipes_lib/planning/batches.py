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
        steps: optimizer steps of the whole training.
        forward_passes: per step and process, pieces of a capped micro-batch counted.
        tokens: per step over all processes, without padding.
        computed: per step over all processes, padding counted.
        largest: tokens of the largest forward pass, padding counted.
        largest_row: tokens of a row of it.
        context: tokens that attention looks over, averaged over computed tokens.
        rows: training rows (after packing).
    """

    steps: int
    steps_per_epoch: int
    epochs: float
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
    cut = settings.max_length or max(lengths.tokens)
    tokens = [min(length, cut) for length in lengths.tokens[:_MOST_ROWS]]
    rows = lengths.train
    if settings.packing:
        rows = max(1, math.ceil(sum(tokens) / len(tokens) * rows / (cut * PACKED)))
        tokens = [cut]
    examples = settings.per_device * accumulation * settings.world_size
    drawn = draw(settings, tokens, settings.per_device)
    per_epoch, steps = planned_steps(
        rows,
        per_device=settings.per_device,
        accumulation=accumulation,
        world_size=settings.world_size,
        epochs=float(train.get("num_train_epochs", 3)),
        max_steps=int(train.get("max_steps", -1)),
        drop_last=bool(train.get("dataloader_drop_last")),
    )
    scale = accumulation * settings.world_size
    real = drawn.tokens * scale
    return Batches(
        steps=steps,
        steps_per_epoch=per_epoch,
        epochs=steps / per_epoch,
        accumulation=accumulation,
        examples_per_step=examples,
        forward_passes=drawn.passes * accumulation,
        tokens=real * (PACKED if settings.packing else 1),
        computed=drawn.computed * scale,
        largest=drawn.largest,
        largest_row=drawn.largest_row,
        context=drawn.context,
        rows=rows,
    )


@dataclass(frozen=True)
class Drawn:
    """Averages over the micro-batches that were drawn, and the largest forward pass among them."""

    tokens: float
    computed: float
    passes: float
    largest: int
    largest_row: int
    context: float


def draw(settings: Settings, lengths: Sequence[int], size: int) -> Drawn:
    """Draw the micro-batches of an epoch (three times, as a training does) and measure them.

    Args:
        lengths: tokens per example, cut.
        size: examples per micro-batch.
    """
    return _draw(
        settings.flattened,
        settings.masked,
        settings.grouped,
        settings.max_tokens,
        tuple(lengths),
        size,
    )


@lru_cache(maxsize=256)
def _draw(
    flattened: bool,
    masked: bool,
    grouped: bool,
    cap: int | None,
    lengths: tuple[int, ...],
    size: int,
) -> Drawn:
    """Draw for `draw`; a plan compares many settings with the same batches."""
    pool = list(lengths)
    while len(pool) < 4 * size:
        pool += pool
    order, generator = list(pool), random.Random(0)
    batches = real = computed = passes = squares = 0
    largest = largest_row = 0
    for _ in range(3):
        generator.shuffle(order)
        if grouped:
            order.sort()
        for start in range(0, len(order) - size + 1, size):
            batch = order[start : start + size]
            batches += 1
            real += sum(batch)
            for group in _groups(batch, cap, flattened):
                cost, row, square = _computed(group, flattened, masked)
                passes, computed, squares = passes + 1, computed + cost, squares + square
                if cost > largest:
                    largest, largest_row = cost, row
        if grouped:
            break
    return Drawn(
        real / batches,
        computed / batches,
        passes / batches,
        largest,
        largest_row,
        squares / computed,
    )


def _groups(batch: Sequence[int], cap: int | None, flattened: bool) -> list[list[int]]:
    """Return the examples of each forward pass of a micro-batch: all of them, or pieces where it
    exceeds the cap.
    """
    groups: list[list[int]] = []
    group: list[int] = []
    for length in batch:
        if group and cap and _cost([*group, length], flattened) > cap:
            groups.append(group)
            group = []
        group.append(length)
    return [*groups, group]


def _computed(group: Sequence[int], flattened: bool, masked: bool) -> tuple[int, int, int]:
    """Return computed tokens, tokens of a row, and the pairs of tokens that attention looks at
    (before half of them are masked).
    """
    cost, longest = _cost(group, flattened), max(group)
    if not flattened:
        return cost, longest, cost * longest
    if masked:
        return cost, cost, cost * cost
    return cost, longest, sum(length * length for length in group)


def _cost(group: Sequence[int], flattened: bool) -> int:
    return sum(group) if flattened else max(group) * len(group)


def validations(steps: int, per_epoch: int, train: dict[str, Any]) -> int:
    """Return how often the validation set is read: every `eval_steps`, or every epoch, and once at
    the end.
    """
    strategy = train.get("eval_strategy", "no")
    if strategy == "no":
        return 0
    every: float = (
        per_epoch
        if strategy == "epoch"
        else train.get("eval_steps") or train.get("logging_steps") or 500
    )
    every = every * steps if every < 1 else every
    return math.ceil(steps / max(every, 1)) + bool(train.get("eval_on_start"))
