"""The page "How a number comes to be" names functions and classes that exist, in at most eight
stops each.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PAGE = (
    (PROJECT / "CONTRIBUTING.md")
    .read_text(encoding="utf-8")
    .split("## How a number comes to be")[1]
)
LISTS = re.findall(r"^(A.*):\n((?:\d+\. .*\n)+)", PAGE, re.MULTILINE)
STOPS = re.findall(r"^\d+\. `(\S+): (\w+)`", PAGE, re.MULTILINE)


def test_four_values_are_followed_in_at_most_eight_stops() -> None:
    assert len(LISTS) == 4
    assert all(2 < len(stops.splitlines()) <= 8 for _, stops in LISTS)
    assert len(STOPS) == sum(len(stops.splitlines()) for _, stops in LISTS)


@pytest.mark.parametrize(("file", "name"), STOPS)
def test_a_stop_exists(file: str, name: str) -> None:
    tree = ast.parse((PROJECT / "src" / "recipes_lib" / file).read_text(encoding="utf-8"))
    assert name in {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
