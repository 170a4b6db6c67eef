"""Logs of HF Trainer as lines of metrics.jsonl: trainer_state.json, a list of log lines, or one log
line per row.
"""

from __future__ import annotations

from typing import Any

from recipes_lib.core.json_files import Row
from recipes_lib.foreign.files import Foreign, is_number

_KEPT = ("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy")
_OURS = ("tokens_per_second", "peak_memory_gib")  # in our own metrics.jsonl
_SUMMARY = (
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
    state = file.rows[0][1] if file.format == "trainer-state" else {}
    history = state["log_history"] if state else [row for _, row in file.rows]
    lines: list[Row] = []
    last_step = -1
    for number, log in enumerate(history, 1):
        if not isinstance(log, dict):
            raise file.error(f"log entry {number} is no object")
        if "loss" not in log and "eval_loss" not in log:
            continue
        step = log.get("step")
        if isinstance(step, int):
            if step < last_step:
                what = f"log entry {number} is of step {step}, after step {last_step}"
                raise file.error(what, "logs of two trainings in one file? import each")
            last_step = step
        lines.append(_line(log))
    if not lines:
        raise file.error("no entry holds a loss or eval_loss")
    lacks = {
        "tokens per second and peak memory are not in the logs": not any(
            key in line for key in _OURS for line in lines
        ),
        "step numbers are not in the logs, only epochs": any("step" not in line for line in lines),
        "some values are not finite: they are null": any(None in line.values() for line in lines),
        "no validation loss was logged": not any("eval_loss" in line for line in lines),
    }
    summary = _summary(history, lines, state)
    return lines, summary, [lack for lack, holds in lacks.items() if holds]


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
    ends = (log for log in reversed(history) if isinstance(log, dict) and "train_runtime" in log)
    end: Row = next(ends, {})
    trained, checked = (
        [line[name] for line in lines if line.get(name) is not None] or [None]
        for name in ("loss", "eval_loss")
    )
    steps = [line["step"] for line in lines if "step" in line]
    last = end.get("step") if isinstance(end.get("step"), int) else state.get("global_step")
    tokens, best = _finite(end.get("num_tokens")), state.get("best_global_step")
    return {
        "steps": last if isinstance(last, int) else max(steps, default=None),
        "first_training_loss": trained[0],
        "last_training_loss": trained[-1],
        "first_validation_loss": checked[0],
        "last_validation_loss": checked[-1],
        "tokens": None if tokens is None else int(tokens),
        "seconds": _finite(end.get("train_runtime")),
        **{key: _finite(end[key]) for key in _SUMMARY if key in end},
        **({"best_step": best} if isinstance(best, int) else {}),
    }


def _finite(value: Any) -> float | None:
    return float(value) if is_number(value) else None
