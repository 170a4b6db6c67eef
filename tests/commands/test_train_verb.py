"""`recipes train` as the parent of a training, where the disk does not take what it writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.opened import run_and_watch

from recipes_lib.commands import train as train_verb
from recipes_lib.commands.train import _ask_to_stop, _kill_all, _reported, supervise
from recipes_lib.config.launch import plan_launch
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.project import project_root
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.training.process import EXIT_CODE_FILE

WAITS = (
    "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: sys.exit(7)); print('ready',"
    " flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("is_rank", [True, False])
def test_where_no_stop_file_can_be_written_each_rank_gets_the_signal_and_the_launcher_does_not(
    tmp_path: Path, is_rank: bool
) -> None:
    run, report = RunDirectory("one", tmp_path), tmp_path / "exit_code"
    run.stop_file.mkdir(parents=True)  # a rename onto it fails, as any write does on a full disk
    environment = {
        **os.environ,
        EXIT_CODE_FILE: str(report),
        **({"LOCAL_RANK": "1"} if is_rank else {}),
    }
    child = subprocess.Popen(
        [sys.executable, "-c", WAITS],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        _ask_to_stop(run, signal.SIGINT, report)
        if is_rank:
            assert child.wait(timeout=20) == 7
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(timeout=1)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_one_ctrl_c_more_while_the_end_is_recorded_does_not_keep_it_from_that(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(tiny_recipe)
    run = RunDirectory(recipe.name)
    run.path.mkdir(parents=True)
    run.write_state("running")
    killed = _kill_all

    def kill_and_interrupt(*words: Any) -> None:
        killed(*words)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_verb, "_kill_all", kill_and_interrupt)
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    try:
        code = supervise(command, recipe, plan_launch(recipe.launch))
    except KeyboardInterrupt:  # pytest would end at it
        pytest.fail("the interrupt was not handled")
    assert code == ExitCode.FAILED
    state = run.read_state()
    assert (state["state"], state["error"]) == ("failed", "the process ended without a word")
    assert "the training ended without a word" in capsys.readouterr().out


@pytest.mark.parametrize("launch", ["cpu", "ddp_cpu"])
def test_a_training_opens_no_yaml_of_its_recipe(
    tiny_recipe: Path, tmp_path: Path, launch: str
) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {tiny_recipe.name}\nrun: {{name: child}}\n")
    words = ["train", str(child), "train.max_steps=1", "--accelerate", launch]
    done, opened = run_and_watch([sys.executable, "-m", "recipes_lib.cli", *words], tmp_path)
    assert done.returncode == 0, done.stderr
    recipes = [one for one in opened if one.path.parent == tmp_path]
    assert child in [one.path for one in recipes]
    assert not any("recipes_lib.train" in one.words for one in recipes)
    assert (tmp_path / "runs" / "child" / "recipe.yaml").read_text() == child.read_text()


def bare(recipe: Path, *words: str) -> list[str]:
    """The plain command that trains on two ranks."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    config = project_root() / "accelerate_configs" / "ddp_cpu.yaml"
    return [*launcher, str(config), "-m", "recipes_lib.train", str(recipe), *words]


def test_under_a_bare_launch_rank_0_alone_opens_the_recipe_and_both_train_it(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    done, opened = run_and_watch(bare(tiny_recipe, "train.max_steps=1"), tmp_path)
    assert done.returncode == 0 and "DDP, world size 2" in done.stdout, done.stderr
    assert {one.rank for one in opened} == {"", "0", "1"}  # accelerate's config, by each
    assert {one.rank for one in opened if one.path == tiny_recipe} == {"0"}
    assert RunDirectory("tiny").read_state()["state"] == "finished"


@pytest.mark.parametrize("reported", [False, True])
def test_what_is_wrong_with_a_recipe_is_said_once_by_a_bare_launch_of_two_ranks(
    tiny_recipe: Path, tmp_path: Path, reported: bool
) -> None:
    report = tmp_path / "code"
    variables = {"RECIPES_EXIT_CODE_FILE": str(report)} if reported else {}
    done, opened = run_and_watch(bare(tiny_recipe, "train.learnig_rate=1"), tmp_path, **variables)
    said = done.stdout + done.stderr
    assert said.count("unknown key 'train.learnig_rate'") == 1, said
    assert {one.rank for one in opened if one.path == tiny_recipe} == {"0"}
    assert (report.read_text() if reported else str(done.returncode)) == ("2" if reported else "1")
    assert ("Traceback" in said) is not reported  # torch's launcher has its own
    assert not RunDirectory("tiny").exists()


def test_a_stop_file_is_whole_when_a_rank_sees_it(tmp_path: Path) -> None:
    run = RunDirectory("one", tmp_path)
    run.path.mkdir()
    _ask_to_stop(run, signal.SIGINT, tmp_path / "exit_code")
    assert run.stop_file.read_text() == "INT"
    _ask_to_stop(run, signal.SIGTERM, tmp_path / "exit_code")
    assert run.stop_file.read_text() == ""


@pytest.mark.parametrize(("content", "code"), [("75", 75), ("", None), (None, None)])
def test_a_report_that_a_full_disk_left_empty_is_no_report(
    tmp_path: Path, content: str | None, code: int | None
) -> None:
    report = tmp_path / "exit_code"
    if content is not None:
        report.write_text(content)
    assert _reported(report) == code
