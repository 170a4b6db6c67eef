"""A name says what the thing is."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

import recipes_lib

ROOT = Path(recipes_lib.__file__).parent
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in ROOT.rglob("*.py")
}
# These say that there is a thing.
NO_NAMES = {"one", "its", "told", "found", "mine", "whose", "here", "theirs", "twin"}
DEFINITIONS = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def names_in(nodes: Sequence[ast.AST]) -> set[str]:
    """The variables that are set in nodes."""
    inner = [node for outer in nodes for node in ast.walk(outer)]
    names = [node for node in inner if isinstance(node, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


def test_a_name_says_what_the_thing_is() -> None:
    wrong = []
    for file, tree in TREES.items():
        nodes = list(ast.walk(tree))
        names = [node.name for node in nodes if isinstance(node, DEFINITIONS)]
        names += [node.arg for node in nodes if isinstance(node, ast.arg)]
        fields = [
            line.target.id
            for node in nodes
            if isinstance(node, ast.ClassDef)
            for line in node.body
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        ]  # of a record on the disk
        names += names_in([tree]) - {*fields}
        wrong += [f"{file}: {name}" for name in NO_NAMES & {*names}]
    assert not wrong
