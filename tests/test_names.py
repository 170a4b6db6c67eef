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
