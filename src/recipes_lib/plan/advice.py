"""What a plan says: one list of rows for the terminal and for `--json`, the first change that fits,
and what every change would do.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from recipes_lib.config.launch import plan_launch
from recipes_lib.config.recipe import load_recipe
from recipes_lib.config.sections import MAX_LENGTH
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.terminal import aligned, shown_duration
from recipes_lib.plan.plan import Plan, plan_of

COUNTS = (2, 4, 8)  # of GPUs
SHORT = 512  # tokens
KEEP_ALL = ["train.activation_checkpointing=false"]
FOUR_BITS = [
    "quantization.load_in_4bit=true",
    "quantization.bnb_4bit_quant_type=nf4",
    "quantization.bnb_4bit_use_double_quant=true",
    "quantization.bnb_4bit_compute_dtype=bfloat16",
    "quantization.bnb_4bit_quant_storage=bfloat16",  # FSDP2 shares out no other
]


@dataclass(frozen=True)
class Advice:
    """A change of a recipe: the words to type, what they do, and the plan with them."""

    words: str
    why: str
    plan: Plan


def changed(plan: Plan, overrides: Sequence[str], words: Sequence[str]) -> Plan | None:
    """Return the plan with further words on the command line; None where they cannot be trained."""
    try:
        recipe = load_recipe(plan.recipe.path, [*overrides, *words])
        launches = any(word.startswith("launch.") for word in words)
        launch = plan_launch(recipe.launch) if launches else plan.launch
        return plan_of(recipe, launch, plan.card, plan.rows)
    except RecipesError:
        return None


def ways(plan: Plan) -> list[tuple[list[str], str]]:
    """Return words that change a recipe but no step's examples, smallest change first, and why."""
    recipe, steps = plan.recipe, plan.steps
    same_step = [] if recipe.run.global_batch_size else [f"run.global_batch_size={steps.examples}"]
    changes: list[tuple[list[str], str]] = []
    if plan.fits and plan.checkpointing:
        changes.append((KEEP_ALL, "activations fit without computing every block twice"))
    for size in (4, 2, 1):
        if size < steps.per_device:
            words = [f"train.per_device_train_batch_size={size}", *same_step]
            changes.append((words, "smaller micro-batches of the same step"))
    least: list[str] = []  # of memory, with the same mathematics on the same card
    if not plan.fits and changes:
        least = changes[-1][0]
    if not plan.checkpointing:
        recompute = ["train.activation_checkpointing=true"]
        changes.append((recompute, "keeps the inputs of the blocks and computes each twice"))
        least = least and [*recompute, *least]
        if least:
            changes.append((least, "both"))
    for count in COUNTS if plan.card.name != "cpu" else ():
        if count > plan.launch.world_size:
            size = math.gcd(steps.per_device, steps.examples // count)
            batch = [f"train.per_device_train_batch_size={size}", *same_step]
            words = ["launch.accelerate=fsdp", f"launch.gpus={count}", *(least or batch)]
            changes.append((words, f"weights and optimizer shared out over {count} GPUs"))
    if recipe.lora is not None and recipe.quantization is None:
        changes.append(([*FOUR_BITS, *least], "QLoRA, the base in 4 bits; another experiment"))
    if (recipe.train.get("max_length", MAX_LENGTH) or SHORT + 1) > SHORT:
        words = [f"train.max_length={SHORT}", *least]
        changes.append((words, "longer examples lose their tail; another experiment"))
    return changes


def advise(plan: Plan, overrides: Sequence[str] = ()) -> Advice | None:
    """Return the first change that fits, smallest first; for what fits, one that is faster."""
    for words, why in ways(plan):
        if plan.fits and words != KEEP_ALL:
            break
        other = changed(plan, overrides, words)
        if other is not None and other.fits and other.memory != plan.memory:
            return Advice(shlex.join(words), why, other)
    return None


def table(plan: Plan, overrides: Sequence[str] = ()) -> list[str]:
    """Return what every change does, a line for each that can be trained."""
    lines = [("GiB", "fits", "time", "change")]
    for words, why in ways(plan):
        if (other := changed(plan, overrides, words)) is not None:
            time = "-" if other.seconds is None else shown_duration(other.seconds)
            fits = "yes" if other.fits else "no"
            lines.append((f"{other.needed:.1f}", fits, time, f"{shlex.join(words)}  ({why})"))
    return aligned(lines)


def rows_shown(plan: Plan, advice: Advice | None) -> list[tuple[str, str, dict[str, Any]]]:
    """Return label, text (empty: not shown) and the values for `--json` of at most 15 rows."""
    steps, traced, card, name = plan.steps, plan.trace, plan.card, plan.recipe.model.name_or_path
    kind = {"NO": "one process", "FSDP": "FSDP2"}.get(plan.launch.distributed_type, "DDP")
    kind += "  (assumed: this machine has no GPU)" if card.assumed else ""
    training = f"{plan.recipe.name}: {plan.method} on {steps.world_size} x {card.name}, {kind}"
    batch = f"{steps.per_device} per device x {steps.accumulation} x {steps.world_size}"
    number = (
        f"{steps.steps:,} of {steps.examples} examples ({batch}), {steps.per_epoch:,} per epoch"
    )
    parts = ", ".join(f"{part} {size:.1f}" for part, size in plan.memory.items() if size >= 0.05)
    memory = {"memory_gib": plan.memory, "peak_gib": plan.peak, "needed_gib": plan.needed}
    kept = (traced.checkpointed if plan.checkpointing else traced.per_token) / 2**20
    held = "an upper estimate: layers with a state as torch computes them"
    room = f"the card has {card.memory_gib:.1f} GiB"
    if card.name == "cpu":
        each = " for each process" if plan.launch.per_machine > 1 else ""
        room = f"{card.memory_gib:.1f} GiB of this machine's memory are free{each}"
    time = "not estimated: the peak of this card is not known"
    if plan.seconds is not None:
        walltime = shown_duration(-(-plan.seconds * 1.5 // 900) * 900)  # whole quarters of an hour
        time = f"about {shown_duration(plan.seconds)}; {plan.speed:,.0f} tokens/s,"
        time += f" {plan.speed_source}; suggested walltime {walltime}"
    speed = {"tokens_per_second": plan.speed, "speed": plan.speed_source, "seconds": plan.seconds}
    change = "" if plan.fits else "no known change of this recipe makes it fit: use more memory"
    if advice is not None:
        change = f"{advice.words}  ({advice.why}; {advice.plan.needed:.1f} GiB)"
    of_card = {"method": plan.method, "card": card.name, "card_gib": card.memory_gib}
    text = f"{name}, {traced.parameters:,} parameters, {traced.trained:,} trained"
    return [
        ("training", training, of_card),
        ("model", text, {"model": name, **asdict(traced)}),
        ("steps", number, asdict(steps)),
        ("tokens", f"{steps.tokens:,} ({plan.rows.source})", {"rows": plan.rows.source}),
        ("memory", f"{plan.needed:.1f} GiB: {parts}", memory),
        ("", f"{steps.largest:,} tokens in a micro-batch, each keeps {kept:.2f} MiB", {}),
        ("", held if traced.carries_state else "", {}),
        ("fits" if plan.fits else "DOES NOT FIT", room, {"fits": plan.fits}),
        ("time", time, speed),
        ("try", change, {"advice": advice and advice.words}),
    ]
