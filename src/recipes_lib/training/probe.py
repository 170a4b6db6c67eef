"""The probe: forward and backward on the longest micro-batch, before a process's first step.

It shows in the first seconds what memory a step really takes and about how long the training will
be. Nothing of it remains: gradients are dropped, random state, order of the data, counts and
metrics are as before. It is always on, because DDP on three processes and more sums the gradients
of the first backward pass of a process in another order (it then rebuilds its buckets): without a
probe in front, a resumed run would have one such step more than an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.ranks import of_every_rank
from recipes_lib.training.batches import row_lengths

BYTES_OF_MOMENTS = 8  # AdamW's two in float32


@dataclass(frozen=True)
class Probe:
    """What the longest micro-batch took.

    Args:
        rows, tokens: its size, padding counted.
        seconds: of one pass, forward and backward.
        peak_gib: with room for the optimizer's state; total_gib: of the GPU, None on a CPU.
    """

    rows: int
    tokens: int
    seconds: float
    peak_gib: float
    total_gib: float | None

    def line(self, tokens_to_train: float) -> str:
        """Return what it says of the training, whose processes have so many tokens each."""
        peak = f"{self.peak_gib:.1f}"
        if self.total_gib is not None:
            peak += f" of {self.total_gib:.0f}"
        took = duration(self.seconds / self.tokens * tokens_to_train)
        return (
            f"probe: the longest micro-batch ({self.rows} rows, {self.tokens:,} tokens) takes"
            f" {self.seconds:.1f} s and {peak} GiB; training takes about {took}"
        )


def probe(trainer: Any, model: Any) -> Probe:
    """Run the longest micro-batch as a step would; every rank has to call.

    To be called when the model is wrapped and a checkpoint's weights and optimizer are loaded, but
    its random state is not.

    Raises:
        EnvironmentFault: the GPU has too little memory for it.
    """
    batch, rows = _longest_batch(trainer)
    passes = min(2, trainer.args.gradient_accumulation_steps)  # a second one meets gradients
    supervised = max(int((batch["labels"][:, 1:] != -100).sum()), 1)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    start_of_peak()
    seconds = 0.0
    try:
        with _nothing_happened(trainer):
            held = _room_for_optimizer(trainer)
            for number in range(1, passes + 1):
                # The last one exchanges: what FSDP2 keeps under no_sync, zero_grad does not see.
                exchanges = number == passes or trainer.syncs_each_batch
                context = (
                    contextlib.nullcontext() if exchanges else trainer.accelerator.no_sync(model)
                )
                began = time.monotonic()
                with context:
                    trainer.training_step(model, dict(batch), supervised)
                seconds = time.monotonic() - began
            del held
    except torch.OutOfMemoryError as error:
        raise of_every_rank(_out_of_memory(trainer, rows, batch["input_ids"].numel())) from error
    total = torch.cuda.mem_get_info()[1] / 2**30 if torch.cuda.is_available() else None
    return Probe(rows, batch["input_ids"].numel(), seconds, peak_memory_gib(), total)


def _longest_batch(trainer: Any) -> tuple[dict[str, Any], int]:
    """Return the longest rows of the data as one micro-batch, and how many rows it has: the worst
    that can come, not what will.
    """
    rows = trainer.train_dataset
    lengths = row_lengths(rows)
    longest = sorted(range(len(rows)), key=lambda row: (-lengths[row], row))
    chosen = longest[: trainer.args.per_device_train_batch_size]
    return trainer.data_collator([rows[row] for row in chosen]), len(chosen)


@contextlib.contextmanager
def _nothing_happened(trainer: Any) -> Iterator[None]:
    """Undo what a micro-batch leaves: random numbers, gradients, counts, metrics."""
    restore, tokens = random_state(), trainer._total_train_tokens
    metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
    try:
        yield
    finally:
        trainer.model.zero_grad(set_to_none=True)
        trainer._total_train_tokens = tokens
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(metrics)
        restore()


def random_state() -> Callable[[], None]:
    """Return what brings the random state of now back."""
    python, numpy, processor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(processor)
        torch.cuda.set_rng_state_all(gpus)

    return restore


def _room_for_optimizer(trainer: Any) -> list[torch.Tensor]:
    """Hold what the optimizer's state will take; nothing where a checkpoint has brought it."""
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.optimizer.state or "adam" not in name or "paged" in name:
        return []
    each = 2 if "8bit" in name else BYTES_OF_MOMENTS
    trained = (one for group in trainer.optimizer.param_groups for one in group["params"])
    local = (one.to_local() if isinstance(one, DTensor) else one for one in trained)
    return [torch.ones(one.numel() * each, dtype=torch.uint8, device=one.device) for one in local]


def _out_of_memory(trainer: Any, rows: int, tokens: int) -> EnvironmentFault:
    args = trainer.args
    hints = []
    if rows > 1:
        half = rows // 2
        hints.append(
            f"train.per_device_train_batch_size={half} with run.global_batch_size="
            f"{rows * args.gradient_accumulation_steps * args.world_size} keeps the step as it is"
        )
    if not args.gradient_checkpointing:
        hints.append("train.activation_checkpointing=true computes activations twice")
    hints.append("train.max_length cuts the longest rows; recipes plan says what saves how much")
    what = "the GPU has too little memory for the longest micro-batch"
    return EnvironmentFault(f"{what} ({rows} rows, {tokens:,} tokens)", *hints)


def start_of_peak() -> None:
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
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def duration(seconds: float) -> str:
    """Return a time for people.

    Example:
        >>> duration(40), duration(5000), duration(200_000)
        ('40 s', '83 min', '56 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
