"""The two figures of a report as SVG: differences with their intervals, and training curves."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from recipes_lib.analysis.claims import Claim
from recipes_lib.analysis.curves import CURVES
from recipes_lib.analysis.row_text import where_text
from recipes_lib.analysis.runs import Arms
from recipes_lib.analysis.text import difference_text, plain_number
from recipes_lib.core.terminal import printable

_WIDTH, _LEFT, _RIGHT, _LINE = 760, 350, 20, 26
_MOST_ROWS = 40
_PANEL_WIDTH, _PANEL_HEIGHT = 370, 200
_COLORS = ("#2f6db3", "#c4552d", "#3b8a4c", "#8a5bb0", "#a07c1f", "#4a8f9c", "#b0486f", "#666666")


def forest(claims: Sequence[Claim]) -> str:
    """Return every tested difference with its 95% interval, a panel for each unit, or nothing."""
    shown = [claim for claim in claims if claim.row.interval and not claim.row.aside][:_MOST_ROWS]
    parts: list[str] = []
    top, half = 0, (_WIDTH - _LEFT - _RIGHT) / 2
    middle = _LEFT + half
    for unit in dict.fromkeys(claim.row.unit for claim in shown):
        of_unit = [claim for claim in shown if claim.row.unit == unit]
        reach = max(abs(end) for claim in of_unit for end in claim.row.interval or ()) * 1.05 or 1.0
        bottom = top + _LINE * len(of_unit)
        parts.append(_line(middle, top + 4, middle, bottom + 4, "#999"))
        for number, claim in enumerate(of_unit):
            row, y = claim.row, top + _LINE * number + _LINE / 2 + 4
            color = {"better": "#2c7a43", "worse": "#b03a1e"}.get(claim.verdict, "#555")
            label = f"{row.first} − {row.second}: {where_text(row)}"
            label = label if len(label) <= 44 else f"{label[:43]}…"  # wide and bold it fits
            ends = row.interval or (0.0, 0.0)
            low, x, high = (
                middle + value * half / reach for value in (ends[0], row.difference or 0.0, ends[1])
            )
            parts.append(_text(_LEFT - 12, y + 4, label, "end", 12, bold=row.primary))
            parts.append(_line(low, y, high, y, color, 2))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')
        for value, anchor in ((-reach, "start"), (0.0, "middle"), (reach, "end")):
            place = middle + value * half / reach
            parts.append(_text(place, bottom + 20, difference_text(value, unit), anchor, 11))
        top = bottom + 38
    return _svg(top, parts, "differences with 95% intervals") if shown else ""


def curves(arms: Arms) -> str:
    """Return the training curves of all runs, a panel for each kind; nothing without one."""
    colors = {arm.name: _COLORS[number % len(_COLORS)] for number, arm in enumerate(arms)}
    runs = [(arm.name, run.curves) for arm in arms for run in arm.runs]
    parts: list[str] = []
    panels = [name for name in CURVES if any(name in known for _, known in runs)]
    for number, name in enumerate(panels):
        x, y = (number % 2) * (_PANEL_WIDTH + 20), (number // 2) * (_PANEL_HEIGHT + 50) + 20
        parts.append(_text(x, y - 6, CURVES[name], "start", 12, bold=True))
        lines = [(colors[arm], known[name].points) for arm, known in runs if name in known]
        parts += _panel(lines, x, y)
    bottom = (len(panels) + 1) // 2 * (_PANEL_HEIGHT + 50) + 10
    for number, name in enumerate(dict.fromkeys(arm for arm, known in runs if known)):
        x, y = (number % 4) * 190, bottom + 20 * (number // 4)
        parts += [_line(x, y, x + 18, y, colors[name], 3), _text(x + 24, y + 4, name, "start", 11)]
    return _svg(bottom + 20 * len(colors), parts, "training curves by step") if panels else ""


def _panel(lines: Sequence[tuple[str, list[tuple[float, float]]]], x: int, y: int) -> list[str]:
    bottom, right = y + _PANEL_HEIGHT, x + _PANEL_WIDTH
    points = [point for _, line in lines for point in line]
    last = max(step for step, _ in points) or 1
    low, high = min(value for _, value in points), max(value for _, value in points)
    span, digits = (high - low) or abs(high) or 1.0, 4 if high < 10 else 0
    parts = [
        _line(x, bottom, right, bottom, "#999"),
        _line(x, y, x, bottom, "#999"),
        _text(x + 4, y + 12, plain_number(high, digits), "start", 10),
        _text(x + 4, bottom - 4, plain_number(low, digits), "start", 10),
        _text(right, bottom + 14, f"step {last:,.0f}", "end", 10),
    ]
    for color, line in lines:
        path = " ".join(
            f"{x + _PANEL_WIDTH * step / last:.1f},{bottom - _PANEL_HEIGHT * (v - low) / span:.1f}"
            for step, v in line
        )
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.4"/>')
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
