"""The probe: forward and backward on the longest micro-batch, before a process's first step.

It shows in the first seconds what memory a step really takes and about how long the training will
be. Nothing of it remains: gradients are dropped, random state, order of the data, counts and
metrics are as before. It is always on, because DDP on three processes and more sums the gradients
of the first backward pass of a process in another order (it then rebuilds its buckets): without a
probe in front, a resumed run would have one such step more than an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.ranks import of_every_rank
from recipes_lib.core.terminal import shown_duration
from recipes_lib.training.batches import row_lengths

BYTES_OF_MOMENTS = 8  # AdamW's two in float32


def probe(trainer: Any, model: Any, tokens_to_train: float) -> str:
    """Run the longest micro-batch as a step would, and return a line on its time and memory; every
    rank has to call.

    To be called when the model is wrapped and a checkpoint's weights and optimizer are loaded, but
    its random state is not.

    Args:
        tokens_to_train: of one process in the whole training.

    Raises:
        EnvironmentFault: the GPU has too little memory for it.
    """
    batch, rows = _longest_batch(trainer)
    tokens = batch["input_ids"].numel()
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
                began = time.monotonic()
                with contextlib.nullcontext() if exchanges else trainer.accelerator.no_sync(model):
                    trainer.training_step(model, dict(batch), supervised)
                seconds = time.monotonic() - began
            del held
    except torch.OutOfMemoryError as error:
        raise of_every_rank(_out_of_memory(trainer.args, rows, tokens)) from error
    peak = f"{peak_memory_gib():.1f}"
    if torch.cuda.is_available():
        peak += f" of {torch.cuda.mem_get_info()[1] / 2**30:.0f}"
    return (
        f"probe: the longest micro-batch ({rows} rows, {tokens:,} tokens) takes {seconds:.1f} s and"
        f" {peak} GiB; training takes about {shown_duration(seconds / tokens * tokens_to_train)}"
    )


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
    tokens = trainer._total_train_tokens
    metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
    try:
        with torch.random.fork_rng():
            yield
    finally:
        trainer.model.zero_grad(set_to_none=True)
        trainer._total_train_tokens = tokens
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(metrics)


def _room_for_optimizer(trainer: Any) -> list[torch.Tensor]:
    """Hold what the optimizer's state will take; nothing where a checkpoint has brought it."""
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.optimizer.state or "adam" not in name or "paged" in name:
        return []
    each = 2 if "8bit" in name else BYTES_OF_MOMENTS
    groups = (group["params"] for group in trainer.optimizer.param_groups)
    trained = itertools.chain.from_iterable(groups)
    own = [part.to_local() if isinstance(part, DTensor) else part for part in trained]
    return [torch.ones(part.numel() * each, dtype=torch.uint8, device=part.device) for part in own]


def _out_of_memory(args: Any, rows: int, tokens: int) -> EnvironmentFault:
    hints = ["train.max_length cuts the longest rows; recipes plan says what saves how much"]
    if not args.gradient_checkpointing:
        hints.insert(0, "train.activation_checkpointing=true computes activations twice")
    if rows > 1:
        step = rows * args.gradient_accumulation_steps * args.world_size
        keep = f"with run.global_batch_size={step} keeps the step as it is"
        hints.insert(0, f"train.per_device_train_batch_size={rows // 2} {keep}")
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
