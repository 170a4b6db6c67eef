"""How much of the machine other programs used while a training ran. Times of trainings compare only
where that is little.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import torch

_STATISTICS = Path("/proc/stat")
_IDLE = (3, 4)  # idle and iowait; guests, from 8 on, are in the user time already
_ASK_TIMEOUT_S = 10


def processes_here() -> int:
    """Return how many processes of this training run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class LoadMeter:
    """Reads how busy others kept the processors that this process may use."""

    def __init__(self) -> None:
        self._before = _processor_seconds()

    def others(self) -> float | None:
        """Return the share of these processors' time that other programs took since the last call;
        None where the system does not tell. Time is counted in ticks of 10 ms: over short times the
        share is coarse, and may be below zero. The other processes of this training count as busy
        as this.
        """
        before, now = self._before, _processor_seconds()
        self._before = now
        if before is None or now is None or now[0] <= before[0]:
            return None
        wall, busy, own = (late - early for late, early in zip(now, before, strict=True))
        processors = len(os.sched_getaffinity(0))
        return (busy - own * processes_here()) / (processors * wall)


def _processor_seconds() -> tuple[float, float, float] | None:
    """The time now, the busy seconds of our processors, and those of this process and its
    children.
    """
    if not _STATISTICS.is_file():
        return None
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = sum(
        sum(int(part) for place, part in enumerate(parts[1:9]) if place not in _IDLE)
        for parts in map(str.split, _STATISTICS.read_text(encoding="ascii").splitlines())
        if parts[0] in ours
    )
    # Those of children that still run, data workers, are in no total yet.
    working = sum(_ticks_of(child.pid) for child in multiprocessing.active_children())
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own = sum(one.ru_utime + one.ru_stime for one in used)
    a_second = os.sysconf("SC_CLK_TCK")
    return time.monotonic(), ticks / a_second, own + working / a_second


def _ticks_of(process: int | None) -> int:
    with suppress(OSError):
        told = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return sum(map(int, told.rpartition(")")[2].split()[11:13]))
    return 0


def other_gpu_processes() -> int | None:
    """Return how many processes besides this training's use the GPUs it has on this machine, by
    nvidia-smi; None where there is no GPU, or nobody tells. A container may hide them.
    """
    program = shutil.which("nvidia-smi")
    if program is None or not torch.cuda.is_available():
        return None
    numbers = range(min(processes_here(), torch.cuda.device_count()))
    ours = [str(torch.cuda.get_device_properties(number).uuid) for number in numbers]
    words = [program, "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(
            words, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=True
        ).stdout
        users = [line for line in told.splitlines() if any(uuid in line for uuid in ours)]
        return max(0, len(users) - processes_here())
    return None
