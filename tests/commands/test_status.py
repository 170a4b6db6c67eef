"""`recipes status`: reads files only, and says what to look at next."""

import json

from recipes_lib.cli import main
from recipes_lib.core.run_directory import RunDirectory


def make_run(root, name: str, updated: str, **fields) -> None:
    run = RunDirectory(name, root)
    run.write_state("finished", **fields)
    state = json.loads(run.state_file.read_text())
    run.state_file.write_text(json.dumps({**state, "updated": updated}))


def status(capsys, *words: str, code: int = 0) -> list[str]:
    assert main(["status", *words]) == code
    return capsys.readouterr().out.splitlines()


def test_the_table_and_one_run_and_the_next_command(tmp_path, monkeypatch, capsys):
    """A run that cannot be read costs only its own line; the next command is about the newest run
    and not the last of the alphabet.
    """
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path))
    assert status(capsys)[-1] == "next: recipes train quickstart/lora-r8"
    make_run(tmp_path, "a-new", "2026-11-24T12:00:00+00:00", summary={"first_loss": None})
    make_run(tmp_path, "z-old", "2026-11-23T12:00:00+00:00")
    (tmp_path / "a-new" / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\nnot json\n')
    torn = tmp_path / "torn" / "run.json"
    torn.parent.mkdir()
    torn.write_text("{")
    _, new, unreadable, _, last = status(capsys)
    assert new.split()[:4] == ["a-new", "finished", "3", "1.5000"]
    assert unreadable.split()[:2] == ["torn", "unreadable"] and last == "next: recipes status a-new"
    status(capsys, "torn", code=5)
    torn.write_text('{"state": "running", "updated": null}')
    assert any(line.split()[:2] == ["torn", "died"] for line in status(capsys))
    note = {"holder": "process 7 on host gpu3"}  # of a process that was killed
    (tmp_path / "a-new" / "lock.json").write_text(json.dumps(note))
    shown = status(capsys, "a-new")
    assert shown[0] == "a-new: finished"
    assert "  first_loss: not measured" in shown and shown[-1] == "next: recipes chat a-new"
