"""Runs: their states, and how they are found."""

import json
from pathlib import Path

import pytest

from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.run_directory import RunDirectory, all_runs, open_run


def test_a_run_that_is_a_link_out_of_the_runs_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tmp_path)
    with pytest.raises(RecipeError, match="leads out of"):
        RunDirectory("mine", tmp_path / "runs")


def test_a_state_keeps_the_fields_written_before(tmp_path: Path) -> None:
    run = RunDirectory("mine", tmp_path)
    run.write_state("running", attempts=1)
    run.write_state("finished", exit_code=0)
    state = run.read_state()
    assert state.items() >= {"state": "finished", "attempts": 1, "exit_code": 0}.items()
    run.state_file.write_text(json.dumps({"state": "imported"}))
    with pytest.raises(EnvironmentFault, match=r"not a run\.json of this version"):
        open_run("mine", tmp_path)


def test_a_run_is_found_by_name_and_by_folder_and_a_wrong_name_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunDirectory("my-first").write_state("finished")
    folder = tmp_path / "runs" / "my-first"
    for word in ("my-first", "my-first/", "runs/my-first", f"{folder}/"):
        assert open_run(word).path == folder
    for word in ("/no/where/my-frist", "my-frist"):
        with pytest.raises(RecipeError, match="no run named 'my-frist'"):
            open_run(word)
    RunDirectory("recipes--my-dpo").write_state("finished")
    for word, near in (("my-dpo", "recipes--my-dpo"), ("my-frist", "my-first")):
        with pytest.raises(RecipeError) as error:
            open_run(word)
        assert error.value.hints[0] == f"did you mean {near}?"
    with pytest.raises(RecipeError) as error:
        open_run("recipes/my-dpo.yaml")
    assert "name the recipe's run" in str(error.value)
    assert [run.name for run in all_runs()] == ["my-first", "recipes--my-dpo"]
