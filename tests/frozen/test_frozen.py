"""Every shipped recipe resolves to the recorded values.

After a wanted change: UPDATE_GOLDEN=1 pytest tests/frozen/test_frozen.py, and read the diff.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

from recipes_lib.config.recipe import load_recipe
from recipes_lib.training.resume_guard import guarded_values

PROJECT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden" / "recipe_values.txt"


def test_every_shipped_recipe_resolves_to_the_recorded_values() -> None:
    lines: list[str] = []
    recipes = [
        path
        for path in (*PROJECT.glob("recipes/*/*.yaml"), *PROJECT.glob("examples/*/*-r*.yaml"))
        if not path.name.startswith("_") and path.parent.name != "studies"
    ]
    for path in sorted(recipes):
        values = sorted(guarded_values(load_recipe(path), "", 1, "one process", {}).items())
        lines += [f"## {path.relative_to(PROJECT)}"]
        lines += [f"{key} = {json.dumps(value, sort_keys=True)}" for key, value in values]
    text = "\n".join(lines).replace(str(PROJECT), "PROJECT") + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    before = GOLDEN.read_text(encoding="utf-8").splitlines()
    assert not list(difflib.unified_diff(before, text.splitlines(), "recorded", "now", n=0))
