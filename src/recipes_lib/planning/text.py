"""A plan for the reader: tables and sentences, no JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from recipes_lib.config.batch import WITHOUT_WARMUP
from recipes_lib.planning.activations import activations_of
from recipes_lib.planning.advice import Advice, method_rows
from recipes_lib.planning.cards import Card
from recipes_lib.planning.duration import BANDWIDTH_REACHED, LAUNCH_S, PRODUCTS_REACHED
from recipes_lib.planning.memory import MIB, host_gib
from recipes_lib.planning.plan import Plan
from recipes_lib.planning.step_costs import step_costs

# the quickstart's training took the planned time on idle cores, and 168 s for 50 on two cores that
# others used too
CPU_SLOWER = 4
MOST_ADVICE, MOST_OTHERS = 4, 2


def plan_lines(plan: Plan, advice: Sequence[Advice]) -> Iterator[str]:
    """Yield the lines of a plan."""
    settings, card = plan.settings, plan.card
    speed = f"speed: {plan.basis}"
    if settings.device == "cpu":
        several = settings.world_size > 1
        title = f"{card.title}{f', {settings.world_size} processes' if several else ''}"
    else:
        machines = f" on {plan.launch.machines} machines" if plan.launch.machines > 1 else ""
        title = f"{settings.world_size} x {card.title}{machines}"
        if plan.basis == "counted":
            speed = "speed counted, nobody has measured it here"
    yield f"{plan.recipe.name} on {title} ({speed})"
    if card.stands_in:
        yield stand_in(card)
    for part in (_steps, _memory, _time, _methods):
        yield ""
        yield from part(plan)
    yield ""
    yield from _advice(plan, advice)


def stand_in(card: Card) -> str:
    """Return what a reader must know of a plan for a card that nobody named."""
    return (
        f"no GPU on this machine, so {card.title} is assumed; your card: --gpu CARD; this machine,"
        " which trains on its CPU: --gpu cpu"
    )


def refusal_lines(plan: Plan) -> list[str]:
    """Return the arithmetic of a plan that does not fit, in one line and a few hints."""
    words = " + ".join(f"{name} {gib:.1f}" for name, _, gib in _parts(plan) if gib >= 0.05)
    if plan.sharing > 1:
        words = f"({words}) x {plan.sharing} processes"
    free = "free now" if plan.settings.device == "cpu" else "there"
    return [
        (
            f"the plan says it cannot fit {plan.card.title}: {words} = {plan.needed:.1f} GiB,"
            f" {free}: {plan.card.memory_gib:.1f} GiB"
        ),
        (
            f"the largest micro-batch has {plan.batches.largest:,} tokens; {plan.largest():,}"
            " would fit"
        ),
    ]


def _parts(plan: Plan) -> list[tuple[str, str, float]]:
    """Return what the needed memory is made of: in short, in full, and in GiB."""
    memory, settings = plan.memory, plan.settings
    kinds = {4: "NF4 linear layers", 8: "8-bit linear layers", None: settings.dtype}
    kind = kinds[settings.bits]
    precision = f"{kind}, shard" if settings.sharded else kind
    trained = {2: "bf16", 4: "float32"}[settings.trained_bytes]
    rank = f"r={settings.adapter.rank}, " if settings.adapter else ""
    kept = activations_of(settings)
    per_token, how = kept.per_token / MIB, ""
    if settings.checkpointing:
        per_token, how = kept.checkpointed / MIB, ", checkpointed"
    how += " but for attention" if settings.selective else ""
    if memory.validation > memory.activations + memory.moment:
        what = f"validation batch of {plan.eval_tokens:,} tokens, more than training needs"
        at_work = [("validation", what, memory.validation)]
    else:
        what = f"activations: {plan.batches.largest:,} tokens x {per_token:.2f} MiB{how}"
        at_work = [
            ("activations", what, memory.activations),
            ("logits or one block", "logits of a tile, or one block at work", memory.moment),
        ]
    adapter = f"adapter ({rank}{settings.trained_parameters:,} parameters in {trained})"
    on_cpu = settings.device == "cpu"
    outside = "Python and libraries" if on_cpu else "CUDA context, communication, gaps"
    return [
        ("weights", f"base weights ({precision})", memory.weights),
        ("adapter", adapter, memory.adapter),
        ("gradients", "gradients", memory.gradients),
        ("optimizer", f"optimizer ({settings.optimizer})", memory.optimizer),
        ("gathered layers", "layers gathered from the shards", memory.gathered),
        *at_work,
        ("outside the allocator", outside, memory.outside),
    ]


def _steps(plan: Plan) -> Iterator[str]:
    shape = plan.settings.shape
    active = f", {shape.active_parameters:,} of them for each token" if shape.experts else ""
    frozen = f", {shape.frozen:,} of them for images, not trained" if shape.frozen else ""
    yield f"model   {shape.parameters:,} parameters{active}{frozen} (numbers: {shape.source})"
    batches, settings, train = plan.batches, plan.settings, plan.recipe.train
    ranks = f"{settings.world_size} process{'es' * (settings.world_size > 1)}"
    what = "packed rows" if settings.packing else "examples"
    yield (
        f"steps   {settings.per_device} per device x {batches.accumulation} accumulation x {ranks}"
        f" = {batches.examples_per_step} {what} per step; {batches.rows:,} {what} ->"
        f" {batches.steps_per_epoch:,} steps per epoch, {batches.steps:,} steps"
    )
    if plan.longest > shape.positions:
        yield (
            f"note    rows of {plan.longest:,} tokens are longer than the {shape.positions:,} that"
            f" {shape.name} was made for"
        )
    warmup = float(train.get("warmup_steps") or 0)
    if warmup >= max(batches.steps, 1) and train.get("lr_scheduler_type") not in WITHOUT_WARMUP:
        yield (
            f"note    train.warmup_steps {warmup:g} is not less than the {batches.steps:,} steps:"
            " train.learning_rate is never reached"
        )
    form = (
        "padding-free" if settings.padding_free else f"padding makes {batches.padding:.2f} of each"
    )
    if settings.max_tokens is None and (cap := plan.tokens_per_pass) is not None:
        form += f" in passes of up to {cap:,} tokens"
    yield (
        f"tokens  {batches.tokens * batches.steps:,.0f} in all,"
        f" {batches.tokens / batches.examples_per_step:,.0f} per {what[:-1]};"
        f" {'packed' if settings.packing else form} ({plan.lengths.source})"
    )


def _memory(plan: Plan) -> Iterator[str]:
    memory, on_cpu = plan.memory, plan.settings.device == "cpu"
    *allocated, (_, outside, beside) = _parts(plan)
    lines = [(label, gib) for _, label, gib in allocated]
    lines += [("allocated at the worst moment", memory.peak), (outside, beside)]
    yield f"{'memory of one process' if on_cpu else 'memory of one GPU':<62} GiB"
    for label, gib in [*(line for line in lines if line[1]), ("needed", memory.needed)]:
        yield f"  {label:<58} {gib:>7.2f}"
    verdict = {True: "fits", False: "DOES NOT FIT", None: "NOT CERTAIN"}[plan.certain]
    free = "free now" if on_cpu else "on the card"
    sharing = f" for {plan.sharing} processes" if plan.sharing > 1 else ""
    yield f"  {verdict}: {plan.card.memory_gib:.1f} GiB {free}{sharing}"
    if plan.least < memory.needed:
        yield (
            f"  {plan.least:.1f} GiB are enough; passes are filled up to"
            f" {plan.tokens_per_pass:,} tokens because there is room"
        )
    with_, without = plan.largest(checkpointing=True), plan.largest(checkpointing=False)
    counted = ", by what is counted" if plan.uncounted else ""
    yield (
        f"  largest micro-batch: {without:,} tokens, {with_:,} with activation"
        f" checkpointing{counted}"
    )
    if not on_cpu and plan.settings.per_machine > 1:
        each, once = plan.settings.per_machine, plan.settings.reads_once
        who = (
            f"one of {each} processes reads the" if once else f"each of {each} processes reads all"
        )
        yield (
            f"  memory of each machine while loading: {host_gib(plan.settings):,.0f} GiB ({who}"
            " weights)"
        )
    if plan.uncounted:
        yield f"  not counted: {'; '.join(plan.uncounted)}"


def _time(plan: Plan) -> Iterator[str]:
    duration, settings = plan.duration, plan.settings
    device, full = settings.device, 6 if settings.adapter is None else 4
    reached = "" if device == "cpu" else f", {duration.mfu:.0%} of the peak counted with {full}N"
    yield (
        f"time    {spread(duration.training, device)} training"
        f" ({duration.tokens_per_second:,.0f} tokens/s per process,"
        f" {full + 2 * settings.checkpointing}N operations per token{reached})"
    )
    yield (
        f"        {clock(duration.validation)} validation, {clock(duration.around)} start and end:"
        f" {spread(duration.total, device)} in all"
    )
    if device == "gpu":
        costs, bandwidth = step_costs(settings), plan.card.bandwidth * BANDWIDTH_REACHED
        tflops = plan.card.tflops * PRODUCTS_REACHED
        yield (
            f"        counted: {costs.kernels:,.0f} kernels a pass, launched in"
            f" {LAUNCH_S * 1e6:.0f} us each; {costs.per_token / 1e6:.0f} MB per token at"
            f" {bandwidth:,.0f} GB/s, products at {tflops:,.0f} TFLOP/s"
        )
        yield "        assumed: start and end, disks and links"
    if device == "cpu":
        yield (
            "        the longer time is that of an older processor, or one that has other work:"
            f" {CPU_SLOWER} times the first"
        )
    yield (
        f"        ask a scheduler for {clock(plan.walltime)} (half as long again, in quarters of an"
        " hour)"
    )
    for item in plan.evals:
        judging = f" + {spread(item.judging, device)} judging" if item.judging else ""
        unknown = f"; not estimated: {', '.join(item.unknown)}" if item.unknown else ""
        yield f"        {item.name}: {spread(item.answering, device)} answering{judging}{unknown}"
    unit = "hours of this machine" if device == "cpu" else "GPU hours"
    also = " with one evaluation of each" if plan.evals else " without evaluations"
    also += "" if device == "cpu" else " (none was measured on a GPU)"
    yield f"        {plan.card_hours:.2f} {unit}{also}{cost(plan.card_hours, plan.price)}"


def cost(hours: float, price: float | None) -> str:
    """Return what the hours cost, to be put behind them; nothing without a price."""
    return "" if price is None else f", {price * hours:,.2f} at {price:g} an hour"


def _methods(plan: Plan) -> Iterator[str]:
    unit = "processes" if plan.settings.device == "cpu" else "GPUs"
    yield (
        f"{'method':<10} {unit:>9}  {'shared':<7} {'needs GiB':>9}  {'fits':<4}"
        f" {'largest micro-batch':>19}  {'training':>9}"
    )
    for row in method_rows(plan):
        start = f"{row.method:<10} {row.processes:>9}  {row.strategy:<7}"
        if (other := row.plan) is None:
            yield f"{start} {plan.batches.examples_per_step} examples per step cannot be divided"
            continue
        size = f"{other.largest():,} tokens"
        yield (
            f"{start} {other.least:>9.1f}  {other.verdict:<4} {size:>19} "
            f" {clock(other.duration.total):>9}{'  <- this recipe' * row.is_the_recipe}"
        )


def _advice(plan: Plan, advice: Sequence[Advice]) -> Iterator[str]:
    if plan.uncounted:
        none = "no advice on memory: not everything is counted"
        head = "what needs less, best first (not everything is counted)"
    else:
        none = "nothing that the planner knows makes it fit: take a smaller model or more GPUs"
        head = "what makes it fit, best first"
    if plan.fits:
        head = "to try, best first"
        none = none if plan.uncounted else "no setting is known to be better"
    yield head if advice else none
    same = [item for item in advice if item.same_result][:MOST_ADVICE]
    for item in [*same, *[item for item in advice if not item.same_result][:MOST_OTHERS]]:
        memory = f", peak {item.memory_gib:+.1f} GiB" if abs(item.memory_gib) >= 0.05 else ""
        other = "" if item.same_result else "; another experiment"
        yield f"  {item.setting}"
        yield f"      {gain(item)}{memory}: {item.why}{other}"


def gain(advice: Advice) -> str:
    """Return what a proposal saves or costs in time."""
    return f"{'costs' if advice.saves_s < 0 else 'saves'} {clock(abs(advice.saves_s))}"


def spread(seconds: float, device: str) -> str:
    """Return a duration, on a processor as a range: an older or a busy one is slower.

    Example:
        >>> spread(42, "cpu"), spread(42, "cuda")
        ('42 s to 3 min', '42 s')
    """
    until = f" to {clock(CPU_SLOWER * seconds)}" if device == "cpu" else ""
    return f"{clock(seconds)}{until}"


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
