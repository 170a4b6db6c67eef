"""The probe: forward and backward on the longest micro-batch, before a process's first step. It
shows in the first seconds what memory a step takes and about how long the training will be.

Nothing of it remains. It is always on, because DDP on three processes and more sums the gradients
of a process's first backward pass in another order (it then rebuilds its buckets): without a probe
in front, a resumed run would have one such step more than an uninterrupted one.
"""

from __future__ import annotations

import contextlib
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


def probe(trainer: Any, model: Any, lengths: list[int], steps: int) -> str:
    """Run the longest micro-batch as a step would, and return a line on its time and memory.

    Every rank has to call it when the model is wrapped and a checkpoint's weights and optimizer are
    loaded, but its random state is not. `lengths` are those of all rows, `steps` are to come.
    """
    args, data = trainer.args, trainer.train_dataset
    longest = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    rows = [data[row] for row in longest[: args.per_device_train_batch_size]]
    batch = trainer.data_collator(rows)
    tokens = batch["input_ids"].numel()
    supervised = max(int((batch["labels"][:, 1:] != -100).sum()), 1)
    passes = min(2, args.gradient_accumulation_steps)  # a second one meets gradients
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    each = trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    seconds = 0.0
    _start_of_peak()
    try:
        with _nothing_happened(trainer):
            held = _room_for_optimizer(trainer)
            for number in range(1, passes + 1):
                # The last one exchanges: what FSDP2 keeps under no_sync, zero_grad does not see.
                exchanges = each or number == passes
                began = time.monotonic()
                with contextlib.nullcontext() if exchanges else trainer.accelerator.no_sync(model):
                    trainer.training_step(model, dict(batch), supervised)
                seconds = time.monotonic() - began
            del held
    except torch.OutOfMemoryError as error:
        what = "the GPU has too little memory for the longest micro-batch"
        fault = EnvironmentFault(
            f"{what} ({len(rows)} rows, {tokens:,} tokens)",
            "halve train.per_device_train_batch_size: accumulation keeps run.global_batch_size",
            "or set train.activation_checkpointing: true; recipes plan says what saves how much",
        )
        raise of_every_rank(fault) from error
    on_gpu = torch.cuda.is_available()
    of_all = f" of {torch.cuda.mem_get_info()[1] / 2**30:.0f}" if on_gpu else ""
    rows_to_train = steps * args.gradient_accumulation_steps * args.per_device_train_batch_size
    total = shown_duration(seconds / tokens * rows_to_train * sum(lengths) / len(lengths))
    return (
        f"probe: the longest micro-batch ({len(rows)} rows, {tokens:,} tokens) takes"
        f" {seconds:.1f} s and {peak_memory_gib():.1f}{of_all} GiB; training takes about {total}"
    )


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
    """Hold what AdamW's two moments will take; nothing where a checkpoint has brought them."""
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.optimizer.state or "adam" not in name or "paged" in name:
        return []
    each = 2 if "8bit" in name else 8  # bytes
    trained = [part for group in trainer.optimizer.param_groups for part in group["params"]]
    own = [part.to_local() if isinstance(part, DTensor) else part for part in trained]
    return [torch.ones(part.numel() * each, dtype=torch.uint8, device=part.device) for part in own]


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
