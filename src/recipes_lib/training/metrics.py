"""What a training logs: per log a line of metrics.jsonl and one on the terminal; at the end, the
curves.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from recipes_lib.core.json_files import Row, read_rows, rows_from_the_end
from recipes_lib.core.terminal import say
from recipes_lib.training.load import LoadMeter, other_gpu_processes

SAY_EVERY_S = 10.0
LOOK_EVERY_S = 600.0  # for other processes on the GPUs: asking takes a tenth of a second
KEPT = ("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy", "aux_loss")


def peak_memory_gib() -> float:
    """Return this process's peak: allocated on the accelerator, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def first_and_last(path: Path, key: str) -> tuple[float | None, float | None]:
    """Return the first and the last value of a key in a metrics.jsonl, read from both ends; None
    where it has none.
    """
    first = next((row[key] for row in read_rows(path, skip_damaged=True) if key in row), None)
    return first, next((row[key] for _, row in rows_from_the_end(path) if key in row), None)


def has_evaluation(lines: list[Row], step: int) -> bool:
    """Whether lines of metrics.jsonl, or of a Trainer's history, hold the evaluation of a step."""
    return any(line["step"] == step and "eval_loss" in line for line in lines)


def forget_after(path: Path, step: int, evaluated: bool = True) -> None:
    """Cut off the lines after `step`, and what a crash left damaged: a resumed run writes them
    again.

    Args:
        step: the checkpoint's.
        evaluated: whether the evaluation of this step came before the checkpoint; if not, its line
            goes too.
    """
    if not path.is_file():
        return

    def stays(row: Row) -> bool:
        before = row.get("step", 0) - step
        return before < 0 or (before == 0 and (evaluated or "eval_loss" not in row))

    kept = next((end for end, row in rows_from_the_end(path) if stays(row)), 0)
    with path.open("rb+") as stream:
        stream.truncate(kept)
        os.fsync(stream.fileno())


class MetricsCallback(TrainerCallback):
    """Appends to metrics.jsonl on rank 0 and, unless `quiet`, shows progress.

    Each line of a training loss holds the seconds of every step since the last one, data and
    logging included: null for the first step of a process, and after a validation or a save, which
    would have a part of them.

    Args:
        step_tokens: tokens of all ranks by step, which the trainer adds to and a log takes.
    """

    def __init__(
        self, path: Path, quiet: bool = False, step_tokens: list[int] | None = None
    ) -> None:
        self.path = path
        self.quiet = quiet
        self.step_tokens = [] if step_tokens is None else step_tokens
        self._step_seconds: list[float | None] = []
        self._step_ended: float | None = None
        self._load = LoadMeter()
        self._looked = -math.inf
        self.bar: Any = None
        self._last = (time.monotonic(), 0)
        self._started = (time.monotonic(), 0)
        self._validation = (0, self._started[0], self._started[0])  # batches done, begun, last said

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock, and the bar on a terminal."""
        self._started = (time.monotonic(), state.global_step)
        self._last = (time.monotonic(), _tokens_at(self.path, state.global_step))
        self._load, self._step_ended = LoadMeter(), None
        if state.is_world_process_zero and not self.quiet and sys.stderr.isatty():
            from tqdm.auto import tqdm

            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the time of the step, and move the bar."""
        now = time.monotonic()
        began, self._step_ended = self._step_ended, now
        self._step_seconds.append(None if began is None else round(now - began, 6))
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Let the next step have no time."""
        self._step_ended = None

    on_save = on_evaluate

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        logs: Row | None = None,
        **_: Any,
    ) -> None:
        """Write one line, flushed at once."""
        logs, now = logs or {}, time.monotonic()
        if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        line: Row = {
            "step": state.global_step,
            "epoch": round(float(state.epoch or 0), 6),
        }
        line |= {key: float(logs[key]) for key in KEPT if key in logs}
        if "loss" in logs:
            line["tokens"] = tokens = int(logs.get("num_tokens", 0))
            seconds = max(now - self._last[0], 1e-9)
            line["tokens_per_second"] = round((tokens - self._last[1]) / seconds, 1)
            self._last = (now, tokens)
            line |= self._times(now, last=state.global_step >= state.max_steps)
        else:
            self._last = (now, self._last[1])
        line["peak_memory_gib"] = round(peak_memory_gib(), 3)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self._show(line, state)

    def _times(self, now: float, last: bool) -> Row:
        """What the steps since the last log took, and how much others used of the machine."""
        seconds, self._step_seconds = self._step_seconds, []
        times: Row = {"step_seconds": seconds}
        if len(self.step_tokens) == len(seconds):
            times["step_tokens"] = list(self.step_tokens)
        self.step_tokens.clear()
        if (others := self._load.others()) is not None:
            times["others_cpu"] = round(others, 4)
        if last or now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            if (processes := other_gpu_processes()) is not None:
                times["other_gpu_processes"] = processes
                self._step_ended = None
        return times

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        """Say now and then how far a validation is: that of a large set takes minutes."""
        (done, begun, said), now = self._validation, time.monotonic()
        batches = len(eval_dataloader)
        if done in (0, batches):  # the first batch of a pass
            done, begun, said = 0, now, now
        speak = now - said >= SAY_EVERY_S
        self._validation = (done + 1, begun, now if speak else said)
        if not speak or self.quiet or not state.is_world_process_zero:
            return
        left = _clock((now - begun) / done * (batches - done - 1))
        text = f"validation: {done + 1:,} of {batches:,} batches, {left} left"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            say(f"step {state.global_step}/{state.max_steps}  {text}")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def _show(self, line: Row, state: TrainerState) -> None:
        if self.quiet:
            return
        if "eval_loss" in line:
            text = f"step {line['step']}/{state.max_steps}  validation loss {line['eval_loss']:.4f}"
        else:
            began, first = self._started
            per_step = (time.monotonic() - began) / max(state.global_step - first, 1)
            left = _clock(per_step * (state.max_steps - state.global_step))
            text = (
                f"step {line['step']}/{state.max_steps}  loss {line['loss']:.4f}  learning rate"
                f" {line['learning_rate']:.2e}  {line['tokens_per_second']:,.0f} tokens/s "
                f" {left} left"
            )
        if self.bar is not None:
            self.bar.write(text)
            if "tokens_per_second" in line:
                self.bar.set_postfix_str(f"{line['tokens_per_second']:,.0f} tokens/s")
        else:
            say(text)


def _clock(seconds: float) -> str:
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


# figure: (unit, {name of the curve: key of metrics.jsonl})
FIGURES = {
    "loss": ("loss per token", {"training": "loss", "validation": "eval_loss"}),
    "validation_perplexity": ("validation perplexity", {"validation": "perplexity"}),
    "learning_rate": ("learning rate", {"learning rate": "learning_rate"}),
    "throughput": ("tokens per second", {"tokens/s": "tokens_per_second"}),
    "memory": ("peak memory, GiB", {"peak": "peak_memory_gib"}),
}
PERPLEXITY_LIMIT = 20.0  # exp(20) is beyond any axis worth drawing


def draw_figures(metrics: Path, folder: Path, title: str) -> None:
    """Draw every figure that the metrics have finite numbers for, as SVG and PNG; the same numbers
    give the same bytes.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "recipes",
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    import matplotlib.pyplot as plt

    points: dict[str, list[tuple[int, float]]] = {}
    for line in read_rows(metrics, skip_damaged=True):
        if line.get("eval_loss", PERPLEXITY_LIMIT) < PERPLEXITY_LIMIT:
            line["perplexity"] = math.exp(line["eval_loss"])
        for key, value in line.items():
            if isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(key, []).append((line["step"], value))
    folder.mkdir(parents=True, exist_ok=True)
    for stem, (unit, keys) in FIGURES.items():
        curves = {name: points[key] for name, key in keys.items() if key in points}
        if not curves:
            continue
        figure, axes = plt.subplots(figsize=(6.4, 3.6))
        # Fixed margins: a layout that is found anew for each file takes as long as the drawing.
        figure.subplots_adjust(left=0.16, right=0.98, bottom=0.14, top=0.91)
        for name, curve in curves.items():
            marker = "o" if len(curve) < 40 else None
            axes.plot(
                *zip(*curve, strict=True), marker=marker, markersize=3, linewidth=1.4, label=name
            )
        axes.set(xlabel="optimizer step", ylabel=unit)
        axes.set_title(title, fontsize="medium")
        if len(curves) > 1:
            axes.legend(frameon=False)
        figure.savefig(folder / f"{stem}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{stem}.png", dpi=120, metadata={"Software": None})
        plt.close(figure)
