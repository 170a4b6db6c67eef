"""launch/with_judge.sh with a stand-in for vLLM: a server lives as long as a command wants it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "with_judge.sh"
STAND_IN = Path(__file__).with_name("served_judge.py")
# what a command does that wants its judge
WAITS = (
    'touch "$RECIPES_JUDGE_WANTED"; '
    'until [ -e "$RECIPES_JUDGE_WANTED.answers" ]; do sleep 0.05; done; '
)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    program = tmp_path / "own environment" / "vllm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    program.chmod(0o755)
    log = str(tmp_path / "eval a.judge.log")
    return {**os.environ, "VLLM": str(program), "PORT": "20001", "JUDGE_LOG": log}


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Callable[..., CompletedProcess[str]]:
    """Run a command with a judge."""
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 55, "cwd": tmp_path}
    return lambda *words: subprocess.run([SCRIPT, *words], env=environment, **how)


@pytest.mark.parametrize("code", [0, 6])
def test_the_judge_answers_while_the_command_runs_and_is_gone_after_it(run, tmp_path, code):
    asks = (
        "import os, sys, urllib.request as u; url = os.environ['RECIPES_JUDGE_URL']; "
        "print(url, os.path.exists('eval a.judge.log')); os.system(sys.argv[2]); "
        f"print(u.urlopen(url + '/models').read()); sys.exit({code})"
    )
    command = [sys.executable, "-c", asks, "$(touch oops)", WAITS]
    done = run("org/judge", "--max-model-len", "4096", "--", *command)
    assert done.returncode == code and '"id": "org/judge"' in done.stdout, done.stderr
    assert run("org/judge", "--", "sh", "-c", "exit 3").returncode == 3  # it asks no judge
    assert "/v1 False\n" in done.stdout and not list(tmp_path.glob("*.wanted*"))
    log = (tmp_path / "eval a.judge.log").read_text()
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/v1", done.stdout).group(1))
    words = (
        f"serve org/judge --served-model-name org/judge --host 127.0.0.1 --port {port}"
        " --max-model-len 4096 --served-model-name org/judge"
    )
    assert re.search(rf"{re.escape(words)} judge-[0-9a-f]{{16}}\n", log), log
    assert port != 20001 and not answers(port) and not (tmp_path / "oops").exists()


def test_a_server_that_ends_or_is_another_one_ends_the_command_with_exit_5(run, tmp_path) -> None:
    """`usurped` serves the same model at the same port, under no name of this job."""
    cases = {
        "broken": ("no memory for the cache",),
        "mortal": ("ended while it was needed:", "the engine died"),
        "usurped": ("another server answers at",),
    }
    for model, words in cases.items():
        command = "touch stop; exec sleep 60" if model == "mortal" else "touch ran"
        done = run(model, "--", "sh", "-c", WAITS + command)
        assert done.returncode == 5 and all(what in done.stderr for what in words), done.stderr
        assert not (tmp_path / "ran").exists()
    # a later try of a job must not delete what the judge said before it failed
    assert "no memory for the cache" in (tmp_path / "eval a.judge.log").read_text()


def test_term_ends_the_command_and_its_judge(environment, tmp_path: Path) -> None:
    command = WAITS + "echo $RECIPES_JUDGE_URL > coming; mv coming up; exec sleep 60"
    words = [SCRIPT, "org/judge", "--", "sh", "-c", command]
    child = subprocess.Popen(words, env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    port = int((tmp_path / "up").read_text().rpartition(":")[2].partition("/")[0])
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=40) == 143
    while answers(port):
        assert time.monotonic() < deadline
        time.sleep(0.05)
