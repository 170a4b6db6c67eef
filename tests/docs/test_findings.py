"""docs/studies.md names every finding that a report can print."""

import ast
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SOURCE = PROJECT / "src" / "recipes_lib"


def test_every_code_of_a_finding_is_explained_in_the_documentation() -> None:
    modules = []
    for package in ("analysis", "study"):
        for file in (SOURCE / package).rglob("*.py"):
            modules.append(ast.parse(file.read_text(encoding="utf-8")))
    constants: dict[str, str] = {}
    for module in modules:
        constants.update(_constants_of(module))
    codes: set[str] = set()
    for module in modules:
        codes.update(_codes_in(module, constants))
    assert len(codes) > 25, "the reading of the source found too few codes to be right"
    text = (PROJECT / "docs" / "studies.md").read_text(encoding="utf-8")
    assert sorted(code for code in codes if f"`{code}`" not in text) == []


def _constants_of(module: ast.Module) -> dict[str, str]:
    constants: dict[str, str] = {}
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    constants[target.id] = str(node.value.value)
    return constants


def _codes_in(module: ast.Module, constants: dict[str, str]) -> Iterator[str]:
    """Yield the codes of the findings that a module makes, written as text or as a constant."""
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        # `finding` is a partial of it, with what several findings of a function share
        if getattr(node.func, "id", "") not in ("Finding", "finding"):
            continue
        given = node.args[:1] + [each.value for each in node.keywords if each.arg == "code"]
        for part in ast.walk(given[0]):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value
            elif isinstance(part, ast.Name) and part.id in constants:
                yield constants[part.id]
