"""Many looks at one comparison share its 5%."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from recipes_lib.statistics.looks import Look, level_share

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import peeking

ALL = Look("all", "plan", complete=True)


def shares(*looks: Look, planned: int = 1) -> list[float]:
    """The part of each look, in their order."""
    return [level_share(looks[:place], one, planned) for place, one in enumerate(looks)]


def test_one_look_at_everything_that_was_planned_has_everything() -> None:
    assert shares(ALL) == shares(ALL, ALL)[1:] == [1.0]


@pytest.mark.parametrize("planned", [1, 3])
def test_the_parts_of_all_looks_are_never_more_than_everything(planned: int) -> None:
    early = [Look(f"{number} seeds", "plan") for number in range(30)]
    grown = [Look(f"{number} more", f"plan {number}", complete=True) for number in range(5)]
    found = shares(*early, ALL, *grown, planned=planned)
    assert sum(found) <= 1 + 1e-12 and max(found) >= 0.8
    assert found.index(max(found)) == len(early) + planned - 1
    assert not any(found[len(early) + planned :])


def test_a_plan_that_was_cut_short_after_a_look_has_no_last_look() -> None:
    cut = Look("2 seeds", "2 seeds", complete=True)
    assert shares(Look("1 seed", "9 seeds"), cut) == pytest.approx([0.1, 0.1 / 3])


def test_the_same_results_are_charged_once_and_seen_again_at_their_part() -> None:
    first, other = Look("1 seed", "plan"), Look("2 seeds", "plan")
    assert shares(first, other, first)[2] == 0.1
    complete = Look("1 seed", "plan", complete=True)  # nothing was missing after all
    assert shares(first, other, complete)[2] == pytest.approx(1 - 0.1 / 3)
    assert shares(ALL, other, ALL) == [1, 0, 1]


def test_whoever_looks_without_a_plan_uses_up_none() -> None:
    assert shares(Look("1 seed"), ALL) == [0.1, 0.9]


def test_stopping_when_significant_makes_false_claims_in_at_most_5_of_100_studies() -> None:
    studies = 600
    found = peeking.claimed(peeking.KINDS[0], studies)
    assert found.pop("nobody counts") > 0.1
    most = 0.05 + 2 * (0.05 * 0.95 / studies) ** 0.5
    assert max(found.values()) <= most and min(found.values()) > 0.005, found
