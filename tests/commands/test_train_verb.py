"""`recipes train` as the parent of a training, where the disk does not take what it writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.commands import train as train_verb
from recipes_lib.commands.train import _ask_to_stop, _kill_all, _reported, supervise
from recipes_lib.config.launch import plan_launch
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import ExitCode
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


HOOK = """import os, sys
def note(event, args):
    if event == "open" and str(args[0]).endswith((".yaml", ".yml")):
        with open(os.environ["OPENED"], "a") as log:
            log.write(f"{'recipes_lib.train' in sys.orig_argv} {args[0]}\\n")
sys.addaudithook(note)
"""


@pytest.mark.parametrize("launch", ["cpu", "ddp_cpu"])
def test_a_training_opens_no_yaml_of_its_recipe(
    tiny_recipe: Path, tmp_path: Path, launch: str
) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {tiny_recipe.name}\nrun: {{name: child}}\n")
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    places = [str(tmp_path / "hook"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(places),
        "OPENED": str(tmp_path / "opened"),
    }
    words = ["train", str(child), "train.max_steps=1", "--accelerate", launch]
    done = subprocess.run(
        [sys.executable, "-m", "recipes_lib.cli", *words], env=environment, check=False
    )
    assert done.returncode == 0
    opened = [line.split(" ", 1) for line in (tmp_path / "opened").read_text().splitlines()]
    recipes = [(who, Path(path)) for who, path in opened if Path(path).parent == tmp_path]
    assert ("False", child) in recipes
    assert [path.name for who, path in recipes if who == "True"] == []
    assert (tmp_path / "runs" / "child" / "recipe.yaml").read_text() == child.read_text()


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
