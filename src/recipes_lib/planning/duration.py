"""How long a training takes: on a GPU the work of a counted step over what the card reaches, on a
processor what was measured there.

A pass lasts as long as its products take at the rate of tensor cores and everything else at that of
memory (`planning.step_costs`), and no less than its kernels take to be launched.

Operations per token: 4N for LoRA (2N forward, 2N for the gradients of activations), 6N for full
fine-tuning, 2N more with activation checkpointing; N counts the parameters that a token passes
through. Attention and the adapter are added; MFU is with 4N alone, as published figures are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipes_lib.planning.batches import Batches
from recipes_lib.planning.cards import Card, core_tflops
from recipes_lib.planning.measured import measured_on
from recipes_lib.planning.memory import GIB, weight_gib
from recipes_lib.planning.settings import Settings
from recipes_lib.planning.step_costs import StepCosts, step_costs

# Shares of a card's peak: 720 to 790 of 989 TFLOP/s in large bf16 products, and 3.0 of 3.35 TB/s,
# were measured on an H100, not by this project; other cards are taken to reach the same.
PRODUCTS_REACHED, BANDWIDTH_REACHED = 0.75, 0.9
# Measured: 13.4 us [12.7, 14.3] of an AMD EPYC's core for each kernel of a step (the trainer, LoRA,
# 32 blocks of width 64, 8 tokens, torch 2.13; n=16, 2026-11-26). Those of compiled blocks are taken
# to cost the same.
LAUNCH_S = 13e-6
# Assumed, these four: nobody has measured them for this project.
READ_GIB_PER_S = 0.7  # weights from disk
NETWORK = 25.0  # GB/s per GPU between machines
START_S, FINISH_S = 60.0, 45.0  # imports, data; saving, reloading and checking the weights
CPU_START_S, CPU_FINISH_S = 15.0, 12.0
# interpreter and optimizer, as a two-layer model shows them
CPU_LAYER_PASS_S, CPU_STEP_S = 2e-3, 0.05


@dataclass(frozen=True)
class Duration:
    """Seconds of one training, and how fast it goes.

    Args:
        around: start, loading, saving and checking.
        tokens_per_second: per process, without padding.
        mfu: share of the peak, counted with 4N (6N for full fine-tuning) on computed tokens.
    """

    training: float
    validation: float
    around: float
    tokens_per_second: float
    mfu: float

    @property
    def total(self) -> float:
        """Everything."""
        return self.training + self.validation + self.around


@dataclass(frozen=True)
class EvalTime:
    """Seconds of one evaluation of one model.

    Args:
        answering: the model's own work.
        judging: the judge's.
        unknown: what was never measured, tasks and judges; it is not in the sum.
    """

    name: str
    answering: float
    judging: float
    unknown: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Everything."""
        return self.answering + self.judging


def operations_per_token(settings: Settings) -> float:
    """Return operations per computed token without attention, with the adapter's 6 per weight."""
    n, trained = settings.shape.active_parameters, settings.trained_parameters
    passes = 6 if settings.adapter is None else 4
    own = 0 if settings.adapter is None else 6 * trained
    return n * (passes + (2 if settings.checkpointing else 0)) + own


def training_duration(
    settings: Settings, batches: Batches, card: Card, validation_tokens: float = 0.0
) -> Duration:
    """Return the time of a whole training.

    Args:
        validation_tokens: computed tokens of all passes over the validation set.
    """
    world, on_cpu = settings.world_size, settings.device == "cpu"
    n, layers = settings.shape.active_parameters, settings.shape.layers
    if on_cpu:  # the processes share the cores
        kind = "4bit" if settings.bits else "bf16" if settings.compute_bytes == 2 else "fp32"
        tflops = card.tflops * core_tflops(kind) / core_tflops("bf16") / settings.per_machine
        costs, launch = StepCosts(kernels=layers), CPU_LAYER_PASS_S
    else:  # float32 goes without the half precision of tensor cores
        tflops = card.tflops * PRODUCTS_REACHED * (1.0 if settings.compute_bytes == 2 else 0.25)
        costs, launch = step_costs(settings), LAUNCH_S
    speed, memory = tflops * 1e12, card.bandwidth * 1e9 * BANDWIDTH_REACHED
    per_pass = batches.computed / batches.forward_passes / world
    attention = _attention(settings, batches.context)
    operations = per_pass * (operations_per_token(settings) + attention)
    one = operations / speed + (per_pass * costs.per_token + costs.constant) / memory
    one = max(one + _dequantising(settings, card), costs.kernels * launch)
    if (row := measured_on(card.name, settings)) is not None:
        one *= row.stretch
    moved = _moved_per_pass(settings, card)
    one = max(one, moved) + 0.1 * min(one, moved)
    step = one * batches.forward_passes + _per_step(settings, card)
    forward = (2 * n + attention / 3.5) / speed + costs.forward / memory
    counted = n * (6 if settings.adapter is None else 4)
    return Duration(
        training=step * batches.steps,
        validation=validation_tokens / world * forward,
        around=_around(settings),
        tokens_per_second=batches.tokens / world / step,
        mfu=batches.computed / world * counted / step / (card.tflops * 1e12),
    )


def _attention(settings: Settings, context: float) -> float:
    """Operations per token of scores and weighted values, half of the square with a causal kernel,
    all of it under a mask, which windows need with sdpa; and of states.
    """
    passes = 3.5 + (1 if settings.checkpointing and not settings.selective else 0)
    total = 0.0
    for block, count in settings.shape.kinds:
        within, square = context, 4 if settings.masked else 2
        if block.window is not None and block.window < context:
            if settings.attention == "flash":
                within = min(context, 2 * block.window)
            else:
                square = 4
        width = (block.query + block.output) / 2
        total += count * (square * width * within + 4 * block.state)
    return passes * total


def _dequantising(settings: Settings, card: Card) -> float:
    """Seconds per pass to write quantized weights out as bf16 and read them again."""
    if not settings.bits or settings.device == "cpu":
        return 0.0
    moved = (3 if settings.checkpointing else 2) * 4.5 * settings.shape.linear_parameters
    return moved / (card.bandwidth * 1e9 * BANDWIDTH_REACHED)


def _moved_per_pass(settings: Settings, card: Card) -> float:
    """Seconds per pass to gather FSDP2's shards, and to share gradients out."""
    if not settings.sharded:
        return 0.0
    share = (settings.world_size - 1) / settings.world_size
    whole = weight_gib(settings) * GIB * (2 if settings.reshard else 1)
    gradients = settings.trained_parameters * 4
    return (whole + gradients) * share / (_link(settings, card) * 1e9)


def _per_step(settings: Settings, card: Card) -> float:
    """Seconds of one optimizer step, DDP's sum of gradients before it."""
    shards = settings.world_size if settings.sharded else 1
    update = settings.trained_parameters / shards * 20 / (card.bandwidth * 1e9 * BANDWIDTH_REACHED)
    update += CPU_STEP_S if settings.device == "cpu" else 0.005
    if settings.sharded or settings.world_size == 1:
        return update
    share = 2 * (settings.world_size - 1) / settings.world_size
    moved = settings.trained_parameters * settings.trained_bytes * share
    return update + moved / (_link(settings, card) * 1e9)


def _link(settings: Settings, card: Card) -> float:
    return card.link if settings.world_size <= settings.per_machine else min(card.link, NETWORK)


def _around(settings: Settings) -> float:
    """Start and end: imports, weights from disk, saving and checking."""
    weights = settings.shape.parameters * settings.weight_bytes / GIB
    if settings.device == "cpu":
        return CPU_START_S * settings.per_machine**0.5 + CPU_FINISH_S + 3 * weights
    saved = settings.trained_parameters * settings.trained_bytes / GIB
    moved = 2 * weights + (saved if settings.adapter is None else 0.0)
    return START_S + FINISH_S + moved / READ_GIB_PER_S


def walltime(seconds: float) -> int:
    """Return the time to ask a scheduler for: half as long again, in whole quarters of an hour.

    The half is for what is assumed; a job that needs more ends in a checkpoint and goes on.

    Example:
        >>> walltime(100), walltime(3600)
        (900, 5400)
    """
    return max(1, math.ceil(seconds * 1.5 / 900)) * 900
