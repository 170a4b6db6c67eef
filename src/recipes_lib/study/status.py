"""What `recipes study plan`, `status` and `diff` print: steps with their state, reason and cost;
arms side by side. Reads files only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from recipes_lib.compare.design import Study
from recipes_lib.config.yaml_text import value_text
from recipes_lib.core.json_files import rows_from_the_end
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.run_lock import describe_holder, is_held
from recipes_lib.core.terminal import aligned
from recipes_lib.study.arms import study_folder
from recipes_lib.study.graph import Freshness, Graph, Step


@dataclass(frozen=True)
class StepRow:
    """One step as the tables show it; `seconds` is what it took last time."""

    name: str
    state: str
    detail: str
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the row for --json."""
        return {
            "step": self.name,
            "state": self.state,
            "detail": self.detail,
            "seconds": self.seconds,
        }


def step_rows(study: Study, graph: Graph) -> list[StepRow]:
    """Return every step with its state: fresh, stale, missing, waiting, failed, running."""
    known = graph.survey()
    training = {
        step.run
        for step in graph.of_kind("train")
        if not known[step.name].fresh and is_held(RunDirectory(step.run).path)
    }
    evaluating = not training and is_held(study_folder(study))
    return [_row(step, known, graph, training, evaluating) for step in graph]


def _row(
    step: Step, known: Mapping[str, Freshness], graph: Graph, training: set[str], evaluating: bool
) -> StepRow:
    state, record = known[step.name], graph.record(step.name)
    seconds = record.get("seconds") if record else None
    if state.fresh:
        return StepRow(
            step.name,
            "fresh",
            f"done {record['finished'].removesuffix('+00:00')}" if record else "",
            seconds,
        )
    if step.kind == "train" and step.run in training:
        return StepRow(step.name, "running", progress_of(step.run), seconds)
    waits = [name for name in step.upstream if not known[name].fresh]
    if state.failure:
        return StepRow(step.name, "failed", str(state.failure["error"]).splitlines()[0], seconds)
    if state.state == "missing":
        failed = next((name for name in waits if known[name].failure), None)
        after = (
            f"after {waits[0]}" + (f" and {len(waits) - 1} more" if len(waits) > 1 else "")
            if waits
            else ""
        )
        detail = (
            f"{failed} failed"
            if failed
            else after or (_begun(step.run) if step.kind == "train" else "")
        )
        return StepRow(
            step.name,
            "waiting" if waits else "running" if evaluating and step.kind != "train" else "missing",
            detail,
            seconds,
        )
    return StepRow(step.name, "stale", state.why, seconds)


def progress_of(run_name: str) -> str:
    """Return how far a training is, and who does it."""
    return _reached(run_name) + describe_holder(RunDirectory(run_name).path / "lock.json")


def _begun(run_name: str) -> str:
    """How far a training came that somebody or something stopped."""
    run = RunDirectory(run_name)
    return (
        f"stopped ({_reached(run_name)}): the same command continues it"
        if run.exists() and run.metrics.is_file()
        else ""
    )


def _reached(run_name: str) -> str:
    """The last step and loss that a training wrote."""
    run = RunDirectory(run_name)
    step, loss = "starting", ""
    with suppress(OSError):
        lines = [
            row for _, row in islice(rows_from_the_end(run.metrics), 2)
        ]  # the last one may be a validation
        step = f"step {lines[0]['step']}" if lines else step
        loss = next(
            (f", loss {row['loss']:.3f}" for row in lines if isinstance(row.get("loss"), float)), ""
        )
    return f"{step}{loss}"


def status_lines(rows: Sequence[StepRow], width: int) -> list[str]:
    """Return the status table, each line cut to the terminal's width."""
    head = ("step", "state", "took", "")
    lines = aligned(
        [head, *((row.name, row.state, seconds_text(row.seconds), row.detail) for row in rows)]
    )
    return [line if len(line) <= width else f"{line[: width - 3]}..." for line in lines]


def summary_line(rows: Sequence[StepRow]) -> str:
    """Return how many steps are in which state."""
    states = dict.fromkeys(("fresh", "running", "stale", "missing", "waiting", "failed"), 0)
    for row in rows:
        states[row.state] += 1
    return ", ".join(f"{count} {state}" for state, count in states.items() if count)


def seconds_text(seconds: float | None) -> str:
    """Return a duration as people say it.

    Example:
        >>> seconds_text(75), seconds_text(5400.0), seconds_text(None)
        ('1 min 15 s', '1 h 30 min', '-')
    """
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def diff_rows(study: Study) -> Iterator[tuple[str, list[str], str]]:
    """Yield (key, value per arm, declared factor or empty) where the arms' resolved
    values differ.
    """
    arms = [arm.name for arm in study.arms if arm.recipe is not None]
    for key, values in study.differing().items():
        yield (
            key,
            ["-" if values[name] is None else value_text(values[name]) for name in arms],
            study.factor_of(key) or "",
        )
