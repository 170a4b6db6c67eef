"""The two figures of a report: differences with their intervals, and training curves."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from recipes_lib.analysis.claims import Claim
from recipes_lib.analysis.curves import CURVES
from recipes_lib.analysis.runs import Arms
from recipes_lib.analysis.text import difference_text, plain_number

_MOST_ROWS = 40  # of the forest
_COLORS = ("#2f6db3", "#c4552d", "#3b8a4c", "#8a5bb0", "#a07c1f", "#4a8f9c", "#b0486f", "#666666")


def forest(claims: Sequence[Claim]) -> dict[str, Any]:
    """Return what the page draws: every tested difference with its interval, a panel for each unit
    and direction, and how many rows are left out. Places are in percent of the axis.
    """
    shown = [claim for claim in claims if claim.row.interval and not claim.row.aside]
    by_axis: dict[tuple[str, bool | None], list[Claim]] = defaultdict(list)
    for claim in shown[:_MOST_ROWS]:
        by_axis[claim.row.unit, claim.row.higher_is_better].append(claim)
    panels = []
    for (unit, higher_is_better), of_axis in by_axis.items():
        values = [end for claim in of_axis for end in claim.row.interval or ()]
        values += [value for claim in of_axis for value in claim.row.by_seed]
        reach = max(map(abs, values)) * 1.05 or 1.0  # the value at both ends
        step = _tick(reach)
        ticks = [(_place(value, reach), difference_text(value, unit)) for value in (-step, 0, step)]
        rows = [_forest_row(claim, reach) for claim in of_axis]
        panels.append({"rows": rows, "ticks": ticks, "higher_is_better": higher_is_better})
    return {"panels": panels, "left_out": max(0, len(shown) - _MOST_ROWS)}


def _forest_row(claim: Claim, reach: float) -> dict[str, Any]:
    row = claim.row
    low, high = row.interval or (0.0, 0.0)
    return {
        "row": row,
        "verdict": claim.verdict,
        "low": _place(low, reach),
        "width": _place(high, reach) - _place(low, reach),
        "at": _place(row.difference or 0.0, reach),
        "seeds": [_place(value, reach) for value in row.by_seed if len(row.by_seed) > 1],
    }


def _place(value: float, reach: float) -> float:
    """Where a difference lies on an axis that reaches equally far to both sides, in percent."""
    return round(50 + 50 * value / reach, 2)


def _tick(reach: float) -> float:
    """Return the largest round number on an axis.

    Example:
        >>> _tick(0.63), _tick(0.3), _tick(17.0)
        (0.5, 0.2, 10.0)
    """
    power = 10.0 ** math.floor(math.log10(reach))
    return next(factor * power for factor in (5, 2, 1) if factor * power <= reach)


def curves(arms: Arms) -> dict[str, Any]:
    """Return what the page draws of the training curves of all runs: a panel for each kind, and the
    color of each arm. Points are in percent of a panel, from its upper left corner.
    """
    colors = {arm.name: _COLORS[number % len(_COLORS)] for number, arm in enumerate(arms)}
    runs = [(arm, run.curves) for arm, run in arms.runs if run.curves]
    panels = []
    for kind, title in CURVES.items():
        lines = [(colors[arm], of_run[kind].points) for arm, of_run in runs if kind in of_run]
        if lines:
            panels.append({"title": title} | _panel(lines))
    return {"panels": panels, "colors": {arm: colors[arm] for arm, _ in runs}}


def _panel(lines: Sequence[tuple[str, list[tuple[float, float]]]]) -> dict[str, Any]:
    """The points of each line with its color, and the ends of both axes."""
    last_step = max(step for _, points in lines for step, _ in points) or 1
    values = [value for _, points in lines for _, value in points]
    low = min(values)
    high = max(values)
    span = (high - low) or abs(high) or 1.0
    drawn = []
    for color, points in lines:
        path = []
        for step, value in points:
            path.append(f"{100 * step / last_step:.2f},{100 * (high - value) / span:.2f}")
        drawn.append((color, " ".join(path)))
    digits = 0
    if high < 10:  # a loss, or a learning rate
        digits = 4 if high > 0.1 else 7
    ends = {"low": plain_number(low, digits), "high": plain_number(high, digits)}
    return {"lines": drawn, "last_step": f"{last_step:,.0f}"} | ends
