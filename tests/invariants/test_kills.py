"""kill -9 at any moment: the same command again ends with the adapter of the uninterrupted run,
byte for byte.
"""

import os
import signal

import pytest
from tests.conftest import NF4
from tests.invariants.patched import MOMENTS
from tests.tiers import in_ci

pytestmark = pytest.mark.slow

# A constant learning rate: with a decaying one a step too many would change nothing and go
# unnoticed.
OVERRIDES = (
    "lora.lora_dropout=0.2",
    "train.save_total_limit=2",
    "train.lr_scheduler_type=constant",
)
SAVE_STEPS = 2


@pytest.fixture(scope="module")
def whole(launcher) -> bytes:
    launcher.train("run.name=whole", *OVERRIDES)
    return launcher.adapter("whole")


def killed(launcher, moment: str, *words: str) -> tuple[int, str]:
    """Train in a process that kills itself at a moment of step 6."""
    return launcher.start(*words, patch="kill", KILL_MOMENT=moment, KILL_STEP="6").wait()


IN_CI = (
    *("in a step", "in the weights", "before the marker", "in the rotation"),
    *("before the final save", "before the final rename"),
)


@pytest.mark.parametrize("moment", in_ci(MOMENTS, *IN_CI))
def test_a_kill_loses_at_most_save_steps_and_changes_nothing(launcher, whole, moment) -> None:
    name = "killed-" + moment.replace(" ", "-")
    code, said = killed(launcher, moment, f"run.name={name}", *OVERRIDES)
    assert code == -signal.SIGKILL, said[-3000:]
    assert launcher.state(name)["state"] == "running"
    reached = 0 if "preparation" in moment else max(launcher.series(name, "step"))
    said = launcher.train(f"run.name={name}", *OVERRIDES)
    resumed = int(said.split("resuming checkpoint-")[1].split()[0]) if "resuming" in said else 0
    assert reached - resumed <= SAVE_STEPS, said
    assert launcher.adapter(name) == whole
    assert launcher.series(name, "loss") == launcher.series("whole", "loss")
    assert launcher.state(name)["state"] == "finished"


def test_a_killed_qlora_ends_with_the_bytes_of_an_uninterrupted_one(launcher) -> None:
    """4-bit weights are read anew; kernels and adapters must come out as before the kill."""
    words = [NF4, "train.bf16=true", "model.dtype=bfloat16", *OVERRIDES]
    launcher.train("run.name=whole-qlora", *words)
    code, said = killed(launcher, "in a step", "run.name=killed-qlora", *words)
    assert code == -signal.SIGKILL, said[-3000:]
    said = launcher.train("run.name=killed-qlora", *words)
    assert "resuming checkpoint-6" in said
    assert launcher.adapter("killed-qlora") == launcher.adapter("whole-qlora")


def test_a_killed_rank_is_named_and_the_same_command_goes_on(launcher) -> None:
    child = launcher.start("run.name=gone", "train.max_steps=400", *OVERRIDES, config="ddp_cpu")
    launcher.wait_for_step(child, "gone")
    os.kill(child.ranks()[1], signal.SIGKILL)
    code, said = child.wait()
    assert code and "rank 1 was killed" in said and "internal error" not in said, said[-3000:]
    state = launcher.state("gone")
    assert (state["state"], state["exit_code"]) == ("failed", 5)
    assert "rank 1 was killed" in state["error"] and "recipes train resumes" in state["error"]
