"""This machine as a card: its cores and memory, with speeds measured per core for SmolLM2-135M."""

from __future__ import annotations

import os
from pathlib import Path

from recipes_lib.planning.cards import Card
from recipes_lib.planning.settings import Settings

# Tokens per CPU second of LoRA training, SmolLM2-135M, one thread of a server CPU with AVX512-BF16,
# torch 2.13 (2026-11-24, n=1 each): 4bit counted over the steps, the others from whole runs less an
# estimated start, so good to a fifth. As 4N operations per token. Another CPU, above all one
# without bf16 instructions, is slower.
_TOKENS_PER_CPU_SECOND = {"bf16": 400.0, "fp32": 155.0, "4bit": 305.0}
MEASURED_PARAMETERS = 134_515_008  # SmolLM2-135M's
CPU_BASIS = (
    "measured with SmolLM2-135M on one core of another machine; elsewhere taken as proportional"
)
SCALING = 0.85  # threads of one process share caches and memory
GENERATED_TOKENS_PER_SECOND = 95.0  # SmolLM2-135M, batched, two idle threads: 75-116
JUDGED_TOKENS_PER_SECOND = 774.0  # the same, prompts of 480 tokens in 0.62 s


def cpu_card() -> Card:
    """Return this machine's processor."""
    cores = usable_cores()
    title = f"this machine, {cores} core{'s' if cores != 1 else ''}"
    return Card(
        "cpu",
        title,
        round(available_gib(), 1),
        tflops=cores**SCALING * _rate("bf16"),
        bandwidth=10.0,
        link=2.0,
        mfu=1.0,
        basis=CPU_BASIS,
    )


def cpu_tflops(settings: Settings, card: Card) -> float:
    """Return what the cores reach in the precision of a training."""
    kind = "4bit" if settings.bits else "bf16" if settings.compute_bytes == 2 else "fp32"
    return card.tflops * _rate(kind) / _rate("bf16")


def usable_cores() -> int:
    """Return the cores this process may use: OMP_NUM_THREADS where it is set, else those it is
    allowed on.
    """
    written = os.environ.get("OMP_NUM_THREADS", "")
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(int(written), allowed) if written.isdigit() and int(written) > 0 else allowed


def available_gib() -> float:
    """Return the memory that can be had now: what is free or can be freed, and no more than the
    control group allows.
    """
    gib = _meminfo("MemAvailable")
    cached = _meminfo("Cached")  # file cache, which a control group counts as used and gives back
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most = int((Path("/sys/fs/cgroup") / limit).read_text())
            gib = min(
                gib, (most - int((Path("/sys/fs/cgroup") / used).read_text())) / 2**30 + cached
            )
        except (OSError, ValueError):
            continue
    return max(gib, 0.1)


def _meminfo(key: str) -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 2**20
    except (OSError, StopIteration, ValueError):
        return 1024.0 if key == "MemAvailable" else 0.0  # not Linux: no opinion


def _rate(kind: str) -> float:
    """TFLOP/s of one core."""
    return 4 * MEASURED_PARAMETERS * _TOKENS_PER_CPU_SECOND[kind] / 1e12


def two_threads_tflops() -> float:
    """Return the rate of the two threads that generation and judging were measured with."""
    return 2**SCALING * _rate("bf16")
