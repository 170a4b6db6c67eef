"""What a training says before its first step: the batch arithmetic, what is trained, and what is
really active.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from peft import PeftModel

from recipes_lib.config.batch import describe_batch, describe_last_step, planned_steps
from recipes_lib.config.schedule import describe_schedule
from recipes_lib.models.architectures import describe_targets

if TYPE_CHECKING:
    from recipes_lib.training.trainer import RecipeTrainer


def start_up_lines(trainer: RecipeTrainer, launch_line: str) -> list[str]:
    """Return the lines, in the order in which they are said.

    Args:
        launch_line: what `launch_check.check_launch` returned.
    """
    args, model = trainer.args, trainer.model
    padding = (
        ", padding-free"
        if args.padding_free or trainer.flattens
        else ", packed"
        if args.packing
        else ""
    )
    precision = (
        "bf16 mixed"
        if args.bf16
        else "fp16 mixed"
        if args.fp16
        else str(model.dtype).removeprefix("torch.")
    )
    attention = getattr(model.config, "_attn_implementation", "unknown")
    shape = {
        "per_device": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
    }
    shape["world_size"] = args.world_size
    rows, drop_last = len(trainer.train_dataset), args.dataloader_drop_last
    steps = planned_steps(
        rows, **shape, epochs=args.num_train_epochs, max_steps=args.max_steps, drop_last=drop_last
    )
    scheduler = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    lines = [
        (
            f"launch: {launch_line}; precision {precision}; attention {attention}{padding}; seed"
            f" {args.seed}"
        ),
        f"batch: {describe_batch(rows, steps, **shape)}",
    ]
    last = describe_last_step(rows, **shape, drop_last=drop_last)
    if last and steps[1] >= steps[0]:
        lines.append(f"epoch: {last}")
    lines.append(
        f"schedule: {describe_schedule(scheduler, args.learning_rate, args.warmup_steps, steps[1])}"
    )
    raised = trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision != "no"
    lines.append(f"trains: {describe_trainable(model, raised=raised)}")
    if isinstance(model, PeftModel):
        lines.append(describe_targets(model))
    if trainer.is_fsdp_enabled and (
        args.gradient_accumulation_steps > 1 or trainer.max_tokens is not None
    ):
        lines.append(f"gradients: {describe_exchange(model, trainer.syncs_each_batch)}")
    return lines


def count_quantized(model: Any) -> int:
    """Return the number of 4-bit weight matrices; under FSDP they are shards of another type, known
    by their layer.
    """
    return sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())


def describe_trainable(model: Any, *, raised: bool = False) -> str:
    """Return how many parameters are trained, and where they sit.

    Args:
        raised: whether FSDP2 will keep those of half precision in float32, as it does under mixed
            precision.
    """
    trainable = [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    count, total = (
        sum(parameter.numel() for _, parameter in trainable),
        sum(parameter.numel() for parameter in model.parameters()),
    )
    precision = ", ".join(
        sorted({str(parameter.dtype).removeprefix("torch.") for _, parameter in trainable})
    )
    quantized = count_quantized(model)
    if raised and not quantized and precision != "float32":
        precision = f"float32 (FSDP2 keeps the {precision} weights so)"
    frozen = {
        str(p.dtype).removeprefix("torch.")
        for p in model.parameters()
        if not p.requires_grad and p.dtype != torch.uint8
    }
    base = (
        "; base"
        f" {'NF4 in ' + str(quantized) + ' layers' if quantized else ', '.join(sorted(frozen))}"
        if frozen or quantized
        else ""
    )
    return f"{count:,} of {total:,} parameters in {precision}{base}"


def describe_exchange(model: Any, each_batch: bool) -> str:
    """Return when FSDP2 shares the gradients out, and what each process keeps until then."""
    if each_batch:
        return "shared out after every backward pass (sync_each_batch), each rank keeps its share"
    whole = (
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        * 4
        / 2**20
    )
    return f"shared out once per step, each rank keeps all of them until then: {whole:,.1f} MiB"
