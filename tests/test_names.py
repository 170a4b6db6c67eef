"""A public name means one thing: no two modules define the same one at their top level."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import recipes_lib

ROOT = Path(recipes_lib.__file__).parent
# What every verb, program and suite has under one name. The list may only become shorter.
SHARED = {
    "run": "commands/",
    "ACTIONS": "commands/",
    "EPILOG": "commands/",
    "main": "",
}


def public_names(tree: ast.Module) -> set[str]:
    """The classes, functions and constants of a module that do not begin with an underscore."""
    names = {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    }
    targets = [
        target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
    ]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    names |= {
        name.id
        for target in targets
        for name in ast.walk(target)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }
    return {name for name in names if not name.startswith("_")}


def test_no_public_name_is_defined_in_two_modules() -> None:
    modules = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        for name in public_names(ast.parse(path.read_text(encoding="utf-8"))):
            modules[name].append(path.relative_to(ROOT).as_posix())
    twice = {
        name: files
        for name, files in modules.items()
        if len(files) > 1
        and not (name in SHARED and all(file.startswith(SHARED[name]) for file in files))
    }
    assert not twice
    assert {name for name in SHARED if len(modules[name]) > 1} == SHARED.keys(), (
        "a name that nobody shares any more"
    )


# A name says what a thing is; these say that there is one.
NO_NAMES = {"one", "its", "told", "found", "mine", "whose", "here", "theirs", "twin"}


def names_given(tree: ast.Module) -> set[str]:
    """The variables, arguments, functions and classes that a module names."""
    fields = {
        id(line.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for line in node.body
        if isinstance(line, ast.AnnAssign)
    }  # of a record on the disk
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names |= set() if id(node) in fields else {node.id}
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
    return names


def test_a_name_says_what_the_thing_is() -> None:
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in ROOT.rglob("*.py")
        for name in names_given(ast.parse(path.read_text(encoding="utf-8"))) & NO_NAMES
    }
    assert not wrong
