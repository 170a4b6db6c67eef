"""Measure the shape of the code: its size, its imports and its names.

    python benchmarks/code_shape.py [FOLDER]

FOLDER is src/recipes_lib of any commit, by default of this one.

Nothing is imported, only parsed, so that two commits can be measured by one script.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parents[1] / "src" / "recipes_lib"


def own_imports(node: ast.AST) -> int:
    """Return how many import statements of this package stand inside functions below a node."""
    return sum(
        isinstance(below, ast.ImportFrom) and (below.module or "").startswith("recipes_lib")
        for function in ast.walk(node)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for below in ast.walk(function)
    )


def public_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names of public functions and classes at the top of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


def main(folder: Path) -> None:
    """Print one line per measure."""
    files = sorted(folder.rglob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    trees = [ast.parse(text) for text in texts]
    names = Counter(name for tree in trees for name in set(public_names(tree)))
    twice = sorted(name for name, count in names.items() if count > 1 and name != "main")
    measures = {
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "lines": sum(text.count("\n") for text in texts),
        "longest line": max(len(line) for text in texts for line in text.splitlines()),
        "functions": sum(isinstance(n, ast.FunctionDef) for tree in trees for n in ast.walk(tree)),
        "own imports inside functions": sum(map(own_imports, trees)),
        "dict[str, Any]": sum(text.count("dict[str, Any]") for text in texts),
        "public names in two modules": len(twice),
    }
    for name, value in measures.items():
        print(f"{name:32} {value:>12,}")
    print(" ", ", ".join(twice))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
