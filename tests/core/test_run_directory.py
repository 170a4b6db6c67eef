"""Runs: their states, how they are found, and what is recorded of the machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from recipes_lib.core.environment import environment
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.run_directory import RunDirectory, all_runs, open_run


def test_a_run_that_is_a_link_out_of_the_runs_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match="leads out of"):
        RunDirectory("mine", tmp_path / "runs")


def test_a_state_keeps_the_fields_written_before(tmp_path: Path) -> None:
    run = RunDirectory("mine", tmp_path)
    run.write_state("running", attempts=1)
    run.write_state("finished", exit_code=0)
    state = run.read_state()
    assert state.items() >= {"state": "finished", "attempts": 1, "exit_code": 0}.items()


def test_a_run_is_found_by_name_and_by_folder_and_a_wrong_name_lists_similar_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    RunDirectory("my-first").write_state("finished")
    folder = tmp_path / "runs" / "my-first"
    for word in ("my-first", "my-first/", "runs/my-first", f"{folder}/"):
        assert open_run(word).path == folder
    for word in ("/no/where/my-frist", "my-frist"):
        with pytest.raises(RecipeError, match=r"no .*my-frist.*\n  runs there: my-first"):
            open_run(word)
    assert [run.name for run in all_runs()] == ["my-first"]


def test_a_run_of_another_format_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text(json.dumps({"state": "finished"}))
    with pytest.raises(EnvironmentFault, match=r"format version 1 \(it has 0\)"):
        open_run("old", tmp_path)


def test_no_secret_gets_into_the_record_of_the_environment() -> None:
    planted = {
        "RECIPES_TOKEN": "plain",
        "NCCL_DEBUG": "hf_abcdefghijklmnop",
        "WANDB_API_KEY": "w",
        "HOME": "/x",
        "ACCELERATE_MIXED_PRECISION": "no",
        "RECIPES_JUDGE_URL": "http://me:plain@judge:8000/v1?api_key=plain",
        "NCCL_NET_KEY": "plain",
        "ACCELERATE_CONFIG_URL": "https://plain@host/config.yaml",
        "NCCL_HEADER": "Bearer plainplainplain",
    }
    recorded = environment(planted)["variables"]
    assert recorded == {
        "ACCELERATE_MIXED_PRECISION": "no",
        "NCCL_DEBUG": "***",
        "RECIPES_TOKEN": "***",
        "RECIPES_JUDGE_URL": "http://***@judge:8000/v1?api_key=***",
        "NCCL_NET_KEY": "***",
        "ACCELERATE_CONFIG_URL": "https://***@host/config.yaml",
        "NCCL_HEADER": "***",
    }


def test_the_state_file_is_never_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory("mine", tmp_path)
    run.write_state("running")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.write_state("finished")
    assert run.read_state()["state"] == "running"
    assert [path.name for path in run.path.iterdir()] == ["run.json"]
