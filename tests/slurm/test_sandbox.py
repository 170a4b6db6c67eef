"""launch/sandbox.sh itself: one command in, its exit code out, and nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.slurm.conftest import NEEDED, SANDBOX, free_ports, processes_of

pytestmark = [pytest.mark.nightly, pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture
def environment(tmp_path: Path, cluster) -> dict[str, str]:
    """The sandbox's folder lies in TMPDIR, so what it leaves behind can be found. `cluster` says
    where there is no Slurm.
    """
    assert NEEDED and cluster
    return {**os.environ, "TMPDIR": str(tmp_path), "SANDBOX_PORT": str(free_ports())}


def test_run_gives_the_exit_code_of_the_command_and_leaves_nothing(
    environment, tmp_path: Path
) -> None:
    done = subprocess.run(
        [SANDBOX, "run", "bash", "-c", "sinfo -h; exit 7"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7 and "node[1-4]" in done.stdout
    assert processes_of(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_a_sandbox_that_is_told_to_end_stops_its_cluster(environment, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [SANDBOX, "run", "sh", "-c", "touch $TMPDIR/up; exec sleep 60"], env=environment
    )
    deadline = time.monotonic() + 40
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=40) == 143
    assert processes_of(tmp_path) == []
