"""A plan for the reader: tables and sentences, no JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from recipes_lib.config.schedule import WITHOUT_WARMUP
from recipes_lib.planning.activations import activations_of
from recipes_lib.planning.advice import Advice, largest_cost
from recipes_lib.planning.cards import Card
from recipes_lib.planning.evaluations import EvalTime
from recipes_lib.planning.memory import MIB
from recipes_lib.planning.methods import MethodRow
from recipes_lib.planning.plan import Plan
from recipes_lib.planning.settings import Settings

# the quickstart's training took the planned time on idle cores, and 168 s for 50 on two cores that
# others used too
CPU_SLOWER = 4
MOST_ADVICE, MOST_OTHERS = 4, 2


def plan_lines(
    plan: Plan,
    evals: Sequence[EvalTime],
    rows: Sequence[MethodRow],
    advice: Sequence[Advice],
    price: float | None,
) -> Iterator[str]:
    """Yield the lines of a plan."""
    yield f"{plan.recipe.name} on {card_words(plan)}"
    if plan.card.stands_in:
        yield stand_in(plan.card)
    yield ""
    yield from _steps(plan)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _time(plan, evals, price)
    yield ""
    yield from _methods(rows, plan)
    yield ""
    yield from _advice(plan, advice)


def card_words(plan: Plan) -> str:
    """Return the cards in words, and what is known of their speed."""
    if plan.settings.device == "cpu":
        processes = (
            f", {plan.settings.world_size} processes" if plan.settings.world_size > 1 else ""
        )
        return f"{plan.card.title}{processes} (speed: {plan.card.basis})"
    machines = f" on {plan.launch.machines} machines" if plan.launch.machines > 1 else ""
    speed = (
        "speed assumed, nobody has measured it here"
        if plan.card.basis == "assumed"
        else f"speed: {plan.card.basis}"
    )
    return f"{plan.settings.world_size} x {plan.card.title}{machines} ({speed})"


def stand_in(card: Card) -> str:
    """Return what a reader must know of a plan for a card that nobody named."""
    return (
        f"no GPU on this machine, so {card.title} is assumed; your card: --gpu CARD; this machine,"
        " which trains on its CPU: --gpu cpu"
    )


def refusal_lines(plan: Plan) -> list[str]:
    """Return the arithmetic of a plan that does not fit, in one line and a few hints."""
    memory = plan.memory
    parts = [
        ("weights", memory.weights),
        ("adapter", memory.adapter),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("gathered layers", memory.gathered),
        ("activations", memory.activations),
        ("logits or one block", memory.moment),
        ("outside the allocator", memory.outside),
    ]
    if memory.validation > memory.activations + memory.moment:
        parts[5:7] = [("validation", memory.validation)]
    words = " + ".join(f"{name} {gib:.1f}" for name, gib in parts if gib >= 0.05)
    times = f" x {plan.sharing} processes" if plan.sharing > 1 else ""
    need = (
        f"({words}){times} = {memory.needed * plan.sharing:.1f} GiB"
        if times
        else f"{words} = {memory.needed:.1f} GiB"
    )
    free = "free now" if plan.settings.device == "cpu" else "there"
    return [
        (
            f"the plan says it cannot fit {plan.card.title}: {need}, {free}:"
            f" {plan.card.memory_gib:.1f} GiB"
        ),
        (
            f"the largest micro-batch has {plan.batches.largest:,} tokens; {plan.largest():,}"
            " would fit"
        ),
    ]


def _steps(plan: Plan) -> Iterator[str]:
    batches, lengths, settings = plan.batches, plan.lengths, plan.settings
    ranks = f"{settings.world_size} process{'es' * (settings.world_size > 1)}"
    what = "packed rows" if settings.packing else "examples"
    yield (
        f"steps   {settings.per_device} per device x {batches.accumulation} accumulation x {ranks}"
        f" = {batches.examples_per_step} {what} per step; {batches.rows:,} {what} ->"
        f" {batches.steps_per_epoch:,} steps per epoch, {batches.steps:,} steps"
    )
    mean = batches.tokens / batches.examples_per_step
    form = (
        "packed"
        if settings.packing
        else (
            "padding-free"
            if settings.padding_free
            else f"padding makes {batches.padding:.2f} of each"
        )
    )
    longest = min(settings.max_length or max(lengths.tokens), max(lengths.tokens))
    if longest > settings.shape.positions:
        yield (
            f"note    rows of {longest:,} tokens are longer than the {settings.shape.positions:,}"
            f" that {settings.shape.name} was made for"
        )
    warmup = float(plan.recipe.train.get("warmup_steps") or 0)
    if (
        warmup >= max(batches.steps, 1)
        and plan.recipe.train.get("lr_scheduler_type") not in WITHOUT_WARMUP
    ):
        yield (
            f"note    train.warmup_steps {warmup:g} is not less than the {batches.steps:,} steps:"
            " train.learning_rate is never reached"
        )
    yield (
        f"tokens  {batches.tokens * batches.steps:,.0f} in all, {mean:,.0f} per {what[:-1]}; {form}"
        f" ({lengths.source})"
    )


def _memory(plan: Plan) -> Iterator[str]:
    memory, settings = plan.memory, plan.settings
    one = "one process" if settings.device == "cpu" else "one GPU"
    precision = {4: "NF4 linear layers", 8: "8-bit linear layers", None: settings.dtype}[
        settings.bits
    ]
    kept = activations_of(settings)
    per_token = (kept.checkpointed if settings.checkpointing else kept.per_token) / MIB
    how = ", checkpointed" if settings.checkpointing else ""
    lines = [
        (f"base weights ({precision}{', shard' * settings.sharded})", memory.weights),
        (f"adapter ({_count(settings)})", memory.adapter),
        ("gradients", memory.gradients),
        (f"optimizer ({settings.optimizer})", memory.optimizer),
        ("layers gathered from the shards", memory.gathered),
        (
            f"activations: {plan.batches.largest:,} tokens x {per_token:.2f} MiB{how}",
            memory.activations,
        ),
        ("logits of a tile, or one block at work", memory.moment),
    ]
    if memory.validation > memory.activations + memory.moment:
        lines[5:7] = [
            (
                f"validation batch of {plan.eval_tokens:,} tokens, more than training needs",
                memory.validation,
            )
        ]
    lines += [("allocated at the worst moment", memory.peak)]
    outside = (
        "Python and libraries" if settings.device == "cpu" else "CUDA context, communication, gaps"
    )
    lines += [(outside, memory.outside), ("needed", memory.needed)]
    yield f"{f'memory of {one}':<62} GiB"
    for name, gib in lines:
        if gib or name == "needed":
            yield f"  {name:<58} {gib:>7.2f}"
    verdict = {"yes": "fits", "no": "DOES NOT FIT", "?": "NOT CERTAIN"}[plan.verdict]
    free = "free now" if settings.device == "cpu" else "on the card"
    sharing = f" for {plan.sharing} processes" if plan.sharing > 1 else ""
    yield f"  {verdict}: {plan.card.memory_gib:.1f} GiB {free}{sharing}"
    with_, without = plan.largest(checkpointing=True), plan.largest(checkpointing=False)
    counted = ", by what is counted" if plan.uncounted else ""
    yield (
        f"  largest micro-batch: {without:,} tokens, {with_:,} with activation"
        f" checkpointing{counted}"
    )
    if plan.uncounted:
        yield f"  not counted: {'; '.join(plan.uncounted)}"


def _count(settings: Settings) -> str:
    precision = {2: "bf16", 4: "float32"}[settings.trained_bytes]
    rank = f"r={settings.adapter.rank}, " if settings.adapter else ""
    return f"{rank}{settings.trained_parameters:,} parameters in {precision}"


def _time(plan: Plan, evals: Sequence[EvalTime], price: float | None) -> Iterator[str]:
    duration, settings = plan.duration, plan.settings
    full = 6 if settings.adapter is None else 4
    operations = f"{full + 2 * settings.checkpointing}N operations per token"
    reached = (
        "" if settings.device == "cpu" else f", {duration.mfu:.0%} of the peak counted with {full}N"
    )
    training, total = (
        spread(seconds, settings.device) for seconds in (duration.training, duration.total)
    )
    yield (
        f"time    {training} training ({duration.tokens_per_second:,.0f} tokens/s per process,"
        f" {operations}{reached})"
    )
    yield (
        f"        {clock(duration.validation)} validation, {clock(duration.around)} start and end:"
        f" {total} in all"
    )
    if settings.device == "cpu":
        yield (
            "        the longer time is that of an older processor, or one that has other work:"
            f" {CPU_SLOWER} times the first"
        )
    if most := largest_cost(plan):
        yield (
            f"        costs most: {most.setting}: {most.why}, {clock(most.seconds)} of"
            f" {clock(duration.total)}"
        )
    yield (
        f"        ask a scheduler for {clock(plan.walltime)} (half as long again, in quarters of an"
        " hour)"
    )
    for item in evals:
        where = "a server" if item.remote else settings.device
        judging = (
            f" + {spread(item.judging, where)} judging{' (behind a URL)' if item.remote else ''}"
            if item.judging
            else ""
        )
        unknown = f"; not estimated: {', '.join(item.unknown)}" if item.unknown else ""
        yield (
            f"        {item.name}: {spread(item.answering, settings.device)}"
            f" answering{judging}{unknown}"
        )
    hours = plan.gpu_hours + sum(item.total for item in evals) / 3600
    unit = "hours of this machine" if settings.device == "cpu" else "GPU hours"
    cost = f", {price * hours:,.2f} at {price:g} an hour" if price is not None else ""
    also = " with one evaluation of each" if evals else ""
    yield f"        {hours:.2f} {unit}{also}{cost}"


def _methods(rows: Sequence[MethodRow], plan: Plan) -> Iterator[str]:
    unit = "processes" if plan.settings.device == "cpu" else "GPUs"
    yield (
        f"{'method':<10} {unit:>9}  {'shared':<7} {'needs GiB':>9}  {'fits':<4}"
        f" {'largest micro-batch':>19}  {'training':>9}"
    )
    for row in rows:
        start = f"{row.method:<10} {row.processes:>9}  {row.strategy:<7}"
        if row.plan is None:
            yield f"{start} {plan.batches.examples_per_step} examples per step cannot be divided"
            continue
        mark = "  <- this recipe" * row.is_the_recipe
        size = f"{row.plan.largest():,} tokens"
        yield (
            f"{start} {row.plan.memory.needed:>9.1f}  {row.plan.verdict:<4} {size:>19} "
            f" {clock(row.plan.duration.total):>9}{mark}"
        )


def _advice(plan: Plan, advice: Sequence[Advice]) -> Iterator[str]:
    if not advice:
        yield (
            "no setting is known to be better"
            if plan.fits and not plan.uncounted
            else (
                "no advice on memory: not everything is counted"
                if plan.uncounted
                else (
                    "nothing that the planner knows makes it fit: take a smaller model or more GPUs"
                )
            )
        )
        return
    needs_less = (
        "what needs less, best first (not everything is counted)"
        if plan.uncounted
        else "what makes it fit, best first"
    )
    yield "to try, best first" if plan.fits else needs_less
    same = [item for item in advice if item.same_result][:MOST_ADVICE]
    for item in [*same, *[item for item in advice if not item.same_result][:MOST_OTHERS]]:
        gain = (
            f"saves {clock(item.saves_s)}" if item.saves_s >= 0 else f"costs {clock(-item.saves_s)}"
        )
        memory = f", peak {item.memory_gib:+.1f} GiB" if abs(item.memory_gib) >= 0.05 else ""
        other = "" if item.same_result else "; another experiment"
        yield f"  {item.setting}"
        yield f"      {gain}{memory}: {item.why}{other}"


def spread(seconds: float, device: str) -> str:
    """Return a duration, on a processor as a range: an older or a busy one is several times slower.

    Example:
        >>> spread(42, "cpu"), spread(42, "cuda")
        ('42 s to 3 min', '42 s')
    """
    return (
        f"{clock(seconds)} to {clock(CPU_SLOWER * seconds)}" if device == "cpu" else clock(seconds)
    )


def clock(seconds: float) -> str:
    """Return a duration as people say it.

    Example:
        >>> clock(42), clock(3700), clock(0.2), clock(200_000)
        ('42 s', '1 h 02 min', '0 s', '2 d 07 h')
    """
    seconds = round(seconds)
    if seconds < 120:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02} h"
