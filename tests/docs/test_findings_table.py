from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from recipes_lib.compare.findings import FINDING_TEXTS

PROJECT = Path(__file__).resolve().parents[2]


def test_docs_studies_lists_every_finding_that_a_check_can_make_and_no_other():
    page = (PROJECT / "docs" / "studies.md").read_text(encoding="utf-8")
    table = page[page.index("## What is checked") :]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    listed = {
        code: re.findall(r"error|warning|note", severity)
        for codes, severity in rows
        for code in re.findall(r"`([a-z-]+)`", codes)
    }
    severities = defaultdict(set)
    for kind, (severity, _, _) in FINDING_TEXTS.items():
        severities[kind.partition("/")[0]].add(severity)
    assert listed.keys() == severities.keys()
    assert all(known <= set(listed[code]) for code, known in severities.items())


def test_every_kind_of_finding_is_made_by_a_check():
    folder = PROJECT / "src/recipes_lib/compare"
    checks = "".join(path.read_text(encoding="utf-8") for path in folder.glob("validity/*.py"))
    named = {kind for kind in FINDING_TEXTS if f'"{kind}"' in checks}
    others = {"judge-not-audited", "inside-noise-floor", "false-claims"}
    assert FINDING_TEXTS.keys() - named == others
    assert "found(FALSE_CLAIMS" in (folder / "claims.py").read_text(encoding="utf-8")
    assert "found(NOT_AUDITED" in re.sub(r"\s", "", checks) and "found(INSIDE_NOISE" in checks
