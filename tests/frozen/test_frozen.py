"""Values and bytes that a change of the code's shape must not change: every shipped recipe, a
comparison, its report in three forms.

After a wanted change: UPDATE_GOLDEN=1 pytest tests/frozen/test_frozen.py, and read the diff. Losses
are held by tests/invariants/test_golden.py, the lines given to sbatch by
tests/slurm/test_golden_argv.py, schema/ by `make check`.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.config.recipe import load_recipe
from recipes_lib.training.resume_guard import guarded_values

PROJECT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted(
    path
    for path in (PROJECT / "recipes").glob("*/*.yaml")
    if not path.name.startswith("_") and path.parent.name != "studies"
)

sys.path.insert(0, str(PROJECT / "benchmarks"))


def held(name: str, text: str) -> None:
    """Compare with the golden file, or write it."""
    file = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    before = file.read_text(encoding="utf-8")
    if before != text:
        pytest.fail(
            "\n".join(
                difflib.unified_diff(
                    before.splitlines(), text.splitlines(), name, "now", lineterm="", n=1
                )
            ),
            pytrace=False,
        )


def as_lines(rows: dict[str, Any]) -> Iterable[str]:
    """One key and its value per line, so that a difference reads well."""
    return (f"{key} = {json.dumps(value, sort_keys=True)}" for key, value in sorted(rows.items()))


def test_every_shipped_recipe_resolves_to_the_recorded_values() -> None:
    lines: list[str] = []
    for path in RECIPES:
        recipe = load_recipe(path)
        lines += [
            f"## {path.relative_to(PROJECT)}",
            *as_lines(guarded_values(recipe, "", 1, "one process", {})),
        ]
    held("recipe_values.txt", "\n".join(lines).replace(str(PROJECT), "PROJECT") + "\n")
