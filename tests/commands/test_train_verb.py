"""`recipes train` as the parent of a training: signals, exit codes, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.project import project_root
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.training.finished import finished_line

# A launcher, and below it a rank with a session of its own, as torch's launcher starts it.
LAUNCHER = """
import os, pathlib, subprocess, sys, time
from recipes_lib.core.run_directory import RunDirectory
run = RunDirectory("tiny")
begin = "from recipes_lib.training.stopping import end_with_launcher as e; e(); print()"
rank = subprocess.Popen(
    [sys.executable, "-uc", begin + "; import time; time.sleep(60)"],
    env={**os.environ, "LOCAL_RANK": "0"},
    stdout=subprocess.PIPE,
    start_new_session=True,
)
rank.stdout.readline()
helper = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)  # in the launcher's own group
pathlib.Path("helper").write_text(str(helper.pid))
pathlib.Path("rank").write_text(str(rank.pid))
if "resuming" not in sys.argv:
    run.write_state("running", steps_began="now" if "stepping" in sys.argv else None)
if "dies" in sys.argv:
    os.kill(os.getpid(), 9)
for _ in range(600):
    if run.stop_file.exists() and "deaf" not in sys.argv:
        pathlib.Path(os.environ["RECIPES_EXIT_CODE_FILE"]).write_text("130")
        sys.exit(1)
    time.sleep(0.1)
"""
SUPERVISOR = """
import sys
from recipes_lib.commands.train import supervise
from recipes_lib.config.launch import plan_launch
from recipes_lib.config.recipe import load_recipe
recipe = load_recipe(sys.argv[1])
sys.exit(supervise([sys.executable, "-c", *sys.argv[2:]], recipe, plan_launch(recipe.launch)))
"""


def supervised(recipe: Path, *words: str) -> subprocess.Popen[str]:
    """Start `recipes train`'s part on a launcher that only waits, and return when it does."""
    command = [sys.executable, "-c", SUPERVISOR, str(recipe), LAUNCHER, *words]
    child = subprocess.Popen(command, cwd=recipe.parent, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (RunDirectory("tiny").exists() and (recipe.parent / "rank").exists()):
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    return child


def is_gone(folder: Path, name: str = "rank") -> bool:
    """Whether the process of that name ended."""
    pid = int((folder / name).read_text())
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_first_signal_asks_for_a_checkpoint_and_the_reported_code_is_returned(tiny_recipe):
    child = supervised(tiny_recipe, "stepping")
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 130 and "stopping once" in said
    assert RunDirectory("tiny").stop_file.read_text() == "INT"
    assert is_gone(tiny_recipe.parent)  # none outlives its launcher


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_first_step_a_signal_ends_everything_at_once(tiny_recipe, number):
    words, code = (), 75
    if number == signal.SIGINT:  # a step of an earlier attempt, which was killed, does not count
        RunDirectory("tiny").write_state("running", steps_began="yesterday")
        words, code = ("resuming",), 130
    child = supervised(tiny_recipe, *words)
    child.send_signal(number)
    said, _ = child.communicate(timeout=30)
    assert child.returncode == code and "before the first step" in said
    assert "the same command" in said
    state = RunDirectory("tiny").read_state()
    assert (state["state"], state["exit_code"]) == ("stopped", code)
    assert is_gone(tiny_recipe.parent) and is_gone(tiny_recipe.parent, "helper")


def test_a_rank_whose_launcher_was_ended_before_it_began_does_not_begin(tmp_path: Path) -> None:
    code = "from recipes_lib.training.stopping import end_with_launcher as e; e(); print('began')"
    for folder, began in ((tmp_path, "began\n"), (tmp_path / "gone", "")):
        variables = {"LOCAL_RANK": "0", "RECIPES_EXIT_CODE_FILE": str(folder / "code")}
        said = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True
        )
        assert said.stdout.decode() == began, said.stderr


def test_a_second_ctrl_c_ends_at_once_where_the_first_is_not_heard(tiny_recipe: Path) -> None:
    child = supervised(tiny_recipe, "stepping", "deaf")
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=30)
    assert child.returncode == 130 and "interrupted at once" in said
    assert is_gone(tiny_recipe.parent)


def test_a_launcher_that_is_killed_leaves_no_rank_and_a_failed_run(tiny_recipe: Path) -> None:
    child = supervised(tiny_recipe, "stepping", "dies")
    said, _ = child.communicate(timeout=60)
    assert child.returncode == ExitCode.FAILED and "the training was killed" in said
    assert RunDirectory("tiny").read_state()["state"] == "failed"
    assert is_gone(tiny_recipe.parent)


@pytest.mark.slow
def test_a_bare_launch_of_two_ranks_trains_and_says_errors_once(tiny_recipe, tmp_path, forks):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    config = project_root() / "accelerate_configs" / "ddp_cpu.yaml"
    command = [*launcher, str(config), "-m", "recipes_lib.train", str(tiny_recipe)]
    report = tmp_path / "code"
    variables = {**os.environ, "RECIPES_EXIT_CODE_FILE": str(report)}
    how = {"env": variables, "capture_output": True, "text": True, "timeout": 500}
    done = subprocess.run([*command, "train.learnig_rate=1"], **how)
    _, without_file = forks.start([tiny_recipe, "train.learnig_rate=1"], "ddp_cpu").wait()
    for said in (done.stdout + done.stderr, without_file):
        assert said.count("unknown key 'train.learnig_rate'") == 1, said
        assert "Traceback" not in said and not RunDirectory("tiny").exists(), said
    assert report.read_text() == "2"
    done = subprocess.run([*command, "train.max_steps=1"], capture_output=True, text=True)
    assert done.returncode == 0 and "DDP, world size 2" in done.stdout, done.stderr
    assert RunDirectory("tiny").read_state()["state"] == "finished"


ASK_AGAIN = """
import sys
from recipes_lib.cli import main
codes = [main(["train", *sys.argv[1:]]) for _ in range(2)]
print(codes, [name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""


def test_a_finished_run_is_answered_without_torch_and_without_a_launch(tiny_recipe, capsys) -> None:
    from recipes_lib.train import main

    assert main([str(tiny_recipe), "train.max_steps=1"]) == 0

    def ask(*words: str) -> tuple[str, str]:
        command = [sys.executable, "-c", ASK_AGAIN, str(tiny_recipe), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.stdout, done.stderr

    said, _ = ask("train.max_steps=1")
    assert said.count("run 'tiny' is already finished, nothing to do") == 2
    assert said.count("next: recipes chat tiny") == 2
    assert said.endswith("[0, 0] []\n") and "$" not in said
    said, error = ask("train.max_steps=2")
    assert "finished with other settings: train.max_steps" in error
    assert said.endswith("[2, 2] []\n")
    weights = next((tiny_recipe.parent / "runs/tiny/adapter").glob("*.safetensors"))
    weights.unlink()  # only a training makes them again
    recipe = load_recipe(tiny_recipe, ["train.max_steps=1"])
    assert finished_line(RunDirectory("tiny"), recipe) is None
