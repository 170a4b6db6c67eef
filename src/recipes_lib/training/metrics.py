"""What a training measures of itself: a line of metrics.jsonl and one on the terminal per log, and
before a process's first step the probe, forward and backward on the longest micro-batch.
"""

import contextlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState

from recipes_lib.core.files import Row, parsed_line, read_object, write_text
from recipes_lib.core.terminal import is_terminal, say, say_progress, shown_duration

OF_ROWS = ("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy", "aux_loss")
# how often the chosen answer has the larger implicit reward, and by how much
OF_PAIRS = ("rewards/accuracies", "rewards/margins", "eval_rewards/accuracies")
KEPT = (*OF_ROWS, *OF_PAIRS, "eval_rewards/margins")
MEASURED = ("tokens_per_second", "peak_memory_gib")  # of the machine: no checkpoint has them


def restore_lines(path: Path, checkpoint: Path | None) -> int:
    """Bring a metrics.jsonl to the state of a checkpoint; return how many lines were written anew.

    Lines of later steps go: the resumed run logs these steps again. A line that is missing or
    damaged is written anew from the checkpoint's own history, without what only the line knew: the
    speed and the memory.
    """
    by_key = {}
    if path.is_file():
        for text in path.read_bytes().splitlines():
            row = parsed_line(text)
            if row is not None:
                by_key[_key(row)] = row
    logged = []
    if checkpoint is not None:
        logged = read_object(checkpoint / "trainer_state.json")["log_history"]
    lines = []
    num_anew = 0
    for logs in logged:
        if not _is_line(logs):
            continue
        line = _line_of(logs, logs["step"])
        written = by_key.get(_key(line), {})
        kept = {name: value for name, value in written.items() if name not in MEASURED}
        if kept == line:
            line = written
        else:
            num_anew += 1
        lines.append(json.dumps(line) + "\n")
    if path.is_file() or lines:
        write_text(path, "".join(lines))
    return num_anew


def _is_line(logs: Row) -> bool:
    """Whether what the Trainer logs becomes a line; its summary at the end has no loss."""
    return "loss" in logs or "eval_loss" in logs


def _key(line: Row) -> tuple[object, bool]:
    """Return what tells a line from others: a step may have one of training, one of validation."""
    return line.get("step"), "loss" in line


def _line_of(logs: Row, step: int) -> Row:
    """Return the line of what the Trainer logs, without what is measured of the machine."""
    line: Row = {"step": step, "epoch": round(float(logs.get("epoch") or 0), 6)}
    for name in KEPT:
        if name in logs:
            line[name] = float(logs[name])
    if "loss" in logs:
        line["tokens"] = int(logs.get("num_tokens", 0))
    return line


def tokens_so_far(state: TrainerState) -> int:
    """Return the tokens that had been trained on when the last loss was logged."""
    counts = [row["num_tokens"] for row in state.log_history if "num_tokens" in row]
    return int(max(counts, default=0))


class MetricsCallback(TrainerCallback):
    """On rank 0, writes a line of metrics.jsonl and says one for each log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.progress = ""  # the updating line on the terminal

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.began = time.monotonic()
        self.last_log = self.began
        self.first_step = state.global_step
        self.last_tokens = tokens_so_far(state)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Row | None = None, **_: Any
    ) -> None:
        """Write one line, flushed at once."""
        logs = logs or {}
        now = time.monotonic()
        step = state.global_step
        if not state.is_world_process_zero or not _is_line(logs):
            return
        line = _line_of(logs, step)
        text = f"validation loss {line.get('eval_loss', 0):.4f}"
        if "eval_rewards/accuracies" in line:
            text += f"  chosen preferred {line['eval_rewards/accuracies']:.1%}"
            text += f"  margin {line['eval_rewards/margins']:.3f}"
        if "loss" in logs:
            speed = (line["tokens"] - self.last_tokens) / max(now - self.last_log, 1e-9)
            line["tokens_per_second"] = round(speed, 1)
            self.last_tokens = line["tokens"]
            per_step = (now - self.began) / max(step - self.first_step, 1)
            left = shown_duration(per_step * (state.max_steps - step))
            text = f"loss {line['loss']:.4f}  learning rate {line.get('learning_rate', 0):.2e}"
            text += f"  {speed:,.0f} tokens/s  {left} left"
        self.last_log = now
        line["peak_memory_gib"] = round(peak_memory_gib(), 3)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        text = f"step {step}/{state.max_steps}  {text}"
        if "loss" in logs:
            self.progress = text
            say_progress(text)
        else:
            self.on_train_end()
            say(text)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Let the last updating line stand."""
        if self.progress and is_terminal(sys.stdout):
            say(self.progress)
        self.progress = ""


def probe(trainer: Any, model: Any, lengths: list[int], steps: int) -> str:
    """Run the longest micro-batch as a step would, and return a line on its time and memory.

    Nothing of it remains. It is always on: DDP on three processes and more sums the gradients of a
    process's first backward pass in another order, and a resumed run would have one such step more.
    Every rank has to call it when the model is wrapped and a checkpoint's weights and optimizer are
    loaded, but its random state is not. `lengths` are those of all rows, `steps` are to come.
    """
    args = trainer.args
    longest = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    rows = [trainer.train_dataset[row] for row in longest[: args.per_device_train_batch_size]]
    batch = trainer.data_collator(rows)
    tokens = max(value.numel() for value in batch.values() if isinstance(value, torch.Tensor))
    num_items = max(trainer.num_items(batch), 1)
    passes = min(2, args.gradient_accumulation_steps)  # a second one meets gradients
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    options = trainer.accelerator.gradient_state.plugin_kwargs  # build.py sets it, for FSDP2
    sync_each_batch = options.get("sync_each_batch", False)
    seconds = 0.0
    _start_of_peak()
    try:
        with keep_random_state(args.device), trainer.uncounted():
            moments = _room_for_optimizer(trainer)
            if args.device.type != "cpu" or trainer.is_compiled:
                # the first pass on a GPU, or of compiled blocks, also makes kernels: not timed
                trainer.training_step(model, dict(batch), num_items)
                trainer.model.zero_grad(set_to_none=True)
            for number in range(1, passes + 1):
                # the last one exchanges: what FSDP2 keeps under no_sync, zero_grad does not see
                exchange = contextlib.nullcontext()
                if number < passes and not sync_each_batch:
                    exchange = trainer.accelerator.no_sync(model)
                _wait_for_device(args.device)
                began = time.monotonic()
                with exchange:
                    trainer.training_step(model, dict(batch), num_items)
                _wait_for_device(args.device)
                seconds = time.monotonic() - began
            del moments
    finally:
        trainer.model.zero_grad(set_to_none=True)
    rows_to_train = steps * args.gradient_accumulation_steps * args.per_device_train_batch_size
    total = shown_duration(seconds / tokens * rows_to_train * sum(lengths) / len(lengths))
    return (
        f"probe: the longest micro-batch ({len(rows)} rows, {tokens:,} tokens) takes"
        f" {seconds:.1f} s and {peak_memory_gib():.1f} GiB; training takes about {total}"
    )


def _wait_for_device(device: torch.device) -> None:
    """Wait for what a GPU was told to compute: a call returns before that is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Give the random numbers of the CPU and of this rank's GPU back at the end of the block."""
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices)


def _room_for_optimizer(trainer: Any) -> list[torch.Tensor]:
    """Hold what AdamW's two moments will take; nothing where a checkpoint has brought them."""
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.optimizer.state or "adam" not in name or "paged" in name:
        return []
    bytes_each = 2 if "8bit" in name else 8  # of two moments
    moments = []
    for group in trainer.optimizer.param_groups:
        for shard in group["params"]:
            if isinstance(shard, DTensor):  # of FSDP2: this rank's part
                shard = shard.to_local()
            size = shard.numel() * bytes_each
            moments.append(torch.ones(size, dtype=torch.uint8, device=shard.device))
    return moments


def _start_of_peak() -> None:
    """Begin a new peak; on a CPU the process's own, which getrusage reads too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_gib() -> float:
    """Return this process's peak: allocated on the accelerator, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
