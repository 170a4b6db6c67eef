"""The size of the house and its surface are agreed on: what is new here fails until a person has
weighed it and changed this file.
"""

from __future__ import annotations

from pathlib import Path

from recipes_lib.cli import VERBS

PROJECT = Path(__file__).resolve().parents[1]
SOURCE = PROJECT / "src" / "recipes_lib"

# Lines of Python, after the formatter, docstrings included: what a package may have, and its goal.
# The first number may only fall.
LINES = {
    "commands": (1347, 1500),
    "core": (799, 800),
    "config": (1864, 1900),
    "models": (450, 450),
    "data": (1650, 1650),
    "training": (1542, 1700),
    "weights": (894, 900),
    "plan": (744, 750),
    "evals": (4197, 4300),
    "analysis": (2723, 3000),
    "study": (950, 950),
    "slurm": (795, 800),
}
LARGEST_SOURCE, GOAL_SOURCE = 19_500, 20_000
LARGEST_TESTS, GOAL_TESTS = 15_800, 16_000
MOST_FILES, GOAL_FILES = 93, 95
LARGEST_BENCHMARKS = 1_000
MOST_VERBS = {
    *("new", "ls", "show", "check", "migrate", "explain", "doctor"),
    *("data", "plan", "train", "status", "chat", "merge", "export"),
    *("eval", "judge", "study", "compare", "prefetch", "launch"),
}


def lines(folder: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py"))


def test_no_package_is_larger_than_it_may_be() -> None:
    sizes = {package: lines(SOURCE / package) for package in LINES}
    too_large = {
        package: f"{size} of {LINES[package][0]} lines"
        for package, size in sizes.items()
        if size > LINES[package][0]
    }
    assert not too_large
    assert {path.parent.name for path in SOURCE.glob("*/__init__.py")} == LINES.keys()


def test_source_tests_and_benchmarks_do_not_grow() -> None:
    assert lines(SOURCE) <= LARGEST_SOURCE
    assert lines(PROJECT / "tests") <= LARGEST_TESTS
    assert lines(PROJECT / "benchmarks") <= LARGEST_BENCHMARKS
    assert len([*SOURCE.rglob("*.py")]) <= MOST_FILES


def test_no_verb_is_new() -> None:
    assert {*VERBS} == MOST_VERBS
