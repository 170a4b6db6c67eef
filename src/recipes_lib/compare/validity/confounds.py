"""Confounds in the recipes: what differs between two arms besides the declared factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from recipes_lib.compare.findings import Finding
from recipes_lib.compare.validity.settings import (
    Values,
    arm_values,
    changes_result,
    declared_by,
    differing,
    pairs,
    setting_text,
    with_derived_values,
)

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import Measurements

_NAMED = 4


def check_confounds(study: Study | None, measurements: Measurements) -> Iterator[Finding]:
    """Yield one finding per two arms that differ in an undeclared key.

    It lists every such key. Keys that only decide what is written, or how the same batch is cut,
    are listed too and marked; where there are no others the finding is a note. Without a study no
    factor is declared and no cause is claimed: the list is a note.
    """
    values = arm_values(study, measurements)
    for first, second in pairs(values):
        one, other = with_derived_values(values[first], values[second])
        keys = [key for key in differing(one, other) if declared_by(study, key, one, other) is None]
        if keys:
            yield _finding(study, first, second, keys, one, other)


def _finding(
    study: Study | None, first: str, second: str, keys: list[str], one: Values, other: Values
) -> Finding:
    heavy = [key for key in keys if changes_result(key, one, other)]
    listed = [*heavy, *(key for key in keys if key not in heavy)]
    evidence = tuple(
        f"{key}: {first} {setting_text(one.get(key))}, {second} {setting_text(other.get(key))}"
        + ("" if key in heavy else " (changes no result)")
        for key in listed
    )
    if study is None:
        title = (
            f"{first} and {second} differ in {_names(listed)}: no factor is declared, so no"
            " difference has a named cause"
        )
        return Finding(
            "differences",
            "note",
            title,
            evidence,
            "declare what is meant to differ: write a study",
            (first, second),
        )
    if heavy == ["train.seed"] and differing(one, other) == heavy:
        title = f"{first} and {second} differ in nothing but the seed: an A/A pair"
        return Finding(
            "differences",
            "note",
            title,
            evidence,
            "their difference is the noise floor of every other one",
            (first, second),
        )
    if heavy == ["train.seed"]:
        title = f"{first} and {second} were trained with other seeds, which is chance and no cause"
        return Finding(
            "differences",
            "note",
            title,
            evidence,
            "the same seeds: both then see the rows in one order",
            (first, second),
        )
    if not heavy:
        title = f"{first} and {second} differ in {_names(listed)}, which changes no result"
        return Finding("differences", "note", title, evidence, "nothing to do", (first, second))
    title = f"{first} and {second} also differ in {_names(heavy)}, which no factor declares"
    remedy = (
        "give both arms the same values, or declare them under factors and add the missing cells"
    )
    return Finding("confound", "error", title, evidence, remedy, (first, second))


def _names(keys: list[str]) -> str:
    """The first keys, and how many more."""
    more = len(keys) - _NAMED
    return ", ".join(keys[:_NAMED]) + (f" and {more} more" if more > 0 else "")
