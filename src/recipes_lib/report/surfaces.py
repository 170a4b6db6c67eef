"""The metrics of a study over the grid that its arms stand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recipes_lib.compare.claims import Comparison
from recipes_lib.compare.design import Study
from recipes_lib.compare.validity.grid import Grid, grid_of
from recipes_lib.compare.wording import metric_text

if TYPE_CHECKING:
    from recipes_lib.report.runs import Training

MOST_SURFACES = 6


@dataclass(frozen=True)
class Cell:
    """One arm of the grid on one metric."""

    arm: str
    place: float
    second: float | None
    value: float
    low: float | None
    high: float | None
    n: int
    file: str
    best: bool


@dataclass(frozen=True)
class Surface:
    """One metric over the grid; `second` is None where one number differs."""

    metric: str
    label: str
    unit: str
    key: str
    second: str | None
    cells: tuple[Cell, ...]

    @property
    def lines(self) -> list[float | None]:
        """The values of the second key, a line each."""
        return sorted({cell.second for cell in self.cells}, key=lambda value: value or 0.0)

    @property
    def caption(self) -> str:
        """What the figure shows, and how far its best cell may be believed."""
        shown = "the mean of its trainings" if self.metric == "validation_loss" else "its interval"
        lines = f", one line per {self.second}" if self.second else ""
        best = [cell for cell in self.cells if cell.best]
        told = "; it is not known whether more or less is better"
        if best:
            told = (
                f"; the best of {len(self.cells)}, {best[0].arm} with"
                f" {metric_text(best[0].value, self.unit)}, is ringed, and flattered by having"
                " been chosen"
            )
        return f"One arm per point with {shown}{lines}{told}."


def surfaces(
    study: Study | None, comparison: Comparison, trainings: Sequence[Training]
) -> list[Surface]:
    """Return the metrics that every arm of the grid has, the tested ones, the primary one first,
    and the validation loss; none where the study is no grid.
    """
    grid = grid_of(study)
    if grid is None:
        return []
    found: list[Surface] = []
    rows = [row for row in comparison.rows if not row.aside]
    primary = {row.metric for row in rows if row.primary}
    tested = dict.fromkeys(row.metric for row in rows)
    for metric in sorted(tested, key=lambda metric: metric not in primary):
        scores = [score for score in comparison.scores if score.metric == metric]
        for opponent in dict.fromkeys(score.opponent for score in scores):
            mine = [score for score in scores if score.opponent == opponent]
            if opponent not in grid.places and mine:
                label = mine[0].label + (f" against {opponent}" if opponent else "")
                values = {
                    score.arm: (score.value, score.low, score.high, score.n, " ".join(score.files))
                    for score in mine
                    if score.value is not None
                }
                higher = mine[0].higher_is_better
                found.append(_surface(grid, metric, label, mine[0].unit, values, higher))
    losses = [_losses(grid, trainings)] if grid.losses_compare else []
    return [one for one in (*found[:MOST_SURFACES], *losses) if len(one.cells) == len(grid.places)]


_Values = dict[str, tuple[float, float | None, float | None, int, str]]


def _losses(grid: Grid, trainings: Sequence[Training]) -> Surface:
    values: _Values = {}
    for arm in grid.places:
        mine = [one for one in trainings if one.arm == arm]
        losses = [one.validation_loss for one in mine if one.validation_loss is not None]
        if losses:
            mean = sum(losses) / len(losses)
            values[arm] = (mean, None, None, len(losses), mine[0].file)
    label = "validation loss per token"
    return _surface(grid, "validation_loss", label, "number", values, False)


def _surface(
    grid: Grid, metric: str, label: str, unit: str, values: _Values, higher: bool | None
) -> Surface:
    known = [value for value, *_ in values.values()]
    best = max(known, default=None) if higher else min(known, default=None)
    cells = []
    for arm, (place, second) in grid.places.items():
        if arm in values:
            value, low, high, n, file = values[arm]
            is_best = higher is not None and value == best
            cells.append(Cell(arm, place, second, value, low, high, n, file, is_best))
    return Surface(metric, label, unit, grid.key, grid.second, tuple(cells))
