"""Rows of how fast two arms trained: the effect is the ratio of their tokens per second, from the
times of single steps that metrics.jsonl holds.

Only the steps of a run's last process count: what it ran on is recorded, and its first steps are
left out, which grow memory and choose kernels. Steps beside a validation or a save have no time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from recipes_lib.compare.measurements import Measurements, RunMeasurements
from recipes_lib.compare.row import TableRow
from recipes_lib.compare.wording import NONE, count, plain_number, sentence_list
from recipes_lib.statistics.throughput import FEWEST_STEPS, StepTimes, compare_rates

WARM_UP = 10  # steps at the beginning, of a short training a tenth of its steps
MOST_OF_OTHERS = 0.1  # share of the processors' time that other programs may take
_TIMES = "{row.ratio} {row.limits} times as fast as {second} ({row.per}): {evidence}."
_CPU = re.compile(r"CPU, (\d+) cores, (\d+) threads?")


@dataclass(frozen=True, kw_only=True)
class SpeedRow(TableRow):
    """A comparison whose tested difference is the logarithm of a ratio of speeds.

    Args:
        per: what the speed is, in words.
    """

    sentences: ClassVar[Mapping[str, str]] = {
        "difference": f"{{first}} trains {_TIMES}",
        "association": f"{{first}} trained {_TIMES}",
        "one recipe": f"{{first}} trained {_TIMES}",
    }
    item: ClassVar[str] = "step"
    of_results: ClassVar[bool] = False
    better_words: ClassVar[tuple[str, str]] = ("faster", "slower")

    metric: str = "training_speed"
    unit: str = "ratio"
    per: str

    @property
    def difference(self) -> float | None:
        """The logarithm of the ratio."""
        if self.tested is not None:
            return self.tested.effect
        one, other = self.first_value, self.second_value
        return math.log(one / other) if one and other else None

    @property
    def where(self) -> str:
        """The metric, in a sentence."""
        return "training speed"

    @property
    def largest(self) -> float:
        """A ratio can be any."""
        return math.inf

    def shown(self, effect: float | None) -> float | None:
        """Return a logarithm as a ratio."""
        return None if effect is None else math.exp(effect)

    def size(self, effect: float) -> str:
        """Return a difference as a share of the slower speed."""
        return f"{plain_number(100 * math.expm1(effect), 1)}%"

    @property
    def ratio(self) -> str:
        """The ratio as text."""
        return plain_number(self.shown(self.difference), self._digits)

    @property
    def effect(self) -> str:
        """The ratio as the table shows it."""
        return NONE if self.difference is None else f"{self.ratio} x"

    @property
    def limits(self) -> str:
        """Its interval as text."""
        ends = (self.tested.low, self.tested.high) if self.tested else (None,)
        if None in ends:
            return NONE
        return f"[{', '.join(plain_number(self.shown(end), self._digits) for end in ends)}]"

    @property
    def words(self) -> str:
        """What stands before the effect in a sentence."""
        return "speed ratio"

    @property
    def _digits(self) -> int:
        """Ratios close to one need a digit more."""
        return 3 if abs(self.difference or 0.0) < 0.1 else 2


@dataclass(frozen=True)
class _Run:
    """What one training says about its speed."""

    name: str
    hardware: str | None
    devices: int
    times: StepTimes | None  # None where it recorded none
    others: float | None  # share of the processors that other programs took
    gpu_processes: int  # of others
    seconds: float  # of the whole training
    reported: float | None  # its tokens per second, validations included

    @property
    def speed(self) -> float | None:
        """Tokens per second and GPU; of a CPU, of all its cores."""
        rate = self.times.rate if self.times else self.reported
        return rate / self.devices if rate else None


def training_speed_rows(measurements: Measurements, first: str, second: str) -> Iterator[TableRow]:
    """Yield the comparison of two arms that were trained, where there are times of single steps, or
    total times were imported.
    """
    trained = [
        [run for run in measurements.arms[name].runs if not run.is_base and _total(run)]
        for name in (first, second)
    ]
    arms = [[_read(run) for run in runs] for runs in trained]
    known = any(run.times for runs in arms for run in runs)
    if not all(arms) or not (known):
        return
    fewer = min(map(len, arms))
    uneven = f"{count(fewer, 'seed')} of {len(arms[0])} and {len(arms[1])}"
    mine, other = (runs[:fewer] for runs in arms)
    reason = _why_not((*mine, *other))
    times = [[run.times for run in runs if run.times] for runs in (mine, other)]
    on_gpus = all(run.hardware and not _CPU.search(run.hardware) for run in (*mine, *other))
    yield SpeedRow(
        label=f"training speed, tokens/s{' per GPU' if on_gpus else ''}",
        per=f"tokens per second{' and GPU' if on_gpus else ''}",
        first=first,
        second=second,
        first_value=_mean(mine),
        second_value=_mean(other),
        tested=None if reason else compare_rates(*times),
        reason=reason,
        flags=(uneven,) if len(arms[0]) != len(arms[1]) else (),
        files=tuple(f"{run.name}/metrics.jsonl" for run in (*mine, *other)),
    )


def _total(run: RunMeasurements) -> float | None:
    """The seconds that the last process of a training took."""
    return (run.state.get("summary") or {}).get("seconds")


def _read(run: RunMeasurements) -> _Run:
    summary = run.state.get("summary") or {}
    resumed = run.state.get("resumed") or [{}]
    begun = int(str(resumed[-1].get("from", "-0")).rpartition("-")[2])
    steps: list[tuple[float, float | None]] = []
    load: list[tuple[float, float]] = []
    gpu_processes = 0
    for line in run.curves:
        seconds, tokens = line.get("step_seconds"), line.get("step_tokens")
        if line.get("step", 0) <= begun or not isinstance(seconds, list):
            continue
        if isinstance(tokens, list) and len(tokens) == len(seconds):
            steps += zip(tokens, seconds, strict=True)
        if line.get("others_cpu") is not None:
            load.append((sum(one or 0.0 for one in seconds), line["others_cpu"]))
        gpu_processes = max(gpu_processes, line.get("other_gpu_processes") or 0)
    kept = [step for step in steps[min(WARM_UP, len(steps) // 10) :] if step[1]]
    weight = sum(seconds for seconds, _ in load)
    hardware, devices = _hardware(run)
    return _Run(
        name=run.name,
        hardware=hardware,
        devices=devices,
        times=StepTimes(*np.array(kept, dtype=float).T) if kept else None,
        others=sum(one * share for one, share in load) / weight if weight else None,
        gpu_processes=gpu_processes,
        seconds=_total(run) or 0.0,
        reported=summary.get("tokens_per_second"),
    )


def _hardware(run: RunMeasurements) -> tuple[str | None, int]:
    """What a run trained on, None where it was not recorded, and what its speed is divided by."""
    devices = run.environment.get("devices")
    processes = (run.state.get("summary") or {}).get("world_size")
    if not devices or not processes:
        return None, 1
    if cpu := _CPU.search(str(devices[0])):
        cores, threads = map(int, cpu.groups())
        name = run.environment.get("processor") or "a processor without a name"
        return f"CPU, {cores} cores, {threads * processes} threads, {name}", 1
    return f"{processes} x {' and '.join(sorted(set(devices)))}", processes


def _why_not(runs: Sequence[_Run]) -> str:
    """Why the times of these runs are no fair comparison, or nothing."""
    if totals := [run for run in runs if run.times is None]:
        each = sentence_list([f"{run.name} ({run.seconds:,.0f} s)" for run in totals])
        return f"only the total time of {each} is known, and not that of single steps"
    for run in runs:
        if run.hardware is None:
            return f"what {run.name} trained on was not recorded"
        if run.others is None:
            return f"how busy the machine of {run.name} was is not recorded"
    machines = dict.fromkeys(str(run.hardware) for run in runs)
    if len(machines) > 1:
        return f"they trained on different hardware ({' against '.join(machines)})"
    for run in runs:
        if (run.others or 0.0) > MOST_OF_OTHERS:
            return (
                f"the machine was not idle: while {run.name} trained, other programs took"
                f" {run.others:.0%} of the processors' time ({MOST_OF_OTHERS:.0%} is allowed)"
            )
        if run.gpu_processes:
            processes = count(run.gpu_processes, "other process", "other processes")
            return f"while {run.name} trained, {processes} used its GPUs"
    for run in runs:
        assert run.times is not None
        steps, independent = len(run.times.seconds), run.times.independent()
        if independent < FEWEST_STEPS:
            return (
                f"the {count(steps, 'timed step')} of {run.name} know its speed like"
                f" {independent:.0f} independent ones, and {FEWEST_STEPS} are needed"
            )
    return ""


def _mean(runs: Sequence[_Run]) -> float | None:
    """The geometric mean of speeds, of which ratios are tested."""
    speeds = [run.speed for run in runs]
    known = [math.log(speed) for speed in speeds if speed]
    return math.exp(sum(known) / len(known)) if known and len(known) == len(speeds) else None
