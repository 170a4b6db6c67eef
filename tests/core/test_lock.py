"""Who may write into a folder: never two; a requeued batch job waits for its earlier try."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recipes_lib.core import run_directory as lock
from recipes_lib.core.errors import EnvironmentFault

HOLDER = """
import sys, time; from pathlib import Path; from recipes_lib.core.run_directory import run_lock
folder = Path(sys.argv[1])
with run_lock(folder):
    print("held", flush=True)
    while not (folder / "STOP").exists() or "deaf" in sys.argv:
        time.sleep(0.05)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that holds `mine` until it is asked to stop."""
    children = []

    def begin(*words: str, **environment: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", HOLDER, str(tmp_path / "mine"), *words]
        usual = {name: value for name, value in os.environ.items() if "RECIPES_JOB" not in name}
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=usual | environment)
        children.append(child)
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        return child

    yield begin
    for child in children:
        child.kill()
        child.communicate()


def queued_again(monkeypatch: pytest.MonkeyPatch, job: str, count: int) -> None:
    monkeypatch.setenv("RECIPES_JOB", job)
    monkeypatch.setenv("RECIPES_JOB_RESTARTS", str(count))


def test_a_requeued_job_stops_its_earlier_try_and_waits(start, tmp_path, monkeypatch, capsys):
    child = start(RECIPES_JOB="7")
    queued_again(monkeypatch, "7", 1)
    with lock.run_lock(tmp_path / "mine"):
        assert child.wait(timeout=10) == 0
        note = json.loads((tmp_path / "mine" / "lock.json").read_text())
        assert f"process {os.getpid()} on" in note["holder"]
        assert (note["job"], note["restarts"]) == ("7", 1)
    assert f"still in use by process {child.pid} on host" in capsys.readouterr().out
    assert not (tmp_path / "mine" / "lock.json").exists()


def test_a_holder_that_lives_is_never_taken_over(start, tmp_path: Path, monkeypatch) -> None:
    """Another job and another shell of one job are refused at once, a job that was queued again
    when its earlier try has not ended in time.
    """
    monkeypatch.setattr(lock, "REQUEUE_WAIT_S", 1.0)
    for holder, caller, is_asked in (
        ({"RECIPES_JOB": "7"}, ("7", 0), False),
        ({"RECIPES_JOB": "6"}, ("7", 1), False),
        ({}, ("7", 1), False),
        ({"RECIPES_JOB": "7"}, ("7", 1), True),
    ):
        child = start("deaf", **holder)
        child.send_signal(signal.SIGSTOP)  # nothing is heard of it, and it may wake at any time
        queued_again(monkeypatch, *caller)
        with (
            pytest.raises(EnvironmentFault, match=f"in use by process {child.pid}") as caught,
            lock.run_lock(tmp_path / "mine"),
        ):
            pass
        assert "rm " in caught.value.hints[-1] and lock.is_held(tmp_path / "mine")
        assert (tmp_path / "mine" / "STOP").exists() is is_asked and child.poll() is None
        child.kill()
        child.wait()


def test_a_killed_holder_keeps_nothing_and_the_next_one_waits_where_it_may(start, tmp_path, capsys):
    child = start()
    child.kill()
    child.wait()
    with lock.run_lock(tmp_path / "mine"):
        assert lock.is_held(tmp_path / "mine")
    assert not lock.is_held(tmp_path / "mine")
    child = start()
    threading.Timer(1.0, (tmp_path / "mine" / "STOP").touch).start()  # while the next one waits
    with lock.run_lock(tmp_path / "mine", wait=True):
        assert child.wait(timeout=10) == 0
    assert "waiting for it" in capsys.readouterr().out
