"""launch/with_judge.sh: a judge's server for as long as a command takes. vLLM is stood in for by a server of this project's tests."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "with_judge.sh"
STAND_IN = Path(__file__).with_name("served_judge.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    program = tmp_path / "own environment" / "vllm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "VLLM": str(program), "PORT": str(free_port()), "REPORT": str(tmp_path / "eval a.reported")}


@pytest.mark.parametrize("code", [0, 6])
def test_the_judge_answers_while_the_command_runs_and_is_gone_after_it(environment, tmp_path: Path, code: int) -> None:
    asks = f"import os, sys, urllib.request as u; print(u.urlopen(os.environ['RECIPES_JUDGE_URL'] + '/models').read()); sys.exit({code})"
    words = [str(SCRIPT), "org/judge", "--max-model-len", "4096", "--", sys.executable, "-c", asks, "$(touch oops)"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == code and '"id": "org/judge"' in done.stdout, done.stderr
    log = (tmp_path / "eval a.judge.log").read_text()
    assert f"serve org/judge --served-model-name org/judge --host 127.0.0.1 --port {environment['PORT']} --max-model-len 4096" in log
    assert not answers(int(environment["PORT"])) and not (tmp_path / "oops").exists()


def test_a_server_that_ends_before_it_answers_is_exit_5_with_its_last_words(environment, tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, "broken", "--", "touch", "ran"], env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 5 and "no memory for the cache" in done.stderr and not (tmp_path / "ran").exists()


def test_term_ends_the_command_and_its_judge(environment, tmp_path: Path) -> None:
    words = [str(SCRIPT), "org/judge", "--", "sh", "-c", "touch up; exec sleep 60"]
    child = subprocess.Popen(words, env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == 143
    while answers(int(environment["PORT"])):
        assert time.monotonic() < deadline
        time.sleep(0.05)
