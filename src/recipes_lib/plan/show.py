"""A plan as rows: what text prints and `--json` dumps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from recipes_lib.config.batch import describe_schedule
from recipes_lib.plan.advice import Advice, table
from recipes_lib.plan.plan import Plan

MIB = 2**20


def rows(plan: Plan, advice: Advice | None, price: float | None = None) -> dict[str, object]:
    """Return the plan's numbers by their names."""
    memory, steps, traced, setup = plan.memory, plan.steps, plan.trace, plan.setup
    found: dict[str, object] = {
        "model": plan.recipe.model.name_or_path,
        "parameters": traced.parameters,
        "trained_parameters": traced.trained,
        "method": setup.method,
        "card": plan.card.name,
        "card_gib": plan.card.memory_gib,
        "processes": setup.world_size,
        "steps": steps.steps,
        "examples_per_step": steps.examples_per_step,
        "tokens": steps.tokens,
        "validation_tokens": steps.validation,
        "largest_micro_batch_tokens": steps.largest,
        "largest_micro_batch_that_fits": plan.largest_tokens,
        "rows": plan.rows.source,
        "memory_gib": {key: round(value, 2) for key, value in asdict(memory).items()},
        "peak_gib": round(memory.peak, 2),
        "needed_gib": round(memory.needed, 2),
        "fits": plan.fits,
        "kept_mib_per_token": round(traced.per_token / MIB, 3),
        "tokens_per_second": plan.speed and round(plan.speed[0]),
        "speed": plan.speed[1] if plan.speed else "not known for this card",
        "seconds": plan.seconds and round(plan.seconds),
        "advice": advice and advice.words,
    }
    if price is not None and plan.seconds is not None:
        found["cost"] = round(price * plan.seconds / 3600 * setup.world_size, 2)
    return found


def lines(plan: Plan, advice: Advice | None, price: float | None = None) -> Iterator[str]:
    """Yield the plan for a reader, at most 15 lines."""
    memory, steps, traced, setup = plan.memory, plan.steps, plan.trace, plan.setup
    assumed = "  (assumed: this machine has no GPU)" if plan.card.assumed else ""
    where = f"{setup.world_size} x {plan.card.name}" if setup.world_size > 1 else plan.card.name
    kind = "FSDP2" if setup.sharded else "DDP" if setup.world_size > 1 else "one process"
    yield f"{plan.recipe.name}: {setup.method} on {where}, {kind}{assumed}"
    yield (
        f"model       {plan.recipe.model.name_or_path}, {traced.parameters:,} parameters,"
        f" {traced.trained:,} trained"
    )
    yield (
        f"steps       {steps.steps:,} of {steps.examples_per_step} examples ({setup.per_device} per"
        f" device x {setup.accumulation} x {setup.world_size}), {steps.per_epoch:,} per epoch"
    )
    yield f"tokens      {steps.tokens:,} ({plan.rows.source})"
    train = plan.recipe.train
    schedule = describe_schedule(
        str(train.get("lr_scheduler_type", "linear")),
        float(train.get("learning_rate", 2e-5)),
        float(train.get("warmup_steps", train.get("warmup_ratio", 0)) or 0),
        steps.steps,
    )
    yield f"schedule    {schedule}"
    parts = asdict(memory)
    listed = ", ".join(f"{name} {size:.1f}" for name, size in parts.items() if size >= 0.05)
    yield f"memory      {memory.needed:.1f} GiB: {listed}"
    kept = traced.checkpointed if setup.checkpointing else traced.per_token
    yield f"            {steps.largest:,} tokens in a micro-batch, each keeps {kept / MIB:.2f} MiB"
    if traced.carries_state:
        yield "            an upper estimate: layers with a state as torch computes them"
    largest = plan.largest_tokens
    room = f"a micro-batch of {largest:,} tokens would fit" if largest else "no micro-batch fits"
    verdict = "fits        " if plan.fits else "DOES NOT FIT: "
    yield f"{verdict}{plan.card.memory_gib:.1f} GiB on the card; {room}"
    if plan.seconds is None or plan.speed is None:
        yield "time        not estimated: the peak of this card is not known"
    else:
        speed, source = plan.speed
        cost = f", cost {rows(plan, advice, price)['cost']}" if price is not None else ""
        yield (
            f"time        about {clock(plan.seconds)}{cost}; {speed:,.0f} tokens/s, {source};"
            f" suggested walltime {clock(walltime(plan.seconds))}"
        )
    if advice is not None:
        gain = f"{advice.plan.memory.needed:.1f} GiB"
        if advice.plan.seconds is not None:
            gain += f", about {clock(advice.plan.seconds)}"
        other = "" if advice.same_result else "; another experiment"
        yield f"try         {advice.words}"
        yield f"            {advice.why} ({gain}{other})"
    elif not plan.fits:
        yield "            no change of this recipe is known to make it fit: take a larger card"


def table_lines(plan: Plan) -> Iterator[str]:
    """Yield the same training by other methods and on more cards."""
    yield f"{'method':<16} {'cards':>5}  {'':<6} {'GiB':>7}  fits  {'time':>10}"
    for method, count, strategy, other in table(plan):
        fits = "yes" if other.fits else "no"
        time = clock(other.seconds) if other.seconds is not None else "-"
        yield (
            f"{method:<16} {count:>5}  {strategy:<6} {other.memory.needed:>7.1f}  {fits:<4} "
            f" {time:>10}"
        )


def walltime(seconds: float) -> float:
    """Return 1.5 times the estimate in whole quarters of an hour.

    Example:
        >>> walltime(100), walltime(3600)
        (900.0, 5400.0)
    """
    return -(-seconds * 1.5 // 900) * 900


def clock(seconds: float) -> str:
    """Return a duration in the unit a reader wants.

    Example:
        >>> clock(40), clock(900), clock(7320)
        ('40 s', '15 min', '2 h 2 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
