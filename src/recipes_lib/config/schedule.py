"""The learning-rate schedule in words: how many steps warm up, and that the first of them trains
nothing.
"""

from __future__ import annotations

import math

WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
FEW_STEPS = 20


def warmup_steps(value: float, steps: int) -> int:
    """Return the warm-up steps of a run; a value below 1 is a fraction of all steps, rounded up as
    transformers does.

    Example:
        >>> warmup_steps(0.03, 2), warmup_steps(0.1, 60), warmup_steps(5, 60)
        (1, 6, 5)
    """
    return int(value) if value >= 1 else math.ceil(steps * value)


def describe_schedule(scheduler: str, learning_rate: float, warmup: float, steps: int) -> str:
    """Return the schedule of the start-up lines. A warm-up begins at 0, so its first step moves no
    weight.

    Example:
        >>> describe_schedule("cosine", 1e-3, 0.1, 39)
        'cosine, learning rate 0.001, warmup 4 of 39 steps (step 1 has learning rate 0)'
        >>> describe_schedule("cosine", 1e-3, 0.03, 2)
        'cosine, learning rate 0.001, warmup 1 of 2 steps (step 1 has learning rate 0 and trains nothing; none: train.warmup_steps=0)'
        >>> describe_schedule("linear", 1e-3, 0, 60)
        'linear, learning rate 0.001, no warmup'
        >>> describe_schedule("linear", 1e-3, 500, 60)
        'linear, learning rate 0.001, never reached: warmup takes 500 steps, and the run has 60'
    """  # noqa: E501
    number = 0 if scheduler in WITHOUT_WARMUP else warmup_steps(warmup, steps)
    head = f"{scheduler}, learning rate {learning_rate:g}, "
    if not number:
        return head + "no warmup"
    if number >= steps:
        return f"{head}never reached: warmup takes {number:,} steps, and the run has {steps:,}"
    first = "step 1 has learning rate 0" + (
        " and trains nothing; none: train.warmup_steps=0" if steps <= FEW_STEPS else ""
    )
    return f"{head}warmup {number:,} of {steps:,} steps ({first})"
