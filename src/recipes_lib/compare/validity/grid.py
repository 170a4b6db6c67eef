"""The grid that a study's arms stand on: one or two numbers that are all that differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes_lib.compare.design import LOSS_PRECISION, LOSS_TOKENS, Study
from recipes_lib.compare.validity.case import SEED, changes_result, effective


@dataclass(frozen=True)
class Grid:
    """Where each arm stands: its value of `key` and of the second key, None where there is one key.

    Args:
        losses_compare: whether the validation losses of all arms are means over the same tokens.
    """

    key: str
    second: str | None
    places: Mapping[str, tuple[float, float | None]]
    losses_compare: bool


def grid_of(study: Study | None) -> Grid | None:
    """Return the grid of the arms that have a recipe; None where an arm is tuned, where they differ
    in anything else, and below three values of one key or four cells of two.

    A key whose values follow from another's (an alpha from its rank) is no axis of its own.
    """
    if study is None or any(arm.tuning for arm in study.arms):
        return None
    arms = {arm.name: arm.resolved() for arm in study.arms if arm.recipe is not None}
    keys = [
        key
        for key in study.differing()
        if key != SEED and any(changes_result(key, {}, values) for values in arms.values())
    ]
    columns = {key: [effective(key, values) for values in arms.values()] for key in keys}
    axes: list[str] = []
    for key in sorted(keys, key=lambda key: -_distinct(columns[key])):
        # Every value of an axis has one value of a key that follows from it.
        if not any(
            _distinct(columns[axis])
            == _distinct(list(zip(columns[axis], columns[key], strict=True)))
            for axis in axes
        ):
            axes.append(key)
    # Along the one with more values; of as many, along the later one of a recipe (lora, train).
    axes.sort(key=lambda key: (_distinct(columns[key]), keys.index(key)), reverse=True)
    numeric = all(type(one) in (int, float) for axis in axes for one in columns[axis])
    if not numeric or len(axes) not in (1, 2) or len(arms) < 2 + len(axes):
        return None
    first, second = axes[0], axes[1] if axes[1:] else None
    places = {
        name: (
            float(effective(first, values)),
            float(effective(second, values)) if second else None,
        )
        for name, values in arms.items()
    }
    if len(set(places.values())) < len(arms):
        return None
    return Grid(first, second, places, not set(keys) & {*LOSS_TOKENS, *LOSS_PRECISION})


def _distinct(column: list[Any]) -> int:
    return len(set(map(str, column)))
