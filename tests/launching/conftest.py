"""Profiles written for a test, and programs that stand in for Slurm's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

PROFILE = """\
# yaml-language-server: $schema=profile.schema.json
partition: {train: gpu, eval: gpu-long, report: cpu}
time: "08:00:00"
gres: gpu:h100:{gpus}
cpus_per_gpu: 8
memory_gib_per_gpu: 32
environment: {conda: ml}
"""


def profile_with(*lines: str) -> str:
    """Return the good profile, with lines replaced or added."""
    keys = {line.partition(":")[0] for line in lines}
    kept = [line for line in PROFILE.splitlines() if line.partition(":")[0] not in keys]
    return "\n".join([*kept, *lines]) + "\n"


@pytest.fixture
def profile_file(tmp_path: Path):
    """Writes a profile, with lines replaced or added."""

    def write(*lines: str, name: str = "site") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(profile_with(*lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a program of a given name first in the PATH; each call is noted in <name>.calls, one
    argument a line.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, body: str, ping: str = "UP") -> Path:
        calls = folder / f"{name}.calls"
        path = folder / name
        pinged = (
            f'[ "$1" != ping ] || {{ echo "Slurmctld(primary) at here is {ping}"; exit; }}'
            if name == "scontrol"
            else ""
        )
        path.write_text(
            f'#!/bin/bash\n{pinged}\nprintf "%s\\n" "$@" --- >> "{calls}"\n{body}\n',
            encoding="utf-8",
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return calls

    return make
