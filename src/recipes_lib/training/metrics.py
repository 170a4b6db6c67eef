"""What a training logs: one line of metrics.jsonl per log, and a line or a bar on the terminal with
tokens/s and time left.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes_lib.core.json_files import read_rows, rows_from_the_end
from recipes_lib.core.terminal import say

SAY_EVERY_S = 10.0
KEPT = ("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy")


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: allocated on the accelerator, or resident where there is
    none.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def first_and_last(path: Path, key: str) -> tuple[float | None, float | None]:
    """Return the first and the last value of a key in a metrics.jsonl, None where it has none; read
    from both ends, not as a whole.
    """
    first = next((row[key] for row in read_rows(path, skip_damaged=True) if key in row), None)
    return first, next((row[key] for _, row in rows_from_the_end(path) if key in row), None)


def has_evaluation(lines: list[dict[str, Any]], step: int) -> bool:
    """Whether lines of metrics.jsonl, or of a Trainer's history, hold the evaluation of a step."""
    return any(line["step"] == step and "eval_loss" in line for line in lines)


def forget_after(path: Path, step: int, evaluated: bool = True) -> None:
    """Cut off the lines after `step`, and what a crash left damaged behind them: a resumed run
    writes them again.

    Args:
        path: the run's metrics.jsonl.
        step: the checkpoint's.
        evaluated: whether the checkpoint was saved after the evaluation of its step; otherwise that
            line, the last of its step, goes too.
    """
    if not path.is_file():
        return

    def stays(row: dict[str, Any]) -> bool:
        return row.get("step", 0) < step or (
            row.get("step", 0) == step and (evaluated or "eval_loss" not in row)
        )

    kept = next((end for end, row in rows_from_the_end(path) if stays(row)), 0)
    with path.open("rb+") as stream:
        stream.truncate(kept)
        os.fsync(stream.fileno())


class MetricsCallback(TrainerCallback):
    """Appends to metrics.jsonl on rank 0 and shows progress.

    Args:
        path: the run's metrics.jsonl.
        quiet: show nothing.
    """

    def __init__(self, path: Path, quiet: bool = False) -> None:
        self.path = path
        self.quiet = quiet
        self.bar: Any = None
        self.seconds = 0.0
        self._last = (time.monotonic(), 0)
        self._started = (time.monotonic(), 0)
        self._validation = _Validation()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and the bar on a terminal."""
        self._started = (time.monotonic(), state.global_step)
        self._last = (time.monotonic(), _tokens_at(self.path, state.global_step))
        if state.is_world_process_zero and not self.quiet and sys.stderr.isatty():
            from tqdm.auto import tqdm

            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line, flushed at once."""
        logs = logs or {}
        if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        begun = time.perf_counter()
        line: dict[str, Any] = {
            "step": state.global_step,
            "epoch": round(float(state.epoch or 0), 6),
        }
        line |= {key: float(logs[key]) for key in KEPT if key in logs}
        if "loss" in logs:
            now, tokens = time.monotonic(), int(logs.get("num_tokens", 0))
            line["tokens"] = tokens
            line["tokens_per_second"] = round(
                (tokens - self._last[1]) / max(now - self._last[0], 1e-9), 1
            )
            self._last = (now, tokens)
        else:
            self._last = (time.monotonic(), self._last[1])
        line["peak_memory_gib"] = round(peak_memory_gib(), 3)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self._show(line, state)
        self.seconds += time.perf_counter() - begun

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Say now and then how far a validation is: that of a large set takes minutes, and the last
        one comes after the last step.
        """
        text = self._validation.after_batch(len(eval_dataloader))
        if text is None or self.quiet or not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            say(f"step {state.global_step}/{state.max_steps}  {text}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def _show(self, line: dict[str, Any], state: TrainerState) -> None:
        if self.quiet:
            return
        if "eval_loss" in line:
            text = f"step {line['step']}/{state.max_steps}  validation loss {line['eval_loss']:.4f}"
        else:
            text = (
                f"step {line['step']}/{state.max_steps}  loss {line['loss']:.4f}  learning rate"
                f" {line['learning_rate']:.2e}  {line['tokens_per_second']:,.0f} tokens/s "
                f" {self._time_left(state)} left"
            )
        if self.bar is not None:
            self.bar.write(text)
            if "tokens_per_second" in line:
                self.bar.set_postfix_str(f"{line['tokens_per_second']:,.0f} tokens/s")
        else:
            say(text)

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self._started[1]
        seconds = (
            (time.monotonic() - self._started[0])
            / max(done, 1)
            * (state.max_steps - state.global_step)
        )
        return _clock(seconds)


class _Validation:
    """How far a pass over the validation set is."""

    def __init__(self) -> None:
        self.started = self.said = time.monotonic()
        self.done = 0

    def after_batch(self, batches: int) -> str | None:
        """Count one batch of a pass; return the words for it every `SAY_EVERY_S` seconds."""
        now = time.monotonic()
        if self.done in (0, batches):
            self.started = self.said = now
            self.done = 0
        self.done += 1
        if now - self.said < SAY_EVERY_S:
            return None
        self.said = now
        seconds = (now - self.started) / (self.done - 1) * (batches - self.done)
        return f"validation: {self.done:,} of {batches:,} batches, {_clock(seconds)} left"


def _clock(seconds: float) -> str:
    """Return minutes and seconds, hours where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _tokens_at(path: Path, step: int) -> int:
    return next(
        (
            row["tokens"]
            for _, row in rows_from_the_end(path)
            if row.get("step", 0) <= step and "tokens" in row
        ),
        0,
    )
