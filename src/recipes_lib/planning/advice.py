"""Which settings to change, ranked by what they gain, and the recipe beside other methods and
numbers of cards. Each proposal is planned like the recipe itself, none is a rule of thumb.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from recipes_lib.planning.plan import Plan
from recipes_lib.planning.settings import Settings, adapter_of

WORTH_S, WORTH_SHARE = 5.0, 0.03
VALIDATION_SHARE = 0.25  # of the training: above it, less often or on fewer rows is proposed
_EVAL_SHARE = 0.2  # of the training between two validations
FEW_ROWS = 500  # validation rows that tell a loss to a few hundredths
LONGEST_MASKED_ROW = 4096
METHODS = ("QLoRA", "LoRA bf16", "full")
COUNTS = (1, 2, 4, 8)
DEFAULT_RANK = 16

_FOUR_BITS = (
    "quantization.load_in_4bit=true quantization.bnb_4bit_quant_type=nf4"
    " quantization.bnb_4bit_use_double_quant=true quantization.bnb_4bit_compute_dtype=bfloat16"
    " quantization.bnb_4bit_quant_storage=bfloat16"
)
_KEYS = {  # field of the settings -> the recipe's key
    "padding_free": "train.padding_free",
    "checkpointing": "train.activation_checkpointing",
    "per_device": "train.per_device_train_batch_size",
    "eval_per_device": "train.per_device_eval_batch_size",
    "max_length": "train.max_length",
}


@dataclass(frozen=True)
class Advice:
    """One proposal.

    Args:
        setting: what to type.
        why: in words.
        saves_s: seconds of the training; negative where it costs time.
        memory_gib: change of the peak.
        same_result: whether the same thing is learnt.
        makes_it_fit: whether it turns a plan that does not fit into one that does.
    """

    setting: str
    why: str
    saves_s: float
    memory_gib: float
    same_result: bool = True
    makes_it_fit: bool = False


def advise(plan: Plan) -> list[Advice]:
    """Return proposals, the best first, those that need more cards last: what makes the training
    fit, else what makes it faster.
    """
    found, more = {}, {}
    for why, same_result, changed in _to_be_faster(plan) if plan.fits else _to_fit(plan):
        if changed.fits:
            words = _words(plan.settings, changed.settings)
            found[words] = _compare(plan, changed, words, why, same_result)
            more[words] = changed.settings.world_size > plan.settings.world_size
    if not plan.fits:
        helps = [replace(item, makes_it_fit=not plan.uncounted) for item in found.values()]
        return sorted(
            helps, key=lambda item: (not item.same_result, more[item.setting], -item.saves_s)
        )
    least = max(WORTH_S, WORTH_SHARE * plan.duration.training)
    worth = [item for item in (*_validating(plan), *found.values()) if item.saves_s > least]
    if plan.uncounted:
        worth = [item for item in worth if item.memory_gib <= 0]
    return sorted(worth, key=lambda item: -item.saves_s)


def _words(old: Settings, new: Settings) -> str:
    """Return what to type to get from one training to the other."""
    words = []
    if new.sharded and (not old.sharded or new.world_size != old.world_size):
        config = "fsdp_qlora" if new.bits else "fsdp"
        words.append(f"launch.accelerate={config} launch.gpus={new.world_size}")
    elif old.sharded and not new.sharded:
        several = new.world_size > new.per_machine
        words.append(f"launch.accelerate={'ddp_multi_node' if several else 'ddp'}")
    if new.bits != old.bits:
        words.append(_FOUR_BITS)
    if new.adapter != old.adapter:
        words.append("lora.lora_dropout=0")
    for field, key in _KEYS.items():
        if (value := getattr(new, field)) != getattr(old, field):
            words.append(f"{key}={str(value).lower()}")
    return " ".join(words)


def _compare(before: Plan, after: Plan, words: str, why: str, same_result: bool) -> Advice:
    old, new = before.duration, after.duration
    saved = old.training + old.validation - new.training - new.validation
    return Advice(words, why, saved, after.memory.peak - before.memory.peak, same_result)


# Why something is changed, whether the same thing is learnt, and the plan with the change.
_Lever = tuple[str, bool, Plan]


def _to_be_faster(plan: Plan) -> Iterator[_Lever]:
    settings, padding = plan.settings, plan.batches.padding
    if not settings.flattened and padding >= 1.05:
        flat = plan.with_settings(padding_free=True)
        yield f"padding is {1 - 1 / padding:.0%} of the computed tokens", True, flat
    if settings.checkpointing:
        kept = plan.with_settings(checkpointing=False)
        yield "activations fit without computing them twice", True, kept
    if settings.sharded:
        why = "the model fits each GPU whole, so nothing has to be gathered"
        yield why, True, plan.with_settings(sharded=False)


def _validating(plan: Plan) -> Iterator[Advice]:
    """Validation that costs much of the training: less often, on fewer rows."""
    train = plan.recipe.train
    if plan.duration.validation <= VALIDATION_SHARE * plan.duration.training:
        return
    share = plan.duration.validation / plan.duration.training
    times = f"{share:.1f} times as long as" if share >= 1 else f"{share:.0%} of the time of"
    values = {"eval_strategy": "steps", "eval_steps": _EVAL_SHARE}
    seldom = replace(plan, recipe=replace(plan.recipe, train={**train, **values}))
    chooses = bool(train.get("load_best_model_at_end"))
    words = f"train.eval_steps={_EVAL_SHARE}"
    if train.get("eval_strategy") != "steps":
        words += " train.eval_strategy=steps"
    if chooses and train.get("save_strategy") != "best":  # the best is chosen among checkpoints
        words += f" train.save_strategy=steps train.save_steps={_EVAL_SHARE}"
    yield _compare(plan, seldom, words, f"validation takes {times} training", not chooses)
    lengths, split = plan.lengths, plan.recipe.data.split
    rows = lengths.validation
    if rows > 2 * FEW_ROWS and split.method == "hash":
        fewer = float(f"{split.validation * FEW_ROWS / rows:.2g}")
        kept = round(rows * fewer / split.validation)
        held = replace(lengths, train=lengths.train + rows - kept, validation=kept)
        words, why = f"data.split.validation={fewer:g}", f"{kept:,} validation rows, not {rows:,}"
        yield _compare(plan, replace(plan, lengths=held), words, why, False)


def _to_fit(plan: Plan) -> Iterator[_Lever]:
    settings, batches, memory = plan.settings, plan.batches, plan.memory
    recomputed = plan.with_settings(checkpointing=True)

    if not settings.checkpointing:
        yield "keeps the blocks' inputs only, and computes each block twice", True, recomputed
    if settings.eval_per_device > 1 and memory.validation > memory.activations + memory.moment:
        size = max(1, settings.eval_per_device // 4)
        yield "validation is what needs most", True, plan.with_settings(eval_per_device=size)
    for size in (settings.per_device // 2, settings.per_device // 4, 1):
        sizes = divided(batches.examples_per_step, size, settings.world_size) if size else None
        if sizes and sizes["per_device"] < settings.per_device:
            yield "smaller micro-batches of the same step", True, plan.with_settings(**sizes)
    for count in COUNTS[1:] if settings.device == "gpu" else ():
        sizes = divided(batches.examples_per_step, settings.per_device, count)
        if sizes and count >= settings.world_size + settings.sharded:
            why = f"weights, gradients and optimizer shared out over {count} GPUs"
            # fsdp_qlora.yaml keeps what it gathered
            shared = {"sharded": True, "reshard": settings.bits is None, **sizes}
            for other in (plan, recomputed):
                changed = other.with_settings(world_size=count, per_machine=count, **shared)
                yield why, True, changed
    adapter = settings.adapter
    if adapter is not None and adapter.dropout:
        without = replace(adapter, dropout=0.0)
        yield "no masks to keep", False, plan.with_settings(adapter=without)
    if adapter is not None and settings.bits is None:
        for other in (plan, recomputed):
            quantized = other.with_settings(bits=4, double_quantized=True)
            yield "the base in 4 bits", False, quantized
    if settings.max_length is None or settings.max_length > 512:
        yield "longer examples lose their tail", False, plan.with_settings(max_length=512)


@dataclass(frozen=True)
class MethodRow:
    """The same training with another method, number of cards or strategy: `one`, `DDP` or `FSDP2`.
    Without a plan the examples per step cannot be divided.
    """

    method: str
    processes: int
    strategy: str
    is_the_recipe: bool
    plan: Plan | None


def method_rows(plan: Plan) -> list[MethodRow]:
    """Return every method on 1, 2, 4 and 8 cards, under DDP and FSDP2; on a processor, on one."""
    rows, own = [], plan.settings
    for method in METHODS:
        changed = _as_method(plan, method)
        bits = changed.settings.bits
        # as the plan's own launch frees gathered weights; else as the shipped config does:
        # fsdp.yaml frees them, fsdp_qlora.yaml keeps 4-bit weights
        reshard = own.reshard if own.sharded and own.bits == bits else bits is None
        for count in COUNTS if own.device == "gpu" else (1,):
            sizes = divided(plan.batches.examples_per_step, own.per_device, count)
            for strategy in ("DDP", "FSDP2") if count > 1 else ("one",):
                other = None
                if sizes is not None:
                    other = changed.with_settings(world_size=count, per_machine=count, **sizes)
                    other = other.with_settings(sharded=strategy == "FSDP2")
                    if strategy == "FSDP2":
                        other = other.with_settings(reshard=reshard)
                same = other is not None and other.settings == own
                rows.append(MethodRow(method, count, strategy, same, other))
    return rows


def _as_method(plan: Plan, method: str) -> Plan:
    """Return the plan with another method, and the recipe's adapter or the usual one."""
    settings = plan.settings
    usual = {"r": DEFAULT_RANK, "target_modules": "all-linear"}
    adapter = settings.adapter or adapter_of(usual, settings.shape)
    if method == "full":
        return plan.with_settings(adapter=None, bits=None)
    if method == "QLoRA":
        quantized = plan.with_settings(adapter=adapter, bits=4, double_quantized=True)
        return plan if settings.bits == 4 else quantized
    dtype = "bfloat16" if settings.device == "gpu" else settings.dtype
    return plan.with_settings(adapter=adapter, bits=None, dtype=dtype)


def divided(examples: int, per_device: int, processes: int) -> dict[str, int] | None:
    """Return the largest micro-batch up to `per_device` that divides the examples per step.

    Example:
        >>> divided(64, 4, 8)
        {'per_device': 4, 'accumulation': 2}
        >>> divided(8, 4, 3) is None
        True
    """
    share, rest = divmod(examples, processes)
    if rest or not share:
        return None
    size = next(size for size in range(min(per_device, share), 0, -1) if share % size == 0)
    return {"per_device": size, "accumulation": share // size}
