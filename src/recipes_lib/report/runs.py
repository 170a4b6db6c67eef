"""Trainings and what everything cost: from run.json, metrics.jsonl and the result files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recipes_lib.compare.design import Study
from recipes_lib.compare.measurements import Measurements, RunMeasurements


@dataclass(frozen=True)
class Training:
    """One training's numbers; losses are per token over the supervised tokens, of one run: no
    interval can be given.
    """

    arm: str
    run: str
    seed: int | None
    steps: int | None
    rows: int | None
    train_loss: float | None
    validation_loss: float | None
    best_validation_loss: float | None
    perplexity: float | None
    tokens_per_second: float | None
    peak_memory_gib: float | None
    planned_peak_memory_gib: float | None
    launch: str
    devices: str
    file: str


@dataclass(frozen=True)
class RunCost:
    """What one run took: training and answers. Device hours are processes times seconds."""

    arm: str
    run: str
    what: str
    seconds: float
    device_hours: float
    device: str
    tokens: int | None
    tokens_per_second: float | None
    file: str


@dataclass(frozen=True)
class ArmCost:
    """Device hours of all runs of one arm. `partial`: of a resumed training only the last attempt
    is known, or of answers only those that were given last.
    """

    arm: str
    runs: int
    training: float
    answers: float
    partial: bool
    file: str

    @property
    def device_hours(self) -> float:
        """All of them."""
        return self.training + self.answers


def arm_costs(costs: Sequence[RunCost]) -> list[ArmCost]:
    """Return what each arm took, over its runs."""
    found = []
    for arm in dict.fromkeys(one.arm for one in costs):
        mine = [one for one in costs if one.arm == arm]
        training = [one for one in mine if one.what.startswith("training")]
        answers = [one for one in mine if one not in training]
        found.append(
            ArmCost(
                arm,
                len({one.run for one in mine}),
                sum(one.device_hours for one in training),
                sum(one.device_hours for one in answers),
                any(", " in one.what.removeprefix("answers, ") for one in mine),
                " ".join(dict.fromkeys(one.file for one in mine)),
            )
        )
    return found


@dataclass(frozen=True)
class Tuned:
    """One value of an arm's grid, and the validation loss of its training; None where it
    diverged.
    """

    arm: str
    key: str
    value: bool | int | float | str
    loss: float | None
    chosen: bool
    seed: int
    file: str


def tunings(study: Study) -> list[Tuned]:
    """Return every value that was tried for an arm, where one was chosen."""
    return [
        Tuned(
            arm=arm.name,
            key=tuning.key,
            value=value,
            loss=loss,
            chosen=value == tuning.chosen,
            seed=candidate.seeds[0],
            file=f"{study.name}/choices.json",
        )
        for arm in study.arms
        if (tuning := arm.tuning)
        for value, loss, candidate in zip(
            tuning.values, tuning.losses, tuning.candidates, strict=False
        )
    ]


def trainings(measurements: Measurements) -> list[Training]:
    """Return one line per run that was trained."""
    return [
        _training(name, run)
        for name, arm in measurements.arms.items()
        for run in arm.runs
        if not run.is_base and (run.curves or run.state.get("summary"))
    ]


def _training(arm: str, run: RunMeasurements) -> Training:
    summary = run.state.get("summary") or {}

    def logged(key: str) -> list[float]:
        return [line[key] for line in run.curves if line.get(key) is not None]

    validation, losses = logged("eval_loss"), logged("loss")
    last = summary.get("last_validation_loss") or (validation[-1] if validation else None)
    return Training(
        arm=arm,
        run=run.name,
        seed=run.seed,
        steps=summary.get("steps") or max(map(int, logged("step")), default=None),
        rows=summary.get("training_rows"),
        train_loss=summary.get("last_training_loss") or (losses[-1] if losses else None),
        validation_loss=last,
        best_validation_loss=min(validation, default=None),
        perplexity=math.exp(last) if last is not None and last < 20 else None,
        tokens_per_second=summary.get("tokens_per_second"),
        peak_memory_gib=summary.get("peak_memory_gib")
        or max(logged("peak_memory_gib"), default=0)
        or None,
        planned_peak_memory_gib=summary.get("planned_peak_memory_gib"),
        launch=str(run.state.get("launch") or "not recorded"),
        devices=_devices(run),
        file=f"{run.name}/run.json",
    )


def _devices(run: RunMeasurements) -> str:
    devices = run.environment.get("devices") or ["not recorded"]
    return f"{len(devices)} x {devices[0]}" if len(devices) > 1 else str(devices[0])


def costs(measurements: Measurements) -> list[RunCost]:
    """Return what trainings and answers took, run by run."""
    found = [
        cost
        for name, arm in measurements.arms.items()
        for run in arm.runs
        for cost in _costs(name, run)
    ]
    return list({(cost.run, cost.what): cost for cost in reversed(found)}.values())[::-1]


def _costs(arm: str, run: RunMeasurements) -> Iterator[RunCost]:
    summary = run.state.get("summary") or {}
    if summary.get("seconds") is not None:
        # Of a training that was resumed run.json has the time of the last attempt alone, and the
        # tokens of all.
        again = bool(run.state.get("resumed"))
        seconds = float(summary["seconds"])
        yield RunCost(
            arm,
            run.name,
            "training, its last attempt alone" if again else "training",
            seconds,
            seconds * int(summary.get("world_size") or 1) / 3600,
            _devices(run),
            None if again else summary.get("tokens"),
            summary.get("tokens_per_second"),
            f"{run.name}/run.json",
        )
    for log in run.evals:
        speed = log.answers.generated_now
        if speed and speed.seconds:
            tokens, seconds, every = speed.new_tokens, speed.seconds, log.answers.tokens or 0
            part = f", the last {tokens:,} of {every:,} tokens" if every > tokens else ""
            yield RunCost(
                arm,
                run.name,
                f"answers, {log.eval}{part}",
                seconds,
                seconds / 3600,
                _devices(run),
                tokens,
                tokens / seconds,
                log.place,
            )
