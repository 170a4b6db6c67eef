"""The two figures of a report: differences with their intervals, and training curves as SVG."""

import math
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from typing import Any

from recipes_lib.analysis.claims import Claim
from recipes_lib.analysis.curves import CURVES
from recipes_lib.analysis.runs import Arms
from recipes_lib.analysis.text import difference_text, plain_number
from recipes_lib.core.terminal import printable

# All sizes are in units of the view box, which the page scales to its width.
_WIDTH = 760
_MOST_ROWS = 40  # of the forest
_PANEL_WIDTH = 370
_PANEL_HEIGHT = 200
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


def curves(arms: Arms) -> str:
    """Return the training curves of all runs, a panel for each kind; nothing without one."""
    colors = {arm.name: _COLORS[number % len(_COLORS)] for number, arm in enumerate(arms)}
    runs = [(arm, run.curves) for arm, run in arms.runs if run.curves]
    kinds = [kind for kind in CURVES if any(kind in of_run for _, of_run in runs)]
    if not kinds:
        return ""
    parts: list[str] = []
    for number, kind in enumerate(kinds):
        x = (number % 2) * (_PANEL_WIDTH + 20)
        y = (number // 2) * (_PANEL_HEIGHT + 50) + 20
        parts.append(_text(x, y - 6, CURVES[kind], "start", 12, bold=True))
        lines = [(colors[arm], of_run[kind].points) for arm, of_run in runs if kind in of_run]
        parts += _panel(lines, x, y)
    bottom = (len(kinds) + 1) // 2 * (_PANEL_HEIGHT + 50) + 10
    for number, name in enumerate(dict.fromkeys(arm for arm, _ in runs)):
        x = (number % 4) * 190
        y = bottom + 20 * (number // 4)
        parts.append(_line(x, y, x + 18, y, colors[name], 3))
        parts.append(_text(x + 24, y + 4, name, "start", 11))
    return _svg(bottom + 20 * len(colors), parts, "training curves by step")


def _panel(lines: Sequence[tuple[str, list[tuple[float, float]]]], x: int, y: int) -> list[str]:
    """Lines of a color each in a rectangle whose upper left corner is given."""
    bottom = y + _PANEL_HEIGHT
    right = x + _PANEL_WIDTH
    steps = [step for _, points in lines for step, _ in points]
    values = [value for _, points in lines for _, value in points]
    last_step = max(steps) or 1
    low = min(values)
    high = max(values)
    span = (high - low) or abs(high) or 1.0
    digits = 4 if high < 10 else 0
    parts = [
        _line(x, bottom, right, bottom, "#999"),
        _line(x, y, x, bottom, "#999"),
        _text(x + 4, y + 12, plain_number(high, digits), "start", 10),
        _text(x + 4, bottom - 4, plain_number(low, digits), "start", 10),
        _text(right, bottom + 14, f"step {last_step:,.0f}", "end", 10),
    ]
    for color, points in lines:
        path = []
        for step, value in points:
            along = x + _PANEL_WIDTH * step / last_step
            down = bottom - _PANEL_HEIGHT * (value - low) / span
            path.append(f"{along:.1f},{down:.1f}")
        style = f'fill="none" stroke="{color}" stroke-width="1.4"'
        parts.append(f'<polyline points="{" ".join(path)}" {style}/>')
    return parts


def _text(x: float, y: float, text: str, anchor: str, size: int, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{weight}>'
        f"{escape(printable(text))}</text>"
    )


def _line(x: float, y: float, x2: float, y2: float, color: str, width: float = 1) -> str:
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}" stroke-width="{width}"/>'


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img"'
        f' aria-label="{escape(title)}" fill="currentColor">{"".join(parts)}</svg>'
    )
