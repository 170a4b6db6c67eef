"""Profiles written for a test, programs that stand in for Slurm's, and a real Slurm."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

PROJECT = Path(__file__).resolve().parents[2]
SANDBOX = PROJECT / "launch" / "sandbox.sh"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
PROFILE = {
    "sbatch": {"partition": "gpu", "time": "08:00:00", "gres": "gpu:h100:{gpus}"},
    "stages": {"eval": {"partition": "gpu-long"}, "report": {"partition": "cpu"}},
}


def write_profile(path: Path, values: dict[str, Any]) -> Path:
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    return path


@pytest.fixture
def profile_file(tmp_path: Path):
    """Writes a good profile, with keys replaced or added."""

    def write(name: str = "site", **keys: Any) -> Path:
        return write_profile(tmp_path / f"{name}.yaml", {**PROFILE, **keys})

    return write


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a program first in the PATH; each call is noted in <name>.calls, one argument a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, body: str) -> Path:
        calls = folder / f"{name}.calls"
        (folder / name).write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" --- >> "{calls}"\n{body}\n')
        (folder / name).chmod(0o755)
        return calls

    return make


class Cluster:
    """The cluster, and `recipes` as its user types it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.work.mkdir()
        self.runs = self.work / "runs"
        own = ("SLURM_", "SBATCH_")
        plain = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        self.environment = {
            **plain,
            "SLURM_CONF": str(folder / "slurm" / "etc" / "slurm.conf"),
            "RECIPES_RUNS_ROOT": str(self.runs),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def call(self, *argv: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        where = {"env": self.environment, "cwd": self.work}
        return subprocess.run(argv, **where, capture_output=True, text=True, timeout=timeout)

    def recipes(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return self.call(sys.executable, "-m", "recipes_lib.cli", *words, timeout=timeout)

    def launch(self, *words: str) -> str:
        done = self.recipes("launch", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def profile(self, name: str = "here", **keys: Any) -> Path:
        """Write a profile: the sandbox's, with other values."""
        flags = {"partition": "debug", "time": "00:10:00", "cpus-per-task": "{processes}"}
        sbatch = {**flags, **keys.pop("sbatch", {})}
        values = {"sbatch": sbatch, "offline": False, "signal_lead_s": 60, **keys}
        return write_profile(self.work / f"{name}.yaml", values)

    def jobs(self, name: str) -> dict[str, str]:
        """Return {label: job id} of what was launched."""
        rows = json.loads((self.runs / name / "slurm" / "jobs.json").read_text())["jobs"]
        return {row["label"]: row["id"] for row in rows}

    def queue(self) -> list[str]:
        return self.call("squeue", "-h", "-o", "%i %j %T").stdout.splitlines()

    def states(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the states of the tasks by label, as `recipes launch status` knows them."""
        found = json.loads(self.recipes("launch", "status", name, "--json").stdout)
        return {state["label"]: state for state in found[name]}

    def waiting(self, name: str) -> list[str]:
        """Return the jobs of a launch that have not ended; those that were queued again start at
        once, not after two minutes.
        """
        ask = ("squeue", "-h", "-o", "%i|%T|%r", "-j", ",".join(self.jobs(name).values()))
        lines = self.call(*ask).stdout.splitlines()
        for job in (line.split("|")[0] for line in lines if line.endswith("BeginTime")):
            time.sleep(2)
            self.call("scontrol", "update", f"JobId={job}", "StartTime=now")
        return lines

    def ended(self, name: str, seconds: float = 300) -> dict[str, dict[str, Any]]:
        """Wait for the end of a launch."""
        deadline = time.monotonic() + seconds
        while waiting := self.waiting(name):
            if time.monotonic() > deadline:
                self.call("scancel", *self.jobs(name).values())
                pytest.fail(f"still there after {seconds} s: {waiting}\n{self.log(name)}")
            time.sleep(0.3)
        return self.states(name)

    def log(self, name: str, label: str = "train") -> str:
        path = self.runs / name / "slurm" / f"{label}.log"
        return path.read_text() if path.is_file() else f"no log {path}"

    def run_state(self, name: str) -> dict[str, Any]:
        return json.loads((self.runs / name / "run.json").read_text())

    def adapter(self, name: str) -> bytes:
        return (self.runs / name / "adapter" / "adapter_model.safetensors").read_bytes()

    def steps(self, name: str) -> int:
        """Return how many steps a run has logged."""
        path = self.runs / name / "metrics.jsonl"
        return path.read_text().count('"loss"') if path.is_file() else 0

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what}; queue: {self.queue()}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes. Skipped where Slurm is not installed; in continuous integration that fails."""
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        reason = f"needs root, and of {', '.join(missing)}: apt-get install slurm-wlm munge"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    environment = {**os.environ, "SANDBOX_PORT": str(free_ports())}

    def sandbox(action: str, timeout: float) -> None:
        how: dict[str, Any] = {"env": environment, "capture_output": True, "text": True}
        done = subprocess.run([SANDBOX, action, folder / "slurm"], timeout=timeout, **how)
        assert done.returncode == 0, done.stderr

    sandbox("start", 60)
    try:
        yield Cluster(folder)
    finally:
        sandbox("stop", 120)
        left = processes_of(folder)
    assert not left, f"left behind: {left}"


def free_ports() -> int:
    """Return a port with room for a controller and four nodes, below those where ranks meet."""
    used = {each.laddr.port for each in psutil.net_connections() if each.laddr}
    ports = range(10_000, 11_800, 7)
    return next(port for port in ports if not used & {port, *range(port + 101, port + 105)})


def processes_of(folder: Path) -> list[str]:
    """Return the commands of processes that belong to a cluster: its daemons, its jobs."""
    time.sleep(0.5)
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            is_its = str(folder) in " ".join([*words, *process.environ().values()])
            left += [" ".join(words)] if is_its and words and process.pid != os.getpid() else []
    return left


@pytest.fixture(scope="module")
def tiny(cluster: Cluster, tiny_model_dir: Path, tiny_recipe_text: Callable[[Path], str]) -> Path:
    """The tiny recipe in the cluster's working folder."""
    path = cluster.work / "tiny.yaml"
    path.write_text(tiny_recipe_text(tiny_model_dir))
    return path
