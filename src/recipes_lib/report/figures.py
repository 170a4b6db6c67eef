"""The figures of a report, drawn from its content: the same content gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from recipes_lib.compare.row import TableRow
from recipes_lib.report.breakdowns import Breakdown
from recipes_lib.report.content import CURVES, Content
from recipes_lib.report.numbers import Number
from recipes_lib.report.runs import Tuned
from recipes_lib.report.surfaces import Cell, Surface

COLORS = ("#0b6e99", "#c4511b", "#4b7f3a", "#7b4fa3", "#a8872c", "#8a8a8a", "#b03a6a", "#2f4f7f")
_MARKERS = "os^Dv<>P"
LINES = ("-", "--", ":", "-.")
_STYLE = {
    "svg.hashsalt": "recipes",
    "svg.fonttype": "path",
    "font.size": 9.5,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "text.usetex": False,
    "text.parse_math": False,
}
_EFFECT_UNITS = {"share": "percentage points", "grade": "grades"}
_TESTED = ("better", "worse", "no difference shown")
MOST_EFFECTS = 40
GROUPED = {"category": "category", "length": "length of the answer beside the opponent's"}
# PNG for LaTeX: embedding fonts in fourteen PDFs takes longer than everything else.
_FORMATS = ("svg", "png")


@dataclass(frozen=True)
class Figure:
    """One figure: its name as a file, its title, what it shows in words, and its bytes by
    format.
    """

    name: str
    title: str
    caption: str
    files: dict[str, bytes]


def draw_comparison(content: Content, formats: Sequence[str] = _FORMATS) -> list[Figure]:
    """Return every figure that the content has numbers for."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        return list(_figures(content, formats))


def _figures(content: Content, formats: Sequence[str]) -> Iterator[Figure]:
    places = _places(content)
    if rows := _pictured(content):
        caption = (
            "Each comparison whose test stands, first arm minus second, with its 95% interval:"
            " filled where a difference is shown, a band where there is a margin."
        )
        yield Figure("effects", "Effects", caption, _effects(rows, places, formats))
    for number, key in enumerate(dict.fromkeys(one.key for one in content.tunings), 1):
        tried = [one for one in content.tunings if one.key == key]
        caption = (
            "Validation loss of one training per value, one line per arm; the chosen value is"
            " ringed, a training that diverged is a cross at the top."
        )
        yield Figure(
            f"tuning_{number}", f"Tuning of {key}", caption, _tuning(key, tried, places, formats)
        )
    for number, surface in enumerate(content.surfaces, 1):
        title = f"{surface.label[0].upper()}{surface.label[1:]}, by {surface.key}"
        yield Figure(f"grid_{number}", title, surface.caption, _surface(surface, formats))
    for key, series in content.curves.items():
        name, unit = CURVES[key]
        yield Figure(
            name,
            f"{unit[0].upper()}{unit[1:]}",
            "Every run, by optimizer step.",
            _curves(series, unit, places, formats),
        )
    for number, breakdown in enumerate(content.breakdowns, 1):
        title = f"{breakdown.title}, by {GROUPED[breakdown.kind]}"
        caption = "Points with 95% intervals over questions; groups are described, not tested."
        yield Figure(
            f"by_{breakdown.kind}_{number}", title, caption, _breakdown(breakdown, places, formats)
        )
    shares = [floor for floor in content.floor if floor.unit == "share" and floor.value is not None]
    if shares:
        caption = (
            "How many verdicts change where nothing was changed: shares with 95% intervals, of the"
            " pairs that were asked twice."
        )
        yield Figure("noise_floor", "Noise floor", caption, _floor(shares, formats))


def _places(content: Content) -> dict[str, int]:
    """The number of each arm, which gives it one colour and marker in every figure."""
    names = [
        *(score.arm for score in content.comparison.scores),
        *(arm for series in content.curves.values() for arm in series),
        *content.tuned,
    ]
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _new(height: float, panels: Sequence[float] = ()) -> tuple[Any, Any]:
    """A figure without pyplot: no global state, no window system.

    Args:
        panels: heights of several axes below each other, in proportion.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(6.4, height), layout="constrained")
    FigureCanvasAgg(figure)
    if panels:
        axes = figure.subplots(len(panels), squeeze=False, height_ratios=list(panels))
        return figure, list(axes[:, 0])
    return figure, figure.subplots()


def _saved(figure: Any, formats: Sequence[str]) -> dict[str, bytes]:
    files = {}
    for kind in formats:
        stream = BytesIO()
        figure.savefig(
            stream,
            format=kind,
            dpi=200,
            metadata={"Date": None} if kind == "svg" else {"Software": None},
        )
        files[kind] = stream.getvalue()
    return files


def _pictured(content: Content) -> list[TableRow]:
    """Return the rows that stand for the answer: those whose claim nothing stops; of many, the
    primary ones and those of the first pair.
    """
    rows = [
        row
        for row in content.comparison.rows
        if row.claimed and row.verdict in _TESTED and row.tested is not None
        if row.tested.low is not None and row.tested.high is not None
    ]
    if len(rows) > MOST_EFFECTS:
        rows = [row for row in rows if row.primary or row.arms == content.pairs[0][0]]
    return rows[:MOST_EFFECTS]


def _effects(
    rows: Sequence[TableRow], places: dict[str, int], formats: Sequence[str]
) -> dict[str, bytes]:
    """A forest plot: a panel per unit, a line per metric with one point for each pair of arms, in
    the colour of the first.
    """
    panels: dict[str, list[TableRow]] = {}
    for row in rows:
        panels.setdefault(_EFFECT_UNITS.get(row.unit, row.label), []).append(row)
    pairs = list(dict.fromkeys(row.arms for row in rows))
    styles: list[dict[str, Any]] = [
        {
            "fmt": _MARKERS[number % len(_MARKERS)],
            "color": COLORS[places.get(first, number) % len(COLORS)],
            "markersize": 4.5,
            "linewidth": 1.1,
        }
        for number, (first, _) in enumerate(pairs)
    ]
    metrics = {unit: list(dict.fromkeys(row.where for row in panels[unit])) for unit in panels}
    heights = [len(lines) * max(0.3, 0.17 * len(pairs)) for lines in metrics.values()]
    figure, every = _new(sum(heights) + 0.5 * len(panels) + 0.4, heights)
    for axes, (unit, mine) in zip(every, panels.items(), strict=True):
        axes.axvline(_place(mine[0], 0.0), color="#888888", linewidth=0.8, linestyle="--")
        for row in mine:
            pair, line = pairs.index(row.arms), metrics[unit].index(row.where)
            y = line + (pair - (len(pairs) - 1) / 2) * 0.7 / len(pairs)
            _effect(axes, row, y, 0.3 / len(pairs), styles[pair])
        axes.set_yticks(
            range(len(metrics[unit])), [short_label(line, 38) for line in metrics[unit]]
        )
        axes.set_ylim(len(metrics[unit]) - 0.5, -0.5)
        sides = {"right" if row.higher_is_better else "left" for row in mine}
        side = sides.pop() if len(sides) == 1 else None
        better = f" ({side}: the first arm is better)" if side else ""
        axes.set_xlabel(f"{short_label(unit)}{better}", fontsize=8.5)
    for arms, style in zip(pairs, styles, strict=True):
        every[0].errorbar([], [], xerr=[], label=short_label(" against ".join(arms)), **style)
    _legend(figure, len(pairs))
    return _saved(figure, formats)


def _effect(axes: Any, row: TableRow, y: float, half: float, style: dict[str, Any]) -> None:
    """One comparison: its effect, its interval and its margin, `half` above and below."""
    assert row.tested is not None
    effect, low, high = (
        _place(row, one) for one in (row.tested.effect, row.tested.low, row.tested.high)
    )
    if row.margin:
        ends = [_place(row, sign * row.margin) for sign in (-1, 1)]
        axes.fill_betweenx([y - half, y + half], *ends, color="#888888", alpha=0.25, linewidth=0)
    bars = [[max(0.0, effect - low)], [max(0.0, high - effect)]]
    hollow = {"markerfacecolor": "white"} if row.verdict == "no difference shown" else {}
    axes.errorbar([effect], [y], xerr=bars, **style, **hollow)


def _place(row: TableRow, effect: float | None) -> float:
    """Where an effect of a row stands; a win rate by its difference from a half."""
    shown = effect if row.head_to_head else row.shown(effect)
    return (100 if row.unit == "share" else 1) * (shown or 0.0)


def _tuning(
    key: str, tried: Sequence[Tuned], places: dict[str, int], formats: Sequence[str]
) -> dict[str, bytes]:
    """The validation loss by the tuned value; words stand side by side, in the grid's order."""
    figure, axes = _new(3.2)
    values = list(dict.fromkeys(one.value for one in tried))
    at = _value_axis(axes, key, values)
    for arm in dict.fromkeys(one.arm for one in tried):
        mine = sorted((one for one in tried if one.arm == arm), key=lambda one: at[one.value])
        known = [one for one in mine if one.loss is not None]
        style = {"color": COLORS[places[arm] % len(COLORS)], "linestyle": "none"}
        axes.plot(
            [at[one.value] for one in known],
            [one.loss for one in known],
            **style | {"linestyle": "-"},
            marker=_MARKERS[places[arm] % len(_MARKERS)],
            markersize=4,
            label=short_label(arm),
        )
        best = [(at[one.value], one.loss) for one in known if one.chosen]
        axes.plot(*zip(*best, strict=True), **style, marker="o", markersize=11, fillstyle="none")
        lost = [at[one.value] for one in mine if one.loss is None]
        top = axes.get_xaxis_transform()
        axes.plot(lost, [1] * len(lost), **style, marker="x", transform=top, clip_on=False)
    axes.set_ylabel(CURVES["eval_loss"][1])
    _legend(figure, len(dict.fromkeys(one.arm for one in tried)))
    return _saved(figure, formats)


def _value_axis(
    axes: Any, key: str, values: Sequence[bool | int | float | str]
) -> dict[bool | int | float | str, float]:
    """Make the axis of a key's values, and return the place of each: numbers on a scale, words
    side by side.
    """
    numbers = [one for one in values if isinstance(one, int | float)]
    is_scale = len(numbers) == len(values)
    at = {value: float(value) if is_scale else values.index(value) for value in values}
    if is_scale and min(numbers) > 0 and max(numbers) / min(numbers) >= 4:
        axes.set_xscale("log")
    axes.set_xticks(list(at.values()), [short_label(str(value), 20) for value in values])
    axes.minorticks_off()
    axes.set_xlabel(key)
    return at


def _surface(surface: Surface, formats: Sequence[str]) -> dict[str, bytes]:
    """One metric by the first key of a grid, a line per value of the second."""
    figure, axes = _new(3.2)
    share = 100 if surface.unit == "share" else 1
    _value_axis(axes, surface.key, sorted({cell.place for cell in surface.cells}))
    for number, second in enumerate(surface.lines):
        mine = sorted(
            (cell for cell in surface.cells if cell.second == second), key=lambda cell: cell.place
        )
        style = {"color": COLORS[number % len(COLORS)]}
        axes.errorbar(
            [cell.place for cell in mine],
            [share * cell.value for cell in mine],
            yerr=[[share * gap for gap in gaps] for gaps in zip(*map(_gaps, mine), strict=True)],
            **style,
            fmt=f"-{_MARKERS[number % len(_MARKERS)]}",
            markersize=4,
            elinewidth=0.9,
            label=None if second is None else f"{surface.second} {second:g}",
        )
        best = [(cell.place, share * cell.value) for cell in mine if cell.best]
        for place in best:
            axes.plot(*place, **style, marker="o", markersize=11, fillstyle="none")
    axes.set_ylabel(short_label(f"{surface.label}{', %' * (share == 100)}", 48))
    if surface.second:
        _legend(figure, len(surface.lines))
    return _saved(figure, formats)


def _gaps(cell: Cell) -> tuple[float, float]:
    """How far the interval reaches below and above a value; nothing where there is none."""
    low, high = (cell.value if end is None else end for end in (cell.low, cell.high))
    return max(0.0, cell.value - low), max(0.0, high - cell.value)


def _curves(
    series: dict[str, dict[int | None, list[tuple[float, float]]]],
    unit: str,
    places: dict[str, int],
    formats: Sequence[str],
) -> dict[str, bytes]:
    """One curve per run: arms by colour and marker, their seeds by line."""
    figure, axes = _new(3.2)
    runs = [(arm, seed, points) for arm, seeds in series.items() for seed, points in seeds.items()]
    arms = list(series)
    for number, (arm, seed, points) in enumerate(runs):
        steps, values = zip(*points, strict=True)
        line = LINES[list(series[arm]).index(seed) % len(LINES)]
        # Curves that coincide stay visible: earlier arms are wider, and each run has its markers
        # elsewhere (as a share of its length).
        every = 1 if len(points) < 12 else (0.12 * number / len(runs), 0.12)
        axes.plot(
            steps,
            values,
            line,
            color=COLORS[places[arm] % len(COLORS)],
            marker=_MARKERS[places[arm] % len(_MARKERS)],
            markersize=4,
            markevery=every,
            linewidth=1.2 + 0.7 * min(3, len(arms) - 1 - arms.index(arm)),
            label=short_label(arm if len(series[arm]) == 1 else f"{arm}, seed {seed}"),
        )
    axes.set(xlabel="optimizer step", ylabel=unit)
    _legend(figure, len(runs))
    return _saved(figure, formats)


def _breakdown(
    breakdown: Breakdown, places: dict[str, int], formats: Sequence[str]
) -> dict[str, bytes]:
    """Groups downwards, one point with its interval per arm."""
    arms, groups, share = breakdown.arms, breakdown.groups, breakdown.unit == "share"
    figure, axes = _new(0.9 + len(groups) * max(0.3, 0.16 * len(arms)))
    for number, arm in enumerate(arms):
        shift = (number - (len(arms) - 1) / 2) * 0.7 / max(1, len(arms))
        mine = [one for one in breakdown.cells if one.arm == arm and one.value is not None]
        _points(
            axes,
            mine,
            [groups.index(str(one.group)) + shift for one in mine],
            100 if share else 1,
            fmt=_MARKERS[places[arm] % len(_MARKERS)],
            color=COLORS[places[arm] % len(COLORS)],
            markersize=4,
            linewidth=1.1,
            label=short_label(arm),
        )
    if share:
        axes.axvline(50, color="#888888", linewidth=0.8, linestyle="--")
        axes.set_xlim(-2, 102)
    axes.set_yticks(range(len(groups)), [short_label(group, 30) for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("win rate, %, a tie counts half" if share else "mean grade")
    _legend(figure, len(arms))
    return _saved(figure, formats)


def _points(
    axes: Any, numbers: Sequence[Number], rows: Sequence[float], factor: float, **style: Any
) -> None:
    """Numbers with their intervals, each in its row."""
    values = [factor * (one.value or 0.0) for one in numbers]
    limits = [
        [value if limit is None else factor * limit for limit in (one.low, one.high)]
        for value, one in zip(values, numbers, strict=True)
    ]
    if numbers:
        bars = [
            [max(0.0, value - low) for value, (low, _) in zip(values, limits, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, limits, strict=True)],
        ]
        axes.errorbar(values, rows, xerr=bars, **style)


def _legend(figure: Any, entries: int) -> None:
    """A legend above the axes, where it covers no curve."""
    figure.legend(
        loc="outside upper left",
        frameon=False,
        fontsize=8.5,
        ncols=entries if entries < 5 else 3,
        handlelength=3.2,
    )


def _floor(floors: Sequence[Number], formats: Sequence[str]) -> dict[str, bytes]:
    figure, axes = _new(0.8 + 0.42 * len(floors))
    for row, floor in enumerate(floors):
        _points(axes, [floor], [row], 100, fmt="o", color=COLORS[0], markersize=5)
    names = [f"{short_label(one.metric, 52)}\n{short_label(one.group or '', 52)}" for one in floors]
    axes.set_yticks(range(len(floors)), names, fontsize=8)
    axes.set_xlim(-2, 102)
    axes.set_ylim(len(floors) - 0.5, -0.5)
    axes.set_xlabel("%")
    return _saved(figure, formats)


def short_label(text: str, width: int = 40) -> str:
    """Return a label: one line, control characters and characters outside the font's alphabets
    shown as `?`, cut to a width.

    Example:
        >>> short_label("a\\nb $x$ \\U0001f600")
        'a b $x$ ?'
    """
    one = " ".join(text.split())
    safe = "".join(char if char.isprintable() and ord(char) < 0x2000 else "?" for char in one)
    return safe if len(safe) <= width else safe[: width - 3] + "..."
