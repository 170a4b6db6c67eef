"""What a training logs: per log a line of metrics.jsonl and one on the terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState

from recipes_lib.core.files import Row, read_rows, rows_from_the_end, write_text
from recipes_lib.core.terminal import say
from recipes_lib.training.probe import duration, peak_memory_gib

SAY_EVERY_S = 10.0
KEPT = ("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy", "aux_loss")


def first_and_last(path: Path, key: str) -> tuple[float | None, float | None]:
    """Return the first and the last value of a key in a metrics.jsonl, read from both ends; None
    where it has none.
    """
    first = next((row[key] for row in read_rows(path, skip_damaged=True) if key in row), None)
    return first, next((row[key] for row in rows_from_the_end(path) if key in row), None)


def forget_after(path: Path, step: int, history: list[Row]) -> None:
    """Cut off what was logged after `step`, which a resumed run logs again, and the evaluation of
    this step where its checkpoint knows nothing of it. A file that lacks lines of before is written
    anew from the checkpoint.

    Args:
        history: the Trainer's `log_history` in the checkpoint.
    """
    evaluated = any(row["step"] == step and "eval_loss" in row for row in history)

    def stays(row: Row) -> bool:
        before = row.get("step", 0) - step
        return before < 0 or (before == 0 and (evaluated or "eval_loss" not in row))

    known = [row for row in history if "loss" in row or "eval_loss" in row]
    lines = (
        [row for row in read_rows(path, skip_damaged=True) if stays(row)] if path.is_file() else []
    )
    if len(lines) < len(known):
        say(f"{path.name} lacks {len(known) - len(lines)} lines: written anew from the checkpoint")
        lines = [_line(row["step"], row["epoch"], row) for row in known]
    elif not path.is_file():
        return
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _line(step: int, epoch: float, logs: Row) -> Row:
    """Return what metrics.jsonl keeps of a log."""
    line: Row = {"step": step, "epoch": round(epoch, 6)}
    line |= {key: float(logs[key]) for key in KEPT if key in logs}
    if "loss" in logs:
        line["tokens"] = int(logs.get("num_tokens", 0))
    return line


class MetricsCallback(TrainerCallback):
    """Appends to metrics.jsonl on rank 0 and, unless `quiet`, shows progress: tqdm's bar on a
    terminal, else a line for each log.
    """

    def __init__(self, path: Path, quiet: bool = False) -> None:
        self.path, self.quiet = path, quiet
        self.bar: Any = None
        self._last = self._started = (time.monotonic(), 0)  # time, tokens; time, step
        self._validation = (0, 0.0)  # batches done, when it was last said

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock, and the bar on a terminal."""
        logged = (row["num_tokens"] for row in state.log_history if "num_tokens" in row)
        self._started = (time.monotonic(), state.global_step)
        self._last = (time.monotonic(), int(max(logged, default=0)))
        self.quiet = self.quiet or not state.is_world_process_zero
        if not self.quiet and sys.stderr.isatty():
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Row | None = None, **_: Any
    ) -> None:
        """Write one line, flushed at once."""
        logs, now = logs or {}, time.monotonic()
        if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        line = _line(state.global_step, float(state.epoch or 0), logs)
        if "loss" in logs:
            seconds = max(now - self._last[0], 1e-9)
            line["tokens_per_second"] = round((line["tokens"] - self._last[1]) / seconds, 1)
        self._last = (now, line.get("tokens", self._last[1]))
        line["peak_memory_gib"] = round(peak_memory_gib(), 3)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self._show(line, state)

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        """Say now and then how far a validation is: that of a large set takes minutes."""
        (done, said), now = self._validation, time.monotonic()
        batches = len(eval_dataloader)
        said = now if done in (0, batches) else said  # the first batch of a pass
        done = done % batches + 1
        if speaks := now - said >= SAY_EVERY_S and not self.quiet:
            self._tell(
                f"step {state.global_step}/{state.max_steps}  validation: {done:,} of {batches:,}"
            )
        self._validation = (done, now if speaks else said)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def _show(self, line: Row, state: TrainerState) -> None:
        text = f"step {line['step']}/{state.max_steps}  "
        if "eval_loss" in line:
            self._tell(f"{text}validation loss {line['eval_loss']:.4f}")
            return
        began, first = self._started
        per_step = (time.monotonic() - began) / max(state.global_step - first, 1)
        left = duration(per_step * (state.max_steps - state.global_step))
        self._tell(
            f"{text}loss {line['loss']:.4f}  learning rate {line.get('learning_rate', 0):.2e} "
            f" {line['tokens_per_second']:,.0f} tokens/s  {left} left"
        )

    def _tell(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        elif not self.quiet:
            say(text)
