"""What to change in a recipe so that it fits or is faster, and a plan as it is printed."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from recipes_lib.config.documents import value_text
from recipes_lib.config.launch import plan_launch
from recipes_lib.config.new import FOUR_BITS
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.terminal import aligned, shown_duration
from recipes_lib.models import families
from recipes_lib.plan.plan import Plan, plan_of
from recipes_lib.plan.steps import ASSUMED_TOKENS


class Advice(NamedTuple):
    """A change that can be trained."""

    words: str  # to type
    why: str
    plan: Plan  # with the change


def advise(plan: Plan, overrides: Sequence[str] = ()) -> Advice | None:
    """Return the first change that fits; for what fits, only to keep activations."""
    # it fits, and computes nothing twice
    if plan.fits and not plan.checkpointing:
        return None
    for change in changed_plans(plan, overrides):
        if plan.fits and change.plan.checkpointing:
            continue
        if change.plan.fits and change.plan.memory != plan.memory:
            return change
    return None


def table(plan: Plan, overrides: Sequence[str] = ()) -> list[str]:
    """Return what every change does, a line for each."""
    heading = "time of 1,000 rows" if plan.rows.assumed else "time"
    lines = [("GiB", "fits", heading, "change")]
    for words, why, changed in changed_plans(plan, overrides):
        time = "-"
        if changed.rows.assumed and changed.seconds_per_1000_rows:
            time = shown_duration(changed.seconds_per_1000_rows)
        elif changed.seconds is not None:
            time = shown_duration(changed.seconds)
        fits = "yes" if changed.fits else "no"
        lines.append((f"{changed.needed:.1f}", fits, time, f"{words}  ({why})"))
    return aligned(lines)


def changed_plans(plan: Plan, overrides: Sequence[str] = ()) -> Iterator[Advice]:
    """Yield every change that can be trained, smallest first."""
    for words, why in _changes(plan):
        try:
            recipe = load_recipe(plan.recipe.path, list(overrides) + words)
            launch = plan.launch
            if any(word.startswith("launch.") for word in words):
                launch = plan_launch(recipe.launch)
            changed = plan_of(recipe, launch, plan.card, plan.rows)
        except RecipesError:
            continue
        yield Advice(shlex.join(words), why, changed)


def _changes(plan: Plan) -> Iterator[tuple[list[str], str]]:
    """Yield overrides that change no step's examples, smallest change first, and why."""
    recipe = plan.recipe
    launch = plan.launch
    steps = plan.steps

    def batch(size: int, processes: int = launch.world_size) -> list[str]:
        overrides = [f"train.per_device_train_batch_size={size}"]
        if recipe.run.global_batch_size is None:
            accumulation = steps.examples // (size * processes)
            overrides.append(f"train.gradient_accumulation_steps={accumulation}")
        return overrides

    divides = [size for size in (4, 2, 1) if steps.per_device % size == 0]
    smaller = [size for size in divides if size < steps.per_device]
    if plan.fits and plan.checkpointing:
        off = "train.activation_checkpointing=false"
        yield [off], "activations fit without computing every block twice"
        why = "activations of fewer examples fit without computing every block twice"
        for size in smaller:
            yield [off] + batch(size), why
    for size in smaller:
        yield batch(size), "smaller micro-batches of the same step"
    on: list[str] = []
    if not plan.checkpointing:
        on = ["train.activation_checkpointing=true"]
        yield on + batch(1), "stores only the blocks' inputs and computes each block twice"

    if launch.distributed_type == "MULTI_GPU" and plan.card.name != "cpu":
        sharded = ["launch.accelerate=fsdp", f"launch.gpus={launch.per_machine}"]
        if launch.machines > 1:
            sharded[0] = "launch.accelerate=fsdp_multi_node"
            sharded.append(f"launch.nodes={launch.machines}")
        why = f"weights and optimizer sharded over the same {launch.world_size} GPUs"
        for size in [steps.per_device] + smaller:
            yield sharded + batch(size), why
    if plan.fits:  # already, without computing anything twice
        on = []
    for count in (2, 4, 8):
        is_larger = count > launch.world_size and plan.card.name != "cpu"
        if is_larger and steps.examples % count == 0:
            size = 1
            if plan.fits:
                size = math.gcd(steps.per_device, steps.examples // count)
            sharded = ["launch.accelerate=fsdp", f"launch.gpus={count}"]
            why = f"weights and optimizer sharded over {count} GPUs"
            yield sharded + batch(size, count) + on, why
    if recipe.lora is not None and recipe.quantization is None:
        words = [f"quantization.{key}={value_text(value)}" for key, value in FOUR_BITS.items()]
        words += on
        if not plan.fits:
            words += batch(1)
        yield words, "QLoRA, the base in 4 bits; a different experiment"


def rows_shown(
    plan: Plan, advice: Advice | None
) -> tuple[list[tuple[str, str]], dict[str, object]]:
    """Return at most 15 lines, a label and a text each; and what `--json` prints of them."""
    steps = plan.steps
    traced = plan.trace
    card = plan.card
    lines: list[tuple[str, str]] = []
    facts: dict[str, object] = {}

    def add(label: str, text: str, **values: Any) -> None:
        """Add facts, and a line unless there is nothing to say."""
        facts.update(values)
        if text:
            lines.append((label, text))

    kind = {"NO": "one process", "FSDP": "FSDP2"}.get(plan.launch.distributed_type, "DDP")
    training = f"{plan.recipe.name}: {plan.method} on {steps.world_size} x {card.name}, {kind}"
    add("training", training, method=plan.method, card=card.name, card_gib=card.memory_gib)
    name = plan.recipe.model.name_or_path
    model = f"{name}, {traced.parameters:,} parameters, {traced.trained:,} trained"
    add("model", model, model=name, **asdict(traced))
    if traced.fused_experts and plan.recipe.quantization:
        add("", f"{traced.fused_experts:,} of them are not quantized: {families.FUSED_EXPERTS}")

    batch = f"{steps.per_device} per device x {steps.accumulation} x {steps.world_size}"
    number = f"{steps.steps:,} of {steps.examples} examples ({batch})"
    of_steps = asdict(steps)
    if not plan.steps_known:
        of_steps["steps"] = None
        per_1000 = 1000 / steps.examples
        number = f"{per_1000:,.1f} per 1,000 rows, of {steps.examples} examples ({batch})"
    add("steps", number, **of_steps)
    tokens = plan.rows.source
    if not plan.rows.assumed:
        tokens = f"{steps.tokens:,} ({tokens})"
    add("tokens", tokens, rows=plan.rows.source)

    parts = [f"{part} {size:.1f}" for part, size in plan.memory.items() if size >= 0.05]
    memory = f"{plan.needed:.1f} GiB: {', '.join(parts)}"
    peak = plan.needed - plan.memory["context"]
    add("memory", memory, memory_gib=plan.memory, peak_gib=peak, needed_gib=plan.needed)
    loading = ""
    if plan.load_peak > sum(plan.memory.values()):
        loading = f"loading: {plan.load_peak:.1f} GiB, the whole base in 4 bits on every card first"
    add("", loading, load_peak_gib=plan.load_peak)
    if traced.carries_state:
        add("", "an upper estimate: layers with a state")
    room = f"the card has {card.memory_gib:.1f} GiB"
    if card.name == "cpu":
        room = f"{card.memory_gib:.1f} GiB of this machine's memory are free for each process"
    add("fits" if plan.fits else "DOES NOT FIT", room, fits=plan.fits)

    time = "not estimated: no run here measured it, and this device's peak is unknown"
    seconds = plan.seconds
    if seconds is not None:
        about = f"about {shown_duration(seconds)}"
        if plan.rows.assumed:
            of_1000 = shown_duration(plan.seconds_per_1000_rows or 0.0)
            about = f"about {of_1000} per 1,000 rows of {ASSUMED_TOKENS} tokens (assumed)"
        time = f"{about}; {plan.speed:,.0f} tokens/s, {plan.speed_source}"
    if plan.rows.assumed:  # also their number may be
        seconds = None
    add(
        "time",
        time,
        tokens_per_second=plan.speed,
        speed=plan.speed_source,
        seconds=seconds,
        seconds_per_1000_rows=plan.seconds_per_1000_rows,
    )
    change = ""
    if advice is not None:
        change = f"{advice.words}  ({advice.why}; {advice.plan.needed:.1f} GiB)"
    elif not plan.fits:
        change = "no known change of this recipe makes it fit: use more memory"
    add("try", change, advice=advice and advice.words)
    return lines, facts
