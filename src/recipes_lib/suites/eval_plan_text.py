"""The plan of an evaluation for the reader, and as plain JSON values (schema/plan.schema.json)."""

from __future__ import annotations

from collections.abc import Iterator

from recipes_lib.planning.duration import BANDWIDTH_REACHED, LAUNCH_S, PRODUCTS_REACHED
from recipes_lib.planning.text import CPU_SLOWER, clock, stand_in
from recipes_lib.suites.answer_costs import Ends, EvalMemory
from recipes_lib.suites.eval_plan import EvalPlan, Work

_MEASURED = (
    "measured with SmolLM2-135M on two threads, answers 95 and prompts 774 tokens/s; elsewhere"
    " taken as proportional"
)


def basis(plan: EvalPlan) -> str:
    """Return where the speeds are from."""
    return _MEASURED if plan.card.name == "cpu" else "counted, nobody has measured it here"


def eval_plan_lines(plan: EvalPlan) -> Iterator[str]:
    """Yield the lines of a plan."""
    against = f" against {plan.against}" if plan.against else ""
    yield f"{plan.recipe.name} of {plan.target}{against} on {plan.card.title} (speed {basis(plan)})"
    if plan.card.stands_in:
        yield stand_in(plan.card)
    yield ""
    what = "rows" if plan.recipe.suite.name == "heldout_loss" else "questions"
    if plan.questions is not None:
        yield f"{what:<10} {plan.questions:,} ({plan.lengths})"
    else:
        yield f"{what:<10} not known without the tasks' data"
    for note in plan.notes:
        yield f"           {note}"
    for part in plan.parts:
        yield ""
        yield from _part(part, plan)
    yield ""
    yield from _total(plan)


def _part(part: Work, plan: EvalPlan) -> Iterator[str]:
    """Yield what one model is asked."""
    requests = "not known" if part.requests is None else f"{part.requests:,}"
    details = f": {part.details}" if part.details else ""
    yield f"{part.what} by {part.model}: {requests}{details}"
    if part.read.high:
        yield f"  tokens   {_tokens(part.read)} read, {_tokens(part.written)} written"
    if part.at_once is not None:
        yield (
            f"  time     behind a server: depends on the server; {requests} requests, at most"
            f" {part.at_once:,} at once"
        )
        return
    if part.batches is not None:
        step = f"; a batch is up to {part.batch_tokens:,} padded tokens"
        yield f"  batches  {_between(part.batches)}, of up to {part.rows} rows{step}"
    if part.memory:
        yield from _memory(part.memory, plan.card.name == "cpu")
    if part.seconds is None or part.reading is None:
        yield "  time     none: it does not fit"
        return
    writing = f", {_clocks(part.writing)} writing" if part.writing and part.writing.high else ""
    yield (
        f"  time     {_clocks(part.seconds)}: {clock(part.loading)} until it is loaded,"
        f" {_clocks(part.reading)} reading{writing}"
    )
    if part.step is not None and part.kernels is not None:
        low, high = (f"{1000 * end:.1f}" for end in (part.step.low, part.step.high))
        span = low if low == high else f"{low} to {high}"
        yield (
            f"           a step of {span} ms waits for {part.bound}: {part.kernels:,} kernels,"
            f" launched in {LAUNCH_S * 1e6:.0f} us each"
        )
    for words in part.unknown:
        yield f"  not in the time: {words}"


def _memory(memory: EvalMemory, on_cpu: bool) -> Iterator[str]:
    """Yield the memory of the largest batch in a line and a verdict."""
    outside = "Python and libraries" if on_cpu else "CUDA context"
    words = " + ".join(
        f"{name} {gib:.1f}"
        for name, gib in (
            ("weights", memory.weights),
            ("keys and values", memory.kept),
            ("activations", memory.activations),
            ("logits", memory.logits),
            (outside, memory.outside),
        )
        if gib >= 0.05
    )
    free = "free now" if on_cpu else "on the card"
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    yield f"  memory   {words} = {memory.needed:.1f} GiB; {verdict}: {memory.card:.1f} GiB {free}"


def _total(plan: EvalPlan) -> Iterator[str]:
    on_cpu = plan.card.name == "cpu"
    without = f", without {'; '.join(plan.unknown)}" if plan.unknown else ""
    yield f"in all     {_clocks(plan.seconds)}{without}"
    if on_cpu:
        yield (
            "           on an older processor, or one that has other work, up to"
            f" {CPU_SLOWER} times as long"
        )
        return
    bandwidth, tflops = plan.card.bandwidth * BANDWIDTH_REACHED, plan.card.tflops * PRODUCTS_REACHED
    yield (
        f"           counted: kernels of a step and bytes of weights, keys and values at"
        f" {bandwidth:,.0f} GB/s; products at {tflops:,.0f} TFLOP/s"
    )
    yield "           assumed: imports, weights from disk at 0.7 GiB/s, and these rates"


def _tokens(span: Ends) -> str:
    return _between(span) if span.high >= 1 else "none"


def _between(span: Ends) -> str:
    low, high = f"{span.low:,.0f}", f"{span.high:,.0f}"
    return low if low == high else f"{low} to {high}"


def _clocks(span: Ends) -> str:
    low, high = clock(span.low), clock(span.high)
    return low if low == high else f"{low} to {high}"


# ---- JSON ----


def eval_plan_json(plan: EvalPlan) -> dict[str, object]:
    """Return the plan as JSON; sizes in GiB, times in seconds, spans as [least, most]."""
    return {
        "eval": plan.recipe.name,
        "suite": plan.recipe.suite.name,
        "target": plan.target,
        "against": plan.against,
        "card": plan.card.name,
        "card_stands_in": plan.card.stands_in,
        "basis": basis(plan),
        "questions": plan.questions,
        "max_new_tokens": plan.new_tokens,
        "lengths": plan.lengths,
        "notes": list(plan.notes),
        "fits": plan.fits,
        "parts": [_part_json(part) for part in plan.parts],
        "total_s": _ends(plan.seconds),
        "not_estimated": list(plan.unknown),
    }


def _part_json(part: Work) -> dict[str, object]:
    memory = part.memory
    return {
        "what": part.what,
        "model": part.model,
        "requests": part.requests,
        "details": part.details,
        "read_tokens": _ends(part.read),
        "written_tokens": _ends(part.written),
        "at_once": part.at_once,
        "batch_tokens": part.batch_tokens,
        "batches": _ends(part.batches),
        "rows": part.rows,
        "kernels_per_step": part.kernels,
        "step_s": _ends(part.step),
        "memory": memory
        and {
            "weights_gib": round(memory.weights, 4),
            "kept_gib": round(memory.kept, 4),
            "activations_gib": round(memory.activations, 4),
            "logits_gib": round(memory.logits, 4),
            "outside_gib": round(memory.outside, 4),
            "needed_gib": round(memory.needed, 4),
            "card_gib": memory.card,
            "fits": memory.fits,
        },
        "loading_s": round(part.loading, 4),
        "reading_s": _ends(part.reading),
        "writing_s": _ends(part.writing),
        "total_s": _ends(part.seconds),
        "not_estimated": list(part.unknown),
    }


def _ends(span: Ends | None) -> list[float] | None:
    """Return a span as [least, most], to a tenth of a millisecond."""
    return None if span is None else [round(span.low, 4), round(span.high, 4)]
