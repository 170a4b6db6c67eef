"""Arrows between packages run downwards: what stands further down in ORDER may import what stands
above it, and nothing else.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import recipes_lib

ROOT = Path(recipes_lib.__file__).parent
ORDER = (
    ("core", "analysis.stats"),
    ("models",),
    ("config",),
    ("data",),
    ("weights",),
    ("training", "plan"),
    ("evals",),
    ("train",),
    ("analysis",),
    ("study",),
    ("slurm",),
    ("commands", "cli", "schema"),
)
# What stands inside functions: libraries that take seconds to import, where a quick verb shares the
# module. It may only become smaller.
MOST_INSIDE_FUNCTIONS = 55
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


@dataclass(frozen=True)
class Import:
    """One module of ours that imports another, both without the package's name."""

    module: str
    imported: str
    in_function: bool
    for_types: bool


@cache
def imports() -> list[Import]:
    """Return every import among our modules, wherever in the file it stands; one statement counts
    once for each module it names.
    """
    files = {
        str(path.relative_to(ROOT).with_suffix(""))
        .replace("/", ".")
        .removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }
    found = []

    def visit(module: str, node: ast.AST, in_function: bool, for_types: bool) -> None:
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("recipes_lib."):
            package = str(node.module).removeprefix("recipes_lib").removeprefix(".")
            names = {f"{package}.{alias.name}".removeprefix(".") for alias in node.names}
            found.extend(
                Import(module, name, in_function, for_types)
                for name in names & files.keys() or {package} - {""}
            )
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for_types |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            visit(module, child, in_function, for_types)

    for module, path in files.items():
        visit(module, ast.parse(path.read_text(encoding="utf-8")), False, False)
    return found


def top(module: str) -> str:
    return module if module in LEVEL else module.split(".")[0]


def test_every_package_has_a_place_in_the_order() -> None:
    assert {
        top(module) for found in imports() for module in (found.module, found.imported)
    } <= LEVEL.keys()


def test_no_import_runs_upwards() -> None:
    assert not {
        (found.module, found.imported)
        for found in imports()
        if LEVEL[top(found.module)] < LEVEL[top(found.imported)]
    }


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Those of one package, and those of packages on one level; what only annotations need is left
    out.
    """
    pairs = {
        (found.module, found.imported)
        for found in imports()
        if not found.for_types and found.module != found.imported
    }
    left = {module for pair in pairs for module in pair}
    while left:
        inner = [pair for pair in pairs if left.issuperset(pair)]
        bound = {one for one, _ in inner} & {other for _, other in inner}
        assert bound != left, f"a circle among {sorted(left)}"
        left = bound


def test_imports_inside_functions_become_fewer() -> None:
    inside = [f"{found.module}: {found.imported}" for found in imports() if found.in_function]
    assert len(inside) <= MOST_INSIDE_FUNCTIONS, f"{len(inside)}: {inside}"
