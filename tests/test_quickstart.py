"""The quickstart's own part: the style is counted once per state of the weights. What it runs is
tested where it lives.
"""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path

import pytest

from recipes_lib import quickstart
from recipes_lib.compare.design import load_study
from recipes_lib.study.steps import build_graph

PROJECT = Path(__file__).resolve().parents[1]
ROWS = PROJECT / "recipes" / "quickstart" / "data" / "instructions.jsonl"
PROMPTS = PROJECT / "recipes" / "quickstart" / "data" / "heldout_prompts.jsonl"


def test_every_shipped_answer_has_the_style_that_is_counted() -> None:
    answers = [
        json.loads(line)["response"] for line in ROWS.read_text(encoding="utf-8").splitlines()
    ]
    assert all(quickstart.STYLE.match(text) for text in answers)
    assert not quickstart.STYLE.match("In short: yes.") and not quickstart.STYLE.match(
        "The sky is blue.\nGood to know: it is not."
    )


def test_no_held_out_prompt_is_a_training_row() -> None:
    asked = {
        json.loads(line)["instruction"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()
    }
    assert len(asked) == 20
    assert not asked & {
        json.loads(line)["instruction"] for line in ROWS.read_text(encoding="utf-8").splitlines()
    }


def test_the_style_is_asked_again_only_when_the_weights_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path))
    study, asked = load_study("quickstart"), []

    def answers(names: list[str], prompts: list[dict[str, str]]) -> dict[str, list[str]]:
        asked.append(names)
        return {
            name: ["In short: a.\nGood to know: b.", *["no"] * (len(prompts) - 1)] for name in names
        }

    monkeypatch.setattr(quickstart, "held_out_answers", answers)
    found = quickstart.style_check(study, PROMPTS)
    assert found["quickstart--r8"] == {
        "in_style": 1,
        "n": 20,
        "first": "In short: a.\nGood to know: b.",
    }
    assert quickstart.style_check(study, PROMPTS) == found
    assert len(asked) == 1
    graph = build_graph(study)
    for name in ("train.r8", "check.r8"):
        graph.finish(graph.steps[name], "other weights", [])
    quickstart.style_check(study, PROMPTS)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("path", "first"), [("", "next: . "), (str(PROJECT), "next: recipes chat ")]
)
def test_the_last_line_can_be_typed_where_no_environment_is_active(
    path: str, first: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {
        "packaged_folder": PROJECT,
        "style_check": {"prompt": "?"},
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
        <= 180
    )
