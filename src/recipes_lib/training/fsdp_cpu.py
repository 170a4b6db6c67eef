"""FSDP2 on CPU processes: a machine without GPUs runs the same sharded code as one with eight."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from accelerate import state
from accelerate.utils import DistributedType


def install() -> None:
    """Let this process shard on CPUs where it was launched with an FSDP config.

    accelerate (1.15) turns `distributed_type` into FSDP only for accelerators: under gloo on CPU an
    FSDP config silently becomes DDP. The missing branch is added to `AcceleratorState.__init__`.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    original = state.AcceleratorState.__init__
    installed = hasattr(original, "__wrapped__")
    if installed or torch.accelerator.is_available() or not (asked and several):
        return

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        first_time = state.AcceleratorState._shared_state == {}
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if not first_time or plugin is None or self.distributed_type != DistributedType.MULTI_CPU:
            return
        self.distributed_type = DistributedType.FSDP
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = plugin
        # One spelling of the device: some checks compare "cpu" with "cpu:0" and refuse.
        self.device = torch.device("cpu")
        shared = {"device": self.device, "distributed_type": DistributedType.FSDP}
        state.PartialState._shared_state.update(shared)

    state.AcceleratorState.__init__ = initialise
