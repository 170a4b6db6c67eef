"""The same training with another method, number of cards or way to share the model out: what would
fit, and how long it would take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipes_lib.planning.plan import Plan
from recipes_lib.planning.settings import Adapter, Settings

METHODS = ("QLoRA", "LoRA bf16", "full")
COUNTS = (1, 2, 4, 8)
DEFAULT_RANK = 16


@dataclass(frozen=True)
class MethodRow:
    """One line of the table. `strategy` is `one`, `DDP` or `FSDP2`; `plan` is None where the
    examples per step cannot be divided.
    """

    method: str
    processes: int
    strategy: str
    plan: Plan | None

    @property
    def is_the_recipe(self) -> bool:
        """Whether this is what the recipe does by itself."""
        return self.plan is not None and self.plan.settings == self.plan.recipe_settings


def method_rows(plan: Plan) -> list[MethodRow]:
    """Return the table: every method on 1, 2, 4 and 8 cards under DDP and FSDP2; on a processor,
    every method in one process.
    """
    rows = []
    for method in METHODS:
        changed = _as_method(plan.settings, method)
        for count in COUNTS if plan.settings.device == "gpu" else (1,):
            strategies = ("one",) if count == 1 else ("DDP", "FSDP2")
            rows += [
                MethodRow(
                    method, count, name, _spread(plan, changed, count, sharded=name == "FSDP2")
                )
                for name in strategies
            ]
    return rows


def divided(examples: int, per_device: int, processes: int) -> tuple[int, int] | None:
    """Return the largest micro-batch up to `per_device` that divides the examples per step, and its
    accumulation; None if none does.

    Example:
        >>> divided(64, 4, 8), divided(8, 4, 3)
        ((4, 2), None)
    """
    share, rest = divmod(examples, processes)
    if rest or not share:
        return None
    size = next(size for size in range(min(per_device, share), 0, -1) if share % size == 0)
    return size, share // size


def resharding(plan: Plan, settings: Settings) -> bool:
    """Return whether FSDP2 frees gathered weights after the forward pass: as the plan's own launch
    says, else as the shipped config does (fsdp.yaml frees them, fsdp_qlora.yaml keeps 4-bit
    weights).
    """
    own = plan.settings
    return own.reshard if own.sharded and own.bits == settings.bits else settings.bits is None


def _as_method(settings: Settings, method: str) -> Settings:
    """Return the settings with another method; the adapter stays the recipe's, or has rank 16 on
    every linear layer.
    """
    shape = settings.shape
    adapter = settings.adapter or Adapter(
        rank=DEFAULT_RANK, dropout=0.0, targets=tuple(shape.linears()), layers=shape.layers
    )
    if method == "full":
        return replace(settings, adapter=None, bits=None)
    if method == "QLoRA":
        return (
            replace(settings, adapter=adapter, bits=4, double_quantized=True)
            if settings.bits != 4
            else settings
        )
    dtype = "bfloat16" if settings.device == "gpu" else settings.dtype
    return replace(settings, adapter=adapter, bits=None, dtype=dtype)


def _spread(plan: Plan, settings: Settings, processes: int, *, sharded: bool) -> Plan | None:
    sizes = divided(plan.batches.examples_per_step, settings.per_device, processes)
    if sizes is None:
        return None
    machine = min(processes, 8)
    changed = replace(
        settings, world_size=processes, per_machine=machine, sharded=sharded, per_device=sizes[0]
    )
    if sharded:
        changed = replace(changed, reshard=resharding(plan, settings))
    return plan.with_settings(changed, sizes[1])
