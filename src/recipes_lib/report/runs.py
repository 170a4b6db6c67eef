"""Trainings and what everything cost: from run.json, metrics.jsonl and the result files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from recipes_lib.compare.eval_files import read_lines
from recipes_lib.compare.measurements import Measurements, RunMeasurements
from recipes_lib.eval_log import EvalLog


@dataclass(frozen=True)
class Training:
    """One training's numbers; losses are per token over the supervised tokens, of one run: no
    interval can be given.
    """

    arm: str
    run: str
    seed: int | None
    state: str
    steps: int | None
    rows: int | None
    train_loss: float | None
    validation_loss: float | None
    best_validation_loss: float | None
    best_step: int | None
    perplexity: float | None
    tokens_per_second: float | None
    peak_memory_gib: float | None
    launch: str
    devices: str
    file: str


@dataclass(frozen=True)
class RunCost:
    """What one run took: training and answers. Device hours are processes times seconds."""

    arm: str
    run: str
    what: str
    seconds: float | None
    device_hours: float | None
    device: str
    tokens: int | None
    tokens_per_second: float | None
    file: str


def trainings(measurements: Measurements) -> list[Training]:
    """Return one line per run that was trained (or whose training log was imported)."""
    return [
        _training(name, run)
        for name, arm in measurements.arms.items()
        for run in arm.runs
        if not run.is_base and (run.curves or run.state.get("summary"))
    ]


def _training(arm: str, run: RunMeasurements) -> Training:
    summary = run.state.get("summary") or {}
    validation = [
        (line["eval_loss"], line.get("step"))
        for line in run.curves
        if line.get("eval_loss") is not None
    ]
    losses = [line["loss"] for line in run.curves if line.get("loss") is not None]
    best = min(validation, default=(None, None), key=lambda pair: (pair[0], pair[1] or 0))
    last = summary.get("last_validation_loss") or (validation[-1][0] if validation else None)
    return Training(
        arm=arm,
        run=run.name,
        seed=run.seed,
        state=str(run.state.get("state", "unknown")),
        steps=summary.get("steps")
        or max((line["step"] for line in run.curves if line.get("step") is not None), default=None),
        rows=summary.get("training_rows"),
        train_loss=summary.get("last_training_loss") or (losses[-1] if losses else None),
        validation_loss=last,
        best_validation_loss=best[0],
        best_step=best[1],
        perplexity=math.exp(last) if last is not None and last < 20 else None,
        tokens_per_second=summary.get("tokens_per_second"),
        peak_memory_gib=summary.get("peak_memory_gib")
        or max((line.get("peak_memory_gib") or 0 for line in run.curves), default=0)
        or None,
        launch=str(run.state.get("launch") or "not recorded"),
        devices=_devices(run),
        file=f"{run.name}/run.json",
    )


def _devices(run: RunMeasurements) -> str:
    devices = run.environment.get("devices") or []
    return (
        f"{len(devices)} x {devices[0]}"
        if len(devices) > 1
        else str(devices[0])
        if devices
        else "not recorded"
    )


def costs(measurements: Measurements) -> list[RunCost]:
    """Return what trainings and answers took, run by run."""
    found = []
    for name, arm in measurements.arms.items():
        for run in arm.runs:
            summary = run.state.get("summary") or {}
            if summary.get("seconds") is not None:
                found.append(_training_cost(name, run, summary))
            for result in run.evals:
                facts = (result.result.get("answers") or {}).get("generated_now")
                if facts and facts.get("seconds"):
                    tokens, seconds = int(facts["new_tokens"]), float(facts["seconds"])
                    file = "/".join(result.file.parts[-4:])
                    every = _tokens_of(result)
                    what = f"answers, {result.eval}" + (
                        f", the last {tokens:,} of {every:,} tokens" if every > tokens else ""
                    )
                    found.append(
                        RunCost(
                            name,
                            run.name,
                            what,
                            seconds,
                            seconds / 3600,
                            _devices(run),
                            tokens,
                            tokens / seconds,
                            file,
                        )
                    )
    return list({(cost.run, cost.what): cost for cost in reversed(found)}.values())[::-1]


def _training_cost(arm: str, run: RunMeasurements, summary: dict[str, Any]) -> RunCost:
    seconds, ranks = float(summary["seconds"]), int(summary.get("world_size") or 1)
    # Of a training that was resumed run.json has the time of the last attempt alone, and the tokens
    # of all.
    what, tokens = (
        ("training, its last attempt alone", None)
        if run.state.get("resumed")
        else ("training", summary.get("tokens"))
    )
    return RunCost(
        arm,
        run.name,
        what,
        seconds,
        seconds * ranks / 3600,
        _devices(run),
        tokens,
        summary.get("tokens_per_second"),
        f"{run.name}/run.json",
    )


def _tokens_of(result: EvalLog) -> int:
    """The tokens of all answers behind a result; those of one command may be fewer, where an
    evaluation was stopped and went on.
    """
    fingerprint = (result.result.get("answers") or {}).get("fingerprint")
    rows = read_lines(result.file.with_name("generations.jsonl"))
    return sum(int(row.get("tokens") or 0) for row in rows if row.get("model") == fingerprint)
