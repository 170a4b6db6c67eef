"""The two figures of a report as SVG: differences with their intervals, and training curves."""

import itertools
from collections.abc import Sequence
from html import escape

from recipes_lib.analysis.claims import Claim
from recipes_lib.analysis.curves import CURVES
from recipes_lib.analysis.row_text import confidence_text, where_text
from recipes_lib.analysis.runs import Arms
from recipes_lib.analysis.text import difference_text, plain_number
from recipes_lib.core.terminal import printable

# All sizes are in units of the view box, which the page scales to its width.
_WIDTH = 760
_LABELS = 350  # width of the labels left of the forest's axis
_HALF_AXIS = (_WIDTH - _LABELS - 20) / 2
_MIDDLE = _LABELS + _HALF_AXIS
_ROW_HEIGHT = 26
_MOST_ROWS = 40
_PANEL_WIDTH = 370
_PANEL_HEIGHT = 200
_COLORS = ("#2f6db3", "#c4552d", "#3b8a4c", "#8a5bb0", "#a07c1f", "#4a8f9c", "#b0486f", "#666666")
_VERDICT_COLORS = {"better": "#2c7a43", "worse": "#b03a1e"}


def forest(claims: Sequence[Claim]) -> str:
    """Return every tested difference with its interval, a panel for each unit, or nothing."""
    drawn = [claim for claim in claims if claim.row.interval and not claim.row.aside][:_MOST_ROWS]
    if not drawn:
        return ""
    parts: list[str] = []
    top = 0
    for unit in dict.fromkeys(claim.row.unit for claim in drawn):
        of_unit = [claim for claim in drawn if claim.row.unit == unit]
        intervals = [claim.row.interval or () for claim in of_unit]
        # the value at both ends of the axis
        reach = max(map(abs, itertools.chain(*intervals))) * 1.05 or 1.0
        bottom = top + _ROW_HEIGHT * len(of_unit)
        parts.append(_line(_MIDDLE, top + 4, _MIDDLE, bottom + 4, "#999"))
        for number, claim in enumerate(of_unit):
            y = top + _ROW_HEIGHT * number + _ROW_HEIGHT / 2 + 4
            row = claim.row
            low, high = row.interval or (0.0, 0.0)
            x = _x_of(row.difference or 0.0, reach)
            color = _VERDICT_COLORS.get(claim.verdict, "#555")
            label = f"{row.first} − {row.second}: {where_text(row)}"
            if len(label) > 44:  # wide and bold it fits
                label = f"{label[:43]}…"
            parts.append(_text(_LABELS - 12, y + 4, label, "end", 12, bold=row.primary))
            parts.append(_line(_x_of(low, reach), y, _x_of(high, reach), y, color, 2))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')
        for value, anchor in ((-reach, "start"), (0.0, "middle"), (reach, "end")):
            label = difference_text(value, unit)
            parts.append(_text(_x_of(value, reach), bottom + 20, label, anchor, 11))
        top = bottom + 38
    level = confidence_text(drawn[0].row.alpha)
    return _svg(top, parts, f"differences with {level} intervals")


def _x_of(value: float, reach: float) -> float:
    """Where a difference lies on an axis that reaches equally far to both sides."""
    return _MIDDLE + value * _HALF_AXIS / reach


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
        f' aria-label="{escape(title)}" font-family="sans-serif" fill="#222">{"".join(parts)}</svg>'
    )
