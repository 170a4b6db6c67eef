"""Who may write into a run: a later try of a Slurm job takes over from a lost one, and never do two
write.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recipes_lib.core import run_lock as lock
from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.run_directory import RunDirectory

HOLDER = """
    import sys, time; from pathlib import Path; from recipes_lib.core import run_lock as lock
    lock.HEARTBEAT_S = 0.2
    folder = Path(sys.argv[1])
    with lock.run_lock(folder):
        while not (folder / "STOP").exists():
            time.sleep(0.05)
            with (folder / "written").open("a") as file:
                lock.end_if_taken_over(folder)
                file.write("x")
            print("held", flush=True)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a process that holds `mine` until it is asked to stop; this process beats and loses
    patience in tenths of seconds.
    """
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(lock, "LOST_AFTER_S", 3.0)
    monkeypatch.setattr(lock, "_heartbeat", None)
    children = []

    def begin(**environment: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "mine")]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        child = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**plain, **environment},
        )
        children.append(child)
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        return child

    yield begin
    for child in children:
        child.send_signal(signal.SIGCONT)
        child.kill()
        child.communicate()


def as_try(monkeypatch: pytest.MonkeyPatch, job: str, count: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))


def test_a_later_try_of_a_job_asks_the_earlier_one_to_stop_and_waits_for_its_end(
    start, tmp_path: Path, monkeypatch, capsys
) -> None:
    child = start(SLURM_JOB_ID="7")
    as_try(monkeypatch, "7", 1)
    with lock.run_lock(tmp_path / "mine"):
        assert child.wait(timeout=10) == 0
        note = json.loads((tmp_path / "mine" / "lock.json").read_text())
        assert (note["pid"], note["job"], note["try"]) == (os.getpid(), "7", 1)
    assert f"still held by process {child.pid} on host" in capsys.readouterr().out


def test_a_try_without_a_heartbeat_loses_its_lock_and_ends_when_it_wakes(
    start, tmp_path: Path, monkeypatch
) -> None:
    child = start(SLURM_JOB_ID="7")
    child.send_signal(signal.SIGSTOP)
    as_try(monkeypatch, "7", 1)
    begun = time.monotonic()
    with lock.run_lock(tmp_path / "mine"):
        assert time.monotonic() - begun >= 3.0
        (tmp_path / "mine" / "STOP").unlink()
        before = (tmp_path / "mine" / "written").stat().st_size
        child.send_signal(signal.SIGCONT)
        _, said = child.communicate(timeout=10)
        assert child.returncode == 5 and "taken over by process" in said and "(Slurm job 7)" in said
        assert (tmp_path / "mine" / "written").stat().st_size == before
        time.sleep(0.5)  # two heartbeats of ours
        assert json.loads((tmp_path / "mine" / "lock.json").read_text())["pid"] == os.getpid()
        with pytest.raises(EnvironmentFault, match="in use"), lock.run_lock(tmp_path / "mine"):
            pass  # the lock that was taken over keeps others out
    assert not (tmp_path / "mine" / "lock.json").exists()


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [({"SLURM_JOB_ID": "7"}, ("7", 0)), ({"SLURM_JOB_ID": "6"}, ("7", 1)), ({}, ("7", 1))],
)
def test_another_job_and_another_shell_of_one_job_are_refused_at_once(
    start, tmp_path: Path, monkeypatch, theirs, mine
) -> None:
    child = start(**theirs)
    as_try(monkeypatch, *mine)
    with (
        pytest.raises(EnvironmentFault, match=f"in use by process {child.pid}"),
        lock.run_lock(tmp_path / "mine"),
    ):
        pass
    assert not (tmp_path / "mine" / "STOP").exists() and child.poll() is None


def test_a_holder_without_a_sign_of_life_comes_with_the_way_out_and_it_works(
    start, tmp_path: Path
) -> None:
    child = start()
    child.send_signal(signal.SIGSTOP)
    time.sleep(3.2)
    with pytest.raises(EnvironmentFault) as caught, lock.run_lock(tmp_path / "mine"):
        pass
    way_out = caught.value.hints[-1]
    assert "last sign of life was 3 s ago" in way_out or "last sign of life was 4 s ago" in way_out
    for name in way_out.rpartition("rm ")[2].split():
        Path(name).unlink()
    with lock.run_lock(tmp_path / "mine"):
        child.send_signal(signal.SIGCONT)
        assert child.wait(timeout=10) == 5


def test_a_process_that_was_taken_over_writes_no_state(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import json; from pathlib import Path
        from recipes_lib.core.run_directory import RunDirectory
        from recipes_lib.core.run_lock import run_lock
        run = RunDirectory("mine", Path({str(tmp_path)!r}))
        with run_lock(run.path):
            run.write_state("running")
            (run.path / "lock.json").write_text(json.dumps({{"token": "other", "pid": 1, "host": "b", "since": "now"}}))
            run.write_state("finished")
    """)  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 5 and "taken over by process 1 on host b" in done.stderr
    assert RunDirectory("mine", tmp_path).read_state()["state"] == "running"
    assert (tmp_path / "mine" / "lock.json").exists()  # the other's note
