"""Arrows between packages run downwards: what stands further down in ORDER may import what stands
above it, and nothing else.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

import recipes_lib

ROOT = Path(recipes_lib.__file__).parent
ORDER = (
    ("core", "stats"),
    ("models", "doctor"),
    ("config",),
    ("data",),
    ("weights",),
    ("training", "plan"),
    ("evals",),
    ("train",),
    ("analysis",),
    ("study",),
    ("jobs",),
    ("slurm",),
    ("commands", "cli", "config.schema"),
)
# What stands inside functions: libraries that take seconds to import, where a quick verb shares the
# module. It may only become smaller.
MOST_INSIDE_FUNCTIONS = 55
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


class Import(NamedTuple):
    """One module of ours that imports another, both without the package's name."""

    module: str
    imported: str
    in_function: bool
    for_types: bool

    @property
    def tops(self) -> list[str]:
        """The packages of both, or the modules that have a place of their own."""
        names = (self.module, self.imported)
        return [name if name in LEVEL else name.split(".")[0] for name in names]


@cache
def imports() -> list[Import]:
    """Return every import among our modules, wherever in the file it stands; one statement counts
    once for each module it names.
    """
    files = {}
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        files[name.removesuffix(".__init__")] = path
    result = []

    def visit(module: str, node: ast.AST, in_function: bool, for_types: bool) -> None:
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("recipes_lib."):
            package = str(node.module).removeprefix("recipes_lib").removeprefix(".")
            names = {f"{package}.{alias.name}".removeprefix(".") for alias in node.names}
            named = names & files.keys() or {package} - {""}
            result.extend(Import(module, name, in_function, for_types) for name in named)
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for_types |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            visit(module, child, in_function, for_types)

    for module, path in files.items():
        visit(module, ast.parse(path.read_text(encoding="utf-8")), False, False)
    return result


def test_no_import_runs_upwards_and_every_package_has_a_place_in_the_order() -> None:
    upwards = {
        (line.module, line.imported)
        for line in imports()
        if LEVEL[line.tops[0]] < LEVEL[line.tops[1]]
    }
    assert not upwards


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Those of one package, and those of packages on one level; what only annotations need is left
    out.
    """
    lines = [line for line in imports() if not line.for_types and line.module != line.imported]
    pairs = {(line.module, line.imported) for line in lines}
    left = {module for pair in pairs for module in pair}
    while left:
        inner = [pair for pair in pairs if left.issuperset(pair)]
        bound = {module for module, _ in inner} & {imported for _, imported in inner}
        assert bound != left, f"a circle among {sorted(left)}"
        left = bound


def test_files_of_config_do_not_lead_in_a_circle_even_for_annotations() -> None:
    """launch.py was about recipes, recipe.py about launches, and upstream.py about both."""
    pairs = {(line.module, line.imported) for line in imports()}
    pairs = {pair for pair in pairs if all(name.startswith("config.") for name in pair)}
    while pairs:
        importing = {module for module, _ in pairs}
        leaves = {pair for pair in pairs if pair[1] not in importing}
        assert leaves, f"a circle among {sorted(importing)}"
        pairs -= leaves


def test_imports_inside_functions_become_fewer() -> None:
    inside = [f"{line.module}: {line.imported}" for line in imports() if line.in_function]
    assert len(inside) <= MOST_INSIDE_FUNCTIONS, f"{len(inside)}: {inside}"
