"""MT-Bench's figure: the mean grade per category and per turn with its interval, as SVG and PNG;
the same numbers give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = {
    "svg.hashsalt": "recipes",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
}
_COLOURS = ("#4477aa", "#cc6677", "#ddaa33", "#228833")


def draw_grades(summary: Mapping[str, Any], stem: Path, title: str) -> list[Path]:
    """Draw the grades of one model and return the files written.

    A dot that is missing has no grade; a dot without a line has too few grades for an interval.

    Args:
        summary: `by_category` and `by_turn` of a result.
        stem: where to, without a suffix.
        title: above the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    categories, turns = list(summary["by_category"]), list(summary["by_turn"])
    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({**_STYLE, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            figsize=(1.6 + 0.9 * len(categories), 3.8), layout="constrained"
        )
        width = 0.5 / len(turns)
        for number, turn in enumerate(turns):
            cells = [summary["by_category"][category][turn] for category in categories] + [
                summary["by_turn"][turn]
            ]
            places = [
                place - 0.25 + width * (number + 0.5)
                for place in (*range(len(categories)), len(categories) + 0.4)
            ]
            _dots(axes, places, cells, f"turn {turn}", _COLOURS[number % len(_COLOURS)])
        names = [
            *(
                f"{category}\nn {summary['by_category'][category]['all']['n']}"
                for category in categories
            ),
            "all",
        ]
        axes.set_xticks([*range(len(categories)), len(categories) + 0.4], names)
        axes.axvline(len(categories) - 0.3, color="0.7", linewidth=0.8)
        axes.set(
            ylim=(0.8, 5.2), yticks=range(1, 6), ylabel="mean grade, 1-5, 95% interval", title=title
        )
        axes.legend(frameon=False, ncols=len(turns), loc="upper left", bbox_to_anchor=(0, -0.18))
        files = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
        figure.savefig(files[0], metadata={"Date": None})
        figure.savefig(files[1], dpi=120, metadata={"Software": None})
        plt.close(figure)
    return files


def _dots(
    axes: Any, places: Sequence[float], cells: Sequence[Mapping[str, Any]], label: str, colour: str
) -> None:
    """One turn's means, with a line where there is an interval."""
    known = [
        (place, cell)
        for place, cell in zip(places, cells, strict=True)
        if cell["estimate"] is not None
    ]
    axes.plot(
        [place for place, _ in known],
        [cell["estimate"] for _, cell in known],
        "o",
        markersize=7,
        label=label,
        color=colour,
    )
    ranges = [
        (place, cell["low"], cell["high"]) for place, cell in known if cell["low"] is not None
    ]
    if ranges:
        axes.vlines(*zip(*ranges, strict=True), color=colour, linewidth=1.6)
