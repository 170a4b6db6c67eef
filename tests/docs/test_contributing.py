"""CONTRIBUTING: "How a number comes to be" names functions and classes that exist, in at most eight
stops each, and the words of its glossary are the code's.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
TEXT = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGE = TEXT.split("## How a number comes to be")[1]
WORDS = re.findall(
    r"^\| (\w+) \| \S.*\|$", TEXT.split("## Words")[1].split("\n## ")[0], re.MULTILINE
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


def names_in_the_code() -> set[str]:
    """The parts of every name in src: `judged_rows` and `JudgedRows` are judged and rows."""
    found: set[str] = set()
    for path in (PROJECT / "src" / "recipes_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "id", None) or getattr(node, "attr", None)
            for one in (name, getattr(node, "name", None), getattr(node, "arg", None)):
                found.update(part.lower() for part in re.findall(r"[A-Z]?[a-z]+", str(one)))
    return found


def test_the_glossary_has_at_most_25_words_in_order_and_the_code_uses_each() -> None:
    assert 20 < len(WORDS) <= 25 + 1  # with the table's head
    head, *words = WORDS
    assert head == "word" and words == sorted(set(words))
    assert set(words) <= names_in_the_code()
