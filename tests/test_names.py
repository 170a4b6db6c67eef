"""A public name means one thing, and a name says what the thing is."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import recipes_lib

ROOT = Path(recipes_lib.__file__).parent
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in ROOT.rglob("*.py")
}
# What every program has under one name. The list may only become shorter.
SHARED = {"main": ""}
# These say that there is a thing.
NO_NAMES = {"one", "its", "told", "found", "mine", "whose", "here", "theirs", "twin"}
DEFINITIONS = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def names_in(nodes: Sequence[ast.AST]) -> set[str]:
    """The variables that are set in nodes."""
    inner = [node for outer in nodes for node in ast.walk(outer)]
    names = [node for node in inner if isinstance(node, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


def test_no_public_name_is_defined_in_two_modules() -> None:
    modules = defaultdict(list)
    for file, tree in TREES.items():
        names = {node.name for node in tree.body if isinstance(node, DEFINITIONS)}
        targets = [node.targets for node in tree.body if isinstance(node, ast.Assign)]
        targets += [[node.target] for node in tree.body if isinstance(node, ast.AnnAssign)]
        for name in names.union(*map(names_in, targets)):
            modules[name].append(file)
    twice = {
        name: files
        for name, files in modules.items()
        if len(files) > 1 and not name.startswith("_")
        if name not in SHARED or not all(file.startswith(SHARED[name]) for file in files)
    }
    assert not twice
    assert {name for name in SHARED if len(modules[name]) > 1} == SHARED.keys(), (
        "a name that nobody shares any more"
    )


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
