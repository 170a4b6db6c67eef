"""Logs of HF Trainer as lines of metrics.jsonl: trainer_state.json, a list of log lines, or one log
line per row.
"""

from __future__ import annotations

import math
from typing import Any

from recipes_lib.core.json_files import Row
from recipes_lib.foreign.files import Foreign

_KEPT = ("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy")
_OURS = ("tokens_per_second", "peak_memory_gib")  # in our own metrics.jsonl
_SUMMARY = (
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "total_flos",
)


def read_logs(file: Foreign) -> tuple[list[Row], Row, list[str]]:
    """Return lines of metrics.jsonl, a summary for run.json, and what the file lacks.

    Raises:
        DataError: no line holds a loss, or steps go backwards.
    """
    history = (
        file.rows[0][1]["log_history"]
        if file.format == "trainer-state"
        else [row for _, row in file.rows]
    )
    lines: list[Row] = []
    last_step = -1
    for number, log in enumerate(history, 1):
        if not isinstance(log, dict):
            raise file.error(f"log entry {number} is no object")
        if "loss" not in log and "eval_loss" not in log:
            continue
        step = log.get("step")
        if isinstance(step, int) and step < last_step:
            raise file.error(
                f"log entry {number} is of step {step}, after step {last_step}",
                "logs of two trainings in one file? import each",
            )
        last_step = step if isinstance(step, int) else last_step
        lines.append(_line(log))
    if not lines:
        raise file.error("no entry holds a loss or eval_loss")
    summary = _summary(history, lines, file.rows[0][1] if file.format == "trainer-state" else {})
    return lines, summary, _lacks(lines)


def _line(log: Row) -> Row:
    """One line under our names; a number that is not finite is null."""
    line: Row = {"step": log["step"]} if isinstance(log.get("step"), int) else {}
    if (epoch := _finite(log.get("epoch"))) is not None:
        line["epoch"] = epoch
    line |= {key: _finite(log[key]) for key in _KEPT if key in log}
    accuracy = _finite(log.get("eval_mean_token_accuracy"))
    if "eval_loss" in log and accuracy is not None:
        line["mean_token_accuracy"] = accuracy
    line |= {key: _finite(log[key]) for key in _OURS if key in log}
    tokens = _finite(log.get("num_tokens", log.get("num_input_tokens_seen", log.get("tokens"))))
    if "loss" in log and tokens is not None:
        line["tokens"] = int(tokens)
    return line


def _summary(history: list[Row], lines: list[Row], state: Row) -> Row:
    """What run.json says about a training, in its own words where they fit."""
    end: Row = next(
        (log for log in reversed(history) if isinstance(log, dict) and "train_runtime" in log), {}
    )
    trained = [line["loss"] for line in lines if line.get("loss") is not None]
    checked = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    steps = [line["step"] for line in lines if "step" in line]
    last = end.get("step") if isinstance(end.get("step"), int) else state.get("global_step")
    summary: Row = {
        "steps": last if isinstance(last, int) else max(steps, default=None),
        "first_training_loss": trained[0] if trained else None,
        "last_training_loss": trained[-1] if trained else None,
        "first_validation_loss": checked[0] if checked else None,
        "last_validation_loss": checked[-1] if checked else None,
        "tokens": int(end["num_tokens"]) if _finite(end.get("num_tokens")) is not None else None,
        "seconds": _finite(end.get("train_runtime")),
    }
    summary |= {key: _finite(end[key]) for key in _SUMMARY if key in end and key != "train_runtime"}
    best = state.get("best_global_step")
    return {**summary, **({"best_step": best} if isinstance(best, int) else {})}


def _lacks(lines: list[Row]) -> list[str]:
    """What log lines of ours have and these do not."""
    lacks = (
        []
        if any(key in line for key in _OURS for line in lines)
        else ["tokens per second and peak memory are not in the logs"]
    )
    if any("step" not in line for line in lines):
        lacks.append("step numbers are not in the logs, only epochs")
    if any(value is None for line in lines for value in line.values()):
        lacks.append("some values are not finite: they are null")
    if not any("eval_loss" in line for line in lines):
        lacks.append("no validation loss was logged")
    return lacks


def _finite(value: Any) -> float | None:
    """A number, or None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None
