"""What a training logs: per log a line of metrics.jsonl and one on the terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from recipes_lib.core.files import Row, read_object, read_rows, write_text
from recipes_lib.core.terminal import say, shown_duration
from recipes_lib.training.probe import peak_memory_gib

KEPT = ("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy", "aux_loss")


def forget_after(path: Path, checkpoint: Path | None) -> None:
    """Cut off of a metrics.jsonl what was logged after a checkpoint, which a resumed run logs
    again, and an evaluation that the checkpoint does not know; write lines again that it lacks.
    """
    step, history = 0, []
    if checkpoint is not None:
        state = read_object(checkpoint / "trainer_state.json")
        step, history = state["global_step"], state["log_history"]
    evaluated = any(row["step"] == step and "eval_loss" in row for row in history)

    def stays(row: Row) -> bool:
        logged = row.get("step", 0)
        return logged < step or (logged == step and (evaluated or "eval_loss" not in row))

    rows = [row for row in read_rows(path, skip_damaged=True) if stays(row)]
    there = {(row.get("step"), "loss" in row) for row in rows}
    known = [_line(row) for row in history if "loss" in row or "eval_loss" in row]
    lost = [row for row in known if (row["step"], "loss" in row) not in there]
    if lost:
        say(f"warning: {path.name} lacks {len(lost)} lines: written again from the checkpoint")
        rows = sorted([*rows, *lost], key=lambda row: (row.get("step", 0), "eval_loss" in row))
    if rows or path.is_file():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _line(logs: Row) -> Row:
    """Return what metrics.jsonl keeps of a log, but for speed and memory."""
    line: Row = {"step": logs["step"], "epoch": round(float(logs.get("epoch") or 0), 6)}
    line |= {key: float(logs[key]) for key in KEPT if key in logs}
    return line | ({"tokens": int(logs.get("num_tokens", 0))} if "loss" in logs else {})


def tokens_so_far(state: TrainerState) -> int:
    """Return the tokens that had been trained on when the last loss was logged."""
    logged = (row["num_tokens"] for row in state.log_history if "num_tokens" in row)
    return int(max(logged, default=0))


class MetricsCallback(TrainerCallback):
    """On rank 0, writes a line of metrics.jsonl and says one for each log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began, self.first_step = time.monotonic(), 0
        self.last_log, self.last_tokens = self.began, 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.began = self.last_log = time.monotonic()
        self.first_step, self.last_tokens = state.global_step, tokens_so_far(state)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Row | None = None, **_: Any
    ) -> None:
        """Write one line, flushed at once."""
        logs, now = logs or {}, time.monotonic()
        if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        line = _line({**logs, "step": state.global_step, "epoch": state.epoch})
        text = f"validation loss {line.get('eval_loss', 0):.4f}"
        if "loss" in logs:
            speed = (line["tokens"] - self.last_tokens) / max(now - self.last_log, 1e-9)
            line["tokens_per_second"], self.last_tokens = round(speed, 1), line["tokens"]
            per_step = (now - self.began) / max(state.global_step - self.first_step, 1)
            left = shown_duration(per_step * (state.max_steps - state.global_step))
            rate = line.get("learning_rate", 0)
            text = f"loss {line['loss']:.4f}  learning rate {rate:.2e}  {speed:,.0f} tokens/s"
            text += f"  {left} left"
        self.last_log = now
        line["peak_memory_gib"] = round(peak_memory_gib(), 3)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        say(f"step {state.global_step}/{state.max_steps}  {text}")
