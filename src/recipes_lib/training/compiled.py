"""torch.compile, one decoder block after the other: the same block is compiled once for all layers,
in seconds where a whole model takes minutes, and under FSDP2 each block still gathers its own
weights.

What the compiler cannot take is not suffered in silence: a block that falls apart into pieces, and
one that is compiled again and again, are said with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from recipes_lib.core.terminal import say

SETTLED_AFTER = 3  # steps: the second length of a row makes the lengths a variable
# of one kind of block: with and without gradients, windows and dropout, each for the first length
# and for any; at as many torch goes on without compiling
MOST_GRAPHS = 32


def compile_blocks(model: Any, train: Mapping[str, Any], cache: Path) -> CompileReport:
    """Have the decoder blocks of a model compiled when they are first used; return what tells how
    it went.

    Args:
        train: the recipe's section.
        cache: where what was compiled is kept for a resumed run, unless the environment names
            another folder.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    blocks = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    for block in blocks:
        # not `block.compile()`, which takes hooks along: FSDP2 gathers weights in one
        block.forward = torch.compile(
            block.forward,
            backend=train.get("torch_compile_backend") or "inductor",
            mode=train.get("torch_compile_mode"),
        )
    return CompileReport(len({type(block) for block in blocks}))


class CompileReport(TrainerCallback):
    """Says after the first steps what was compiled, and once where it goes on and on.

    Args:
        kinds: how many classes of blocks there are; 0 where nothing can be compiled.
    """

    def __init__(self, kinds: int) -> None:
        self.kinds = kinds
        self._steps = 0
        self._warned = False
        counters.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at torch's counts."""
        self._steps += 1
        if not state.is_world_process_zero:
            return
        early_end = state.global_step == state.max_steps and self._steps < SETTLED_AFTER
        if self._steps == SETTLED_AFTER or early_end:
            say(self.line())
        graphs = counters["stats"]["unique_graphs"]
        if not self._warned and graphs >= MOST_GRAPHS:
            self._warned = True
            say(
                f"warning: {graphs} graphs were compiled, something new with every batch; at"
                f" {MOST_GRAPHS} of one piece torch goes on without compiling:"
                " train.torch_compile=false may be faster"
            )

    def line(self) -> str:
        """Return what was compiled, in one line."""
        if not self.kinds:
            return "warning: nothing is compiled: this model has no blocks that transformers marks"
        graphs, breaks = counters["stats"]["unique_graphs"], counters["graph_break"]
        kinds = "one kind" if self.kinds == 1 else f"{self.kinds} kinds"
        text = f"compiled: {graphs} graphs of {kinds} of blocks"
        if not breaks:
            return f"{text}, none of them broken"
        reason, _ = max(breaks.items(), key=lambda item: item[1])
        return f"{text}; broken at {sum(breaks.values())} places ({reason.splitlines()[0]})"
