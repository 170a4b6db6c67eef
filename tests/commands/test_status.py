"""`recipes status`: reads files only, and says what to look at next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes_lib.cli import main
from recipes_lib.core.run_directory import RunDirectory


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of runs."""
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path))
    return tmp_path


def make_run(root: Path, name: str, updated: str, **fields) -> RunDirectory:
    run = RunDirectory(name, root)
    run.write_state("finished", **fields)
    state = json.loads(run.state_file.read_text())
    run.state_file.write_text(json.dumps({**state, "updated": updated}))
    return run


def test_the_next_command_is_about_the_newest_run_not_the_last_of_the_alphabet(runs, capsys):
    make_run(runs, "a-new", "2026-11-24T12:00:00+00:00")
    make_run(runs, "z-old", "2026-11-23T12:00:00+00:00")
    assert main(["status"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next: recipes status a-new"


def test_a_run_that_cannot_be_read_costs_only_its_own_line(runs, capsys):
    make_run(runs, "good", "2026-11-24T12:00:00+00:00")
    (runs / "torn").mkdir()
    (runs / "torn" / "run.json").write_text("{")
    (runs / "good" / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\nnot json\n')
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "torn  unreadable" in out and "next: recipes status good" in out
    assert next(line for line in out.splitlines() if line.startswith("good")).split()[1:4] == [
        "finished",
        "3",
        "1.5000",
    ]
    assert main(["status", "torn"]) == 5
    for updated in ("", ', "updated": null', ', "updated": 5'):
        text = f'{{"format_version": 1, "state": "running"{updated}}}'
        (runs / "torn" / "run.json").write_text(text)
        assert main(["status"]) == 0 and "torn  died" in capsys.readouterr().out


def test_one_run_says_not_measured_only_of_what_could_have_been_measured(runs, capsys):
    make_run(
        runs,
        "one",
        "2026-11-24T12:00:00+00:00",
        summary={"steps": 4, "first_validation_loss": None},
    )
    assert main(["status", "one"]) == 0
    assert "first_validation_loss: not measured" in capsys.readouterr().out
