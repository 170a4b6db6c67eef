"""Arrows between packages run downwards: what stands further down in ORDER may import what stands above it, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import recipes_lib

ROOT = Path(recipes_lib.__file__).parent
ORDER = (
    ("redaction", "errors", "terminal", "atomic_files", "json_files", "faults", "statistics"),
    ("recipe",),
    ("runs",),
    ("data",),
    ("planning",),
    ("training",),
    ("eval_log",),
    ("judging",),
    ("generation",),
    ("suites",),
    ("evaluate", "train"),
    ("foreign",),
    ("compare",),
    ("report",),
    ("study",),
    ("launching",),
    ("diagnosis",),
    ("commands", "quickstart", "cli"),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def imports() -> set[tuple[str, str]]:
    """Every import of one module of ours by another, wherever in the file it stands: (module, imported), without the package's name."""
    files = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path for path in ROOT.rglob("*.py")}
    found = set()
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("recipes_lib."):
                package = str(node.module).removeprefix("recipes_lib.")
                names = {f"{package}.{alias.name}" for alias in node.names}
                found |= {(module, name) for name in names & files.keys()} or {(module, package)}
    return found


def top(module: str) -> str:
    return module.split(".")[0]


def test_every_package_has_a_place_in_the_order() -> None:
    assert {top(module) for pair in imports() for module in pair} <= LEVEL.keys()


def test_no_import_runs_upwards() -> None:
    assert not {(one, other) for one, other in imports() if LEVEL[top(one)] < LEVEL[top(other)]}


def test_packages_of_one_level_do_not_import_each_other_in_a_circle() -> None:
    pairs = {(top(one), top(other)) for one, other in imports() if top(one) != top(other) and LEVEL[top(one)] == LEVEL[top(other)]}
    left = {name for pair in pairs for name in pair}
    while left:
        free = {name for name in left if not any(one == name and other in left for one, other in pairs)}
        assert free, f"a circle among {sorted(left)}"
        left -= free
