"""The quickstart's own part; what it runs is tested where it lives."""

from __future__ import annotations

from copy import copy
from pathlib import Path

import pytest

from recipes_lib import quickstart

PROJECT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("path", "first"), [("", "next: . "), (str(PROJECT), "next: recipes chat ")]
)
def test_the_last_line_can_be_typed_where_no_environment_is_active(
    path: str, first: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {
        "packaged_folder": PROJECT,
        "first_answers": "?",
        "read_object": {"question": "?", "answer": []},
        "tables": "",
        "recipes": 0,
    }
    for name, value in found.items():
        monkeypatch.setattr(quickstart, name, lambda *_, value=value: copy(value))
    monkeypatch.setattr(quickstart.shutil, "which", lambda _: path or None)
    assert quickstart.main() == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(first) and line.endswith("recipes chat quickstart--r8 quickstart--r32")
    monkeypatch.setattr(quickstart, "recipes", lambda _: 130)
    assert quickstart.main() == 130
    assert capsys.readouterr().out.splitlines()[-1] == "make quickstart continues it too"


def test_the_script_stays_readable_in_one_go() -> None:
    assert (
        len(
            (PROJECT / "src" / "recipes_lib" / "quickstart.py")
            .read_text(encoding="utf-8")
            .splitlines()
        )
        <= 80
    )
