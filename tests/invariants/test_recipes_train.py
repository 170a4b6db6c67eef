"""`recipes train`: the exit code that a launcher loses, one message, and Ctrl-C that ends in a
checkpoint.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from tests.tiers import in_ci

pytestmark = pytest.mark.slow
# as many as last longer than a second process takes to load torch
LONG = ("train.max_steps=4000", "train.save_steps=4000", "train.eval_strategy='no'")


def verb(launcher, *words: str) -> list[str]:
    return [sys.executable, "-m", "recipes_lib.cli", "train", str(launcher.recipe), *words]


EXPLODES = ["lora=null", "train.adam_epsilon=0", "train.lr_scheduler_type=constant"]
FAILURES = {
    # an error of the data has a class of its own, which must reach the other rank as it is
    "wrong-column": (None, ["data.columns={instruction: nope}"], 4, "'nope'"),
    "wrong-length": (None, ["train.max_length=4"], 4, "no supervised token"),
    "no-rows": (None, ["data.filters={max_tokens: 1}"], 4, "max_tokens"),
    "every-rank": (None, EXPLODES, 3, "gradient norm is nan"),
    "in-step-3": ("fail_on_rank_1", [], 5, "out of memory"),
    "before-step-1": ("fail_early_on_rank_1", [], 4, "lacks a file"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_is_said_once_and_its_exit_code_is_left(name, launcher, tmp_path) -> None:
    """Of rank 1 alone, too: rank 0 loses its connection or is ended, which is a consequence and no
    message. `recipes train` reads the code in the file, which a launcher loses.
    """
    patch, words, code, message = FAILURES[name]
    file, words = tmp_path / "code", [f"run.name={name}", *words]
    report = {"RECIPES_EXIT_CODE_FILE": str(file)}
    launched, said = launcher.start(*words, config="ddp_cpu", patch=patch, **report).wait()
    # a launcher is told 0 where every rank ends by itself; one in a collective is ended by it
    is_ended_by_launcher = name == "in-step-3"
    assert (launched, file.read_text()) == (int(is_ended_by_launcher), str(code)), said[-5000:]
    assert said.count(message) == 1 and "internal error" not in said, said[-5000:]
    assert "before the first step" not in said and "Traceback" not in said, said[-5000:]
    state = launcher.state(name)
    assert (state["state"], state["exit_code"]) == ("failed", code) and message in state["error"]


CTRL_C, TERM = (signal.SIGINT, 130), (signal.SIGTERM, 75)


@pytest.mark.parametrize(
    ("config", "number", "code"),
    in_ci((("ddp_cpu", *CTRL_C), ("fsdp_cpu", *TERM)), ("ddp_cpu", *CTRL_C)),
)
def test_a_signal_ends_in_a_checkpoint(launcher, config, number, code) -> None:
    name = f"stopped-{config}-{code}"
    words = ["--accelerate", config, f"run.name={name}"]
    child = launcher.start_really(verb(launcher, *words, *LONG))
    launcher.wait_for_step(child, name)
    os.kill(child.pid, number)
    stopped, said = launcher.wait(child)
    state = launcher.state(name)
    assert (stopped, state["state"], state["exit_code"]) == (code, "stopped", code), said[-2000:]
    saved = launcher.run(name) / f"checkpoints/checkpoint-{state['step']}"
    assert (saved / "COMPLETE.json").is_file()
    assert "Traceback" not in said, said[-3000:]


@pytest.mark.nightly
@pytest.mark.parametrize("seconds", [1, 4])
@pytest.mark.parametrize("start", ["ddp_cpu", "without recipes train"])
def test_ctrl_c_while_a_training_starts_is_one_line_and_130(launcher, start, seconds) -> None:
    words = [f"run.name=hasty-{start.replace(' ', '-')}-{seconds}", *LONG]
    is_verb = start == "ddp_cpu"
    command = verb(launcher, "--accelerate", start, *words) if is_verb else launcher.command(*words)
    child = launcher.start_really(command)
    time.sleep(seconds)
    os.kill(child.pid, signal.SIGINT)
    code, said = launcher.wait(child)
    assert code == 130 and "Traceback" not in said, said[-3000:]
    assert said.count("interrupted before the first step") + said.count("stopping once") == 1


@pytest.mark.parametrize(("number", "code"), [CTRL_C, TERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_to_every_process_spares_data_workers_until_the_checkpoint(launcher, number, code):
    """A terminal sends Ctrl-C, and Slurm SIGTERM, to data workers too: without them there is no
    last step.
    """
    name = f"group-{code}"
    child = launcher.start(f"run.name={name}", "train.dataloader_num_workers=2", *LONG)
    launcher.wait_for_step(child, name)
    os.killpg(child.pid, number)
    stopped, said = launcher.wait(child)
    assert (stopped, launcher.state(name)["state"]) == (code, "stopped"), said[-3000:]
    assert said.count("stopping once") == (number == signal.SIGINT), said[-3000:]
    assert "Traceback" not in said


@pytest.mark.nightly
def test_a_second_ctrl_c_ends_at_once_and_leaves_no_process(launcher) -> None:
    """Steps of about two seconds: a short one would be over before the second Ctrl-C."""
    words = ["--accelerate", "ddp_cpu", "run.name=impatient", *LONG]
    words += ["train.per_device_train_batch_size=1", "run.global_batch_size=128"]
    child = launcher.start_really(verb(launcher, *words))
    launcher.wait_for_step(child, "impatient")
    for _ in range(2):
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.2)  # else both may come as one
    code, said = launcher.wait(child)
    assert code == 130 and "the same command resumes" in said, said[-2000:]
    state = launcher.state("impatient")
    assert (state["state"], state["exit_code"]) == ("stopped", 130)
    time.sleep(2)  # a killed process takes a moment to give its memory back
    assert not [pid for pid in Path("/proc").glob("[0-9]*") if runs(pid, "run.name=impatient")]


def test_a_second_training_is_told_who_holds_the_run_and_a_killed_one_is_said_to_be_so(launcher):
    child = launcher.start_really(verb(launcher, "run.name=gone", *LONG))
    launcher.wait_for_step(child, "gone")
    code, said = launcher.train_here("run.name=gone", *LONG)
    assert code == 5 and "in use by process" in said, said
    assert launcher.state("gone")["state"] == "running"
    worker = next(
        int(pid.name)
        for pid in Path("/proc").iterdir()
        if pid.name.isdigit() and runs(pid, "recipes_lib.train") and runs(pid, "run.name=gone")
    )
    os.kill(worker, signal.SIGKILL)
    code, said = launcher.wait(child)
    assert code == 1 and "the training was killed (out of memory?)" in said
    assert launcher.state("gone")["state"] == "failed"


def test_two_machines_train_as_one_and_both_end_with_the_training_s_code(launcher) -> None:
    """Two "machines" of one process each on this one, started by the same command with ranks 0 and
    1.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["--accelerate", "ddp_cpu", "--nodes", "2", "--gpus", "1", "run.name=machines"]
    words += ["--main-process-ip", "127.0.0.1", "--main-process-port", port]
    words += ["train.max_steps=2", "train.eval_strategy='no'"]
    machines = [
        launcher.start_really(verb(launcher, "--machine-rank", str(rank), *words))
        for rank in (0, 1)
    ]
    (first, said), (second, silent) = map(launcher.wait, machines)
    assert (first, second) == (0, 0), said + silent
    assert "DDP, world size 2" in said and "step 2/2  loss" in said
    assert "machine 1 of 2" in silent and "loss" not in silent
    assert launcher.state("machines")["state"] == "finished"


def runs(process: Path, word: str) -> bool:
    try:
        return word in (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
