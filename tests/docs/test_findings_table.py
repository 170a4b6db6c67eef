from __future__ import annotations

import ast
import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
ONE_WORD = {"confound", "differences", "imported", "subset"}
NO_CODES = {"adapter-config"}


def test_docs_studies_lists_every_finding_that_a_check_can_make_and_no_other():
    page = (PROJECT / "docs" / "studies.md").read_text(encoding="utf-8")
    table = page[page.index("## What is checked") :]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = {code for cell in rows for code in re.findall(r"`([a-z-]+)`", cell)}
    constants = {
        node.value
        for path in (PROJECT / "src/recipes_lib/compare/validity").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    codes = {text for text in constants if re.fullmatch(r"[a-z]+(-[a-z]+)+", text)} - NO_CODES | (
        ONE_WORD & constants
    )
    assert listed == codes
