"""The quickstart's own part; what it runs is tested where it lives."""

from __future__ import annotations

import json
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
        "read_object": {"question": "?", "answer": [], "suite": "checks"},
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


def test_the_answers_to_one_prompt_stand_below_the_table_of_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path))
    study = quickstart.load_study(PROJECT / "recipes" / "studies" / "quickstart.yaml")
    for one in study.evals:
        for names in quickstart.run_names(study).values():
            items = tmp_path / names[0] / "evals" / one.name / "items.jsonl"
            items.parent.mkdir(parents=True)
            asked = {"instruction": "Why?", "answer": f"{one.name} of {names[0]}"}
            items.write_text(json.dumps({} if one.suite.name == "heldout_loss" else asked))
    monkeypatch.setattr(quickstart, "packaged_folder", lambda _: PROJECT)
    monkeypatch.setattr(quickstart, "recipes", lambda _: 0)
    monkeypatch.setattr(quickstart, "tables", lambda _: "a table")
    found = {"question": "?", "answer": [], "suite": "checks"}
    monkeypatch.setattr(quickstart, "read_object", lambda _: copy(found))
    assert quickstart.main() == 0
    out = capsys.readouterr().out
    assert "quickstart--r8: quickstart--house_style of quickstart--r8" in out.replace("/", "--")
    assert out.count("Why?") == 1


def test_the_script_stays_readable_in_one_go() -> None:
    assert (
        len(
            (PROJECT / "src" / "recipes_lib" / "quickstart.py")
            .read_text(encoding="utf-8")
            .splitlines()
        )
        <= 80
    )
