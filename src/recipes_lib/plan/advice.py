"""A plan for a reader: its numbers, what to change, and the same training in other ways."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from recipes_lib.config.launch import plan_launch
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.terminal import shown_duration
from recipes_lib.plan.plan import Plan

COUNTS = (2, 4, 8)
MIB = 2**20
RECOMPUTE = "train.activation_checkpointing=true"
FOUR_BITS = (
    "quantization.load_in_4bit=true",
    "quantization.bnb_4bit_quant_type=nf4",
    "quantization.bnb_4bit_use_double_quant=true",
    "quantization.bnb_4bit_compute_dtype=bfloat16",
    "quantization.bnb_4bit_quant_storage=bfloat16",  # FSDP2 shares out no other
)


@dataclass(frozen=True)
class Advice:
    """A change of a recipe.

    Args:
        words: what to type, `section.key=value`.
        why: what it does.
        plan: the plan with it.
    """

    words: str
    why: str
    plan: Plan


def changed(plan: Plan, overrides: Sequence[str], words: Sequence[str]) -> Plan | None:
    """Return the plan with further words on the command line; None where they cannot be trained."""
    try:
        recipe = load_recipe(plan.recipe.path, [*overrides, *words])
        launches = any(word.startswith("launch.") for word in words)
        launch = plan_launch(recipe.launch) if launches else plan.launch
        other = replace(plan, recipe=recipe, launch=launch)
        _ = other.memory
    except RecipesError:
        return None
    return other


def advise(plan: Plan, overrides: Sequence[str] = ()) -> Advice | None:
    """Return the first change that fits, smallest first; for what fits, one that is faster.

    Args:
        overrides: the words that were typed.
    """
    ways = _ways_to_fit(plan)
    if plan.fits:
        why = "activations fit without computing every block twice"
        ways = iter([(["train.activation_checkpointing=false"], why)] * plan.checkpointing)
    for words, why in ways:
        other = changed(plan, overrides, words)
        if other is not None and other.fits:
            return Advice(shlex.join(words), why, other)
    return None


def _same_step(plan: Plan) -> list[str]:
    """Return the word that makes the accumulation follow the micro-batch, where none does."""
    known = plan.recipe.run.global_batch_size
    return [] if known else [f"run.global_batch_size={plan.steps.examples}"]


def _ways_to_fit(plan: Plan) -> Iterator[tuple[list[str], str]]:
    steps, recipe = plan.steps, plan.recipe
    keep = _same_step(plan)
    recompute = [] if plan.checkpointing else [RECOMPUTE]
    for size in (size for size in (4, 2, 1) if size < steps.per_device):
        smaller = [f"train.per_device_train_batch_size={size}", *keep]
        yield smaller, "smaller micro-batches of the same step"
    if recompute:
        yield recompute, "keeps the inputs of the blocks and computes each twice"
    recompute += ["train.per_device_train_batch_size=1", *keep] if steps.per_device > 1 else []
    yield recompute, "both"
    for count in (count for count in COUNTS if count > steps.world_size and not plan.on_cpu):
        sharded = ["launch.accelerate=fsdp", f"launch.gpus={count}", *recompute]
        yield sharded, f"weights and optimizer shared out over {count} GPUs"
    if recipe.lora is not None and recipe.quantization is None:
        yield [*FOUR_BITS, *recompute], "the base in 4 bits; another experiment"
    shorter = ["train.max_length=512", *recompute]
    yield shorter, "longer examples lose their tail; another experiment"


def table(plan: Plan, overrides: Sequence[str] = ()) -> Iterator[str]:
    """Yield the same training by other methods and on more cards, a line for each."""
    yield f"{'method':<8} {'cards':>5}  {'':<6} {'GiB':>7}  fits  {'time':>10}"
    methods: dict[str, tuple[str, ...]] = {"full": ()}
    if plan.recipe.lora is not None:
        methods = {"LoRA": ("quantization=null",), "QLoRA": FOUR_BITS}
    launches = [("", 1), *((kind, count) for count in COUNTS for kind in ("ddp", "fsdp"))]
    for (method, words), (kind, count) in itertools.product(methods.items(), launches):
        size = math.gcd(plan.steps.per_device, plan.steps.examples // count)
        batch = [f"train.per_device_train_batch_size={size}", *_same_step(plan)]
        launch = [f"launch.accelerate={kind}", f"launch.gpus={count}"] if kind else []
        other = changed(plan, overrides, [*words, *batch, *launch])
        if other is not None and not (kind and plan.on_cpu):
            fits = "yes" if other.fits else "no"
            time = shown_duration(other.seconds) if other.seconds is not None else "-"
            yield (
                f"{method:<8} {count:>5}  {kind:<6} {other.memory.needed:>7.1f}  {fits:<4} "
                f" {time:>10}"
            )


def to_dict(plan: Plan, advice: Advice | None, price: float | None = None) -> dict[str, object]:
    """Return the plan's numbers by their names."""
    speed, source = plan.speed or (None, "not known for this card")
    return {
        "model": plan.recipe.model.name_or_path,
        "method": plan.method,
        "card": plan.card.name,
        "card_gib": plan.card.memory_gib,
        "rows": plan.rows.source,
        **asdict(plan.trace),
        **asdict(plan.steps),
        "largest_micro_batch_that_fits": plan.largest_tokens,
        "memory_gib": asdict(plan.memory),
        "peak_gib": plan.memory.peak,
        "needed_gib": plan.memory.needed,
        "fits": plan.fits,
        "tokens_per_second": speed,
        "speed": source,
        "seconds": plan.seconds,
        "cost": _cost(plan, price),
        "advice": advice and advice.words,
    }


def _cost(plan: Plan, price: float | None) -> float | None:
    if price is None or plan.seconds is None:
        return None
    return round(price * plan.seconds / 3600 * plan.steps.world_size, 2)


def lines(plan: Plan, advice: Advice | None, price: float | None = None) -> Iterator[str]:
    """Yield the plan for a reader, at most 15 lines."""
    traced, steps, memory, card = plan.trace, plan.steps, plan.memory, plan.card
    assumed = "  (assumed: this machine has no GPU)" if card.assumed else ""
    kind = "FSDP2" if plan.sharded else "DDP" if steps.world_size > 1 else "one process"
    yield f"{plan.recipe.name}: {plan.method} on {steps.world_size} x {card.name}, {kind}{assumed}"
    yield (
        f"model     {plan.recipe.model.name_or_path}, {traced.parameters:,} parameters,"
        f" {traced.trained:,} trained"
    )
    batch = f"{steps.per_device} per device x {steps.accumulation} x {steps.world_size}"
    yield (
        f"steps     {steps.steps:,} of {steps.examples} examples ({batch}), {steps.per_epoch:,} per"
        " epoch"
    )
    yield f"tokens    {steps.tokens:,} ({plan.rows.source})"
    parts = asdict(memory).items()
    listed = ", ".join(f"{name} {size:.1f}" for name, size in parts if size >= 0.05)
    yield f"memory    {memory.needed:.1f} GiB: {listed}"
    kept = traced.checkpointed if plan.checkpointing else traced.per_token
    yield f"          {steps.largest:,} tokens in a micro-batch, each keeps {kept / MIB:.2f} MiB"
    if traced.carries_state:
        yield "          an upper estimate: layers with a state as torch computes them"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    room = f"room for a micro-batch of {plan.largest_tokens:,} tokens"
    yield f"{verdict}: {card.memory_gib:.1f} GiB on the card, {room}"
    if plan.seconds is None or plan.speed is None:
        yield "time      not estimated: the peak of this card is not known"
    else:
        cost = f", cost {_cost(plan, price)}" if price is not None else ""
        walltime = shown_duration(-(-plan.seconds * 1.5 // 900) * 900)  # whole quarters of an hour
        yield (
            f"time      about {shown_duration(plan.seconds)}{cost}; {plan.speed[0]:,.0f} tokens/s,"
            f" {plan.speed[1]}; suggested walltime {walltime}"
        )
    if advice is not None:
        yield f"try       {advice.words}"
        yield f"          {advice.why} ({advice.plan.memory.needed:.1f} GiB)"
    elif not plan.fits:
        yield "          no change of this recipe is known to make it fit: take a larger card"
