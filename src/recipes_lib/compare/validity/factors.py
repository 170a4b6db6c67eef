"""The design of a study: cells that nobody fills, and factors that never vary apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from recipes_lib.compare.design_check import missing_cells
from recipes_lib.compare.findings import Finding
from recipes_lib.compare.validity.settings import arm_values, differing, setting_text

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import Measurements


def check_factors(study: Study | None, measurements: Measurements) -> Iterator[Finding]:
    """Yield missing cells, and pairs of factors that are confounded with each other."""
    if study is None or len(study.factors) < 2:
        return
    yield from _missing(study)
    yield from _aliased(study, measurements)


def _missing(study: Study) -> Iterator[Finding]:
    """One finding for all cells of the factorial that have no arm."""
    cells = missing_cells(study)
    if cells:
        evidence = tuple(
            "no arm has " + ", ".join(f"{factor}: {level}" for factor, level in cell.items())
            for cell in cells
        )
        what = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
        title = f"{what} of the factorial {'has' if len(cells) == 1 else 'have'} no arm"
        yield Finding(
            "missing-cell",
            "warning",
            title,
            evidence,
            "add an arm for each: an effect there cannot be told from the others",
        )


def _aliased(study: Study, measurements: Measurements) -> Iterator[Finding]:
    """Per two arms: factors that change together in every two arms of the study, so that no effect
    is one's own.
    """
    cells = {arm.name: arm.cell for arm in study.arms if set(study.factors) <= set(arm.cell)}
    changed = {
        (first, second): {
            factor for factor in study.factors if cells[first][factor] != cells[second][factor]
        }
        for first, second in itertools.combinations(cells, 2)
    }
    values = arm_values(study, measurements)
    for one, other in itertools.combinations(study.factors, 2):
        together = [pair for pair, factors in changed.items() if {one, other} <= factors]
        apart = [pair for pair, factors in changed.items() if len({one, other} & factors) == 1]
        for first, second in () if apart else together:
            keys = differing(values.get(first, {}), values.get(second, {}))
            evidence = [
                f"{factor}: {first} {cells[first][factor]}, {second} {cells[second][factor]}"
                for factor in (one, other)
            ]
            evidence += [
                f"{study.factor_of(key)}, {key}: {first} {setting_text(values[first].get(key))},"
                f" {second} {setting_text(values[second].get(key))}"
                for key in keys
                if study.factor_of(key) in (one, other)
            ]
            title = f"{one} is confounded with {other}: they change together in every arm"
            remedy = f"add arms that change {one} alone and {other} alone"
            yield Finding(
                "confound-factors", "error", title, tuple(evidence), remedy, (first, second)
            )
