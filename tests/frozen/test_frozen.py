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
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.compare.claims import compare_arms
from recipes_lib.compare.measurements import read_measurements
from recipes_lib.compare.validity import check_validity
from recipes_lib.config.recipe import load_recipe
from recipes_lib.report.content import gather
from recipes_lib.report.documents import write_report
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


def test_a_comparison_and_its_report_are_the_recorded_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import synthetic_runs

    monkeypatch.chdir(tmp_path)
    folders = synthetic_runs.write_study(Path("runs"), ("r8", "r32"), 24, flips=0.2, unparsed=0.02)
    measurements = read_measurements(folders)
    comparison = compare_arms(measurements, check_validity(None, measurements))
    held(
        "comparison.json",
        without_moment(json.dumps(comparison.to_dict(), indent=1, sort_keys=True)) + "\n",
    )
    write_report(tmp_path / "report", gather("frozen", measurements, comparison))
    for name in ("report.md", "report.tex", "report.html"):
        held(name, without_moment((tmp_path / "report" / name).read_text(encoding="utf-8")))


def without_moment(text: str) -> str:
    """A text without what the day, the machine (the last digits of a number) and the drawing
    library decide.
    """
    text = re.sub(r"\d+\.\d{7,}(e-?\d+)?", lambda number: f"{float(number[0]):.6g}", text)
    text = re.sub(
        r"<(svg|style|script)\b(?! type=\"application/json\").*?</\1>",
        r"<\1/>",
        text,
        flags=re.DOTALL,
    )  # files of their own
    text = re.sub(r"data:[a-z/+]+;base64,[A-Za-z0-9+/=]+", "data:", text)
    return re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+00:00| UTC)?", "WHEN", text)
