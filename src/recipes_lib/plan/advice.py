"""What a plan says: one list of rows for the terminal and for `--json`, the first change that fits,
and the same training in other ways.
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from recipes_lib.config.launch import plan_launch
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.terminal import aligned, shown_duration
from recipes_lib.plan.plan import Plan, plan_of

COUNTS = (2, 4, 8)  # of GPUs
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


@dataclass(frozen=True)
class PlanRow:
    """A line of a plan for a reader, none where `text` is empty, and its values for `--json`."""

    label: str
    text: str
    values: dict[str, object]


def changed(plan: Plan, overrides: Sequence[str], words: Sequence[str]) -> Plan | None:
    """Return the plan with further words on the command line; None where they cannot be trained."""
    try:
        recipe = load_recipe(plan.recipe.path, [*overrides, *words])
        launches = any(word.startswith("launch.") for word in words)
        launch = plan_launch(recipe.launch) if launches else plan.launch
        return plan_of(recipe, launch, plan.card, plan.rows)
    except RecipesError:
        return None


def advise(plan: Plan, overrides: Sequence[str] = ()) -> Advice | None:
    """Return the first change that fits, smallest first; for what fits, one that is faster.

    Args:
        overrides: the words that were typed.
    """
    recipe, per_device = plan.recipe, plan.steps.per_device
    same_step = _same_step(plan)
    recompute = [] if plan.checkpointing else ["train.activation_checkpointing=true"]
    ways: list[tuple[list[str], str]] = []
    if plan.fits and plan.checkpointing:
        why = "activations fit without computing every block twice"
        ways.append((["train.activation_checkpointing=false"], why))
    if not plan.fits:
        for size in (size for size in (4, 2, 1) if size < per_device):
            words = [f"train.per_device_train_batch_size={size}", *same_step]
            ways.append((words, "smaller micro-batches of the same step"))
        ways.append((recompute, "keeps the inputs of the blocks and computes each twice"))
        if per_device > 1:
            recompute = [*recompute, "train.per_device_train_batch_size=1", *same_step]
            ways.append((recompute, "both"))
        more = [count for count in COUNTS if count > plan.launch.world_size]
        for count in more if plan.card.name != "cpu" else ():
            words = ["launch.accelerate=fsdp", f"launch.gpus={count}", *recompute]
            ways.append((words, f"weights and optimizer shared out over {count} GPUs"))
        if recipe.lora is not None and recipe.quantization is None:
            ways.append(([*FOUR_BITS, *recompute], "the base in 4 bits; another experiment"))
        why = "longer examples lose their tail; another experiment"
        ways.append((["train.max_length=512", *recompute], why))
    for words, why in ways:
        other = changed(plan, overrides, words)
        if other is not None and other.fits and other.memory != plan.memory:
            return Advice(shlex.join(words), why, other)
    return None


def _same_step(plan: Plan) -> list[str]:
    """Return the word that makes the accumulation follow the micro-batch, where none does."""
    known = plan.recipe.run.global_batch_size
    return [] if known else [f"run.global_batch_size={plan.steps.examples}"]


def table(plan: Plan, overrides: Sequence[str] = ()) -> list[str]:
    """Return the same training by other methods and on more cards, a line for each."""
    methods: dict[str, tuple[str, ...]] = {"full": ()}
    if plan.recipe.lora is not None:
        methods = {"LoRA": ("quantization=null",), "QLoRA": FOUR_BITS}
    launches = [("", 1)]
    if plan.card.name != "cpu":
        launches += itertools.product(("ddp", "fsdp"), COUNTS)
    lines = [("method", "cards", "", "GiB", "fits", "time")]
    for (method, words), (kind, count) in itertools.product(methods.items(), launches):
        size = math.gcd(plan.steps.per_device, plan.steps.examples // count)
        batch = [f"train.per_device_train_batch_size={size}", *_same_step(plan)]
        launch = [f"launch.accelerate={kind}", f"launch.gpus={count}"] if kind else []
        if (other := changed(plan, overrides, [*words, *batch, *launch])) is not None:
            needed, fits = f"{other.needed:.1f}", "yes" if other.fits else "no"
            time = "-" if other.seconds is None else shown_duration(other.seconds)
            lines.append((method, str(count), kind, needed, fits, time))
    return aligned(lines)


def rows_shown(plan: Plan, advice: Advice | None) -> list[PlanRow]:
    """Return the plan, at most 15 rows."""
    steps, traced, card, name = plan.steps, plan.trace, plan.card, plan.recipe.model.name_or_path
    result: list[PlanRow] = []

    def add(label: str, text: str, **values: object) -> None:
        result.append(PlanRow(label, text, values))

    kind = {"NO": "one process", "FSDP": "FSDP2"}.get(plan.launch.distributed_type, "DDP")
    kind += "  (assumed: this machine has no GPU)" if card.assumed else ""
    text = f"{plan.recipe.name}: {plan.method} on {steps.world_size} x {card.name}, {kind}"
    add("training", text, method=plan.method, card=card.name, card_gib=card.memory_gib)
    text = f"{name}, {traced.parameters:,} parameters, {traced.trained:,} trained"
    add("model", text, model=name, **asdict(traced))
    batch = f"{steps.per_device} per device x {steps.accumulation} x {steps.world_size}"
    text = f"{steps.steps:,} of {steps.examples} examples ({batch}), {steps.per_epoch:,} per epoch"
    add("steps", text, **asdict(steps))
    add("tokens", f"{steps.tokens:,} ({plan.rows.source})", rows=plan.rows.source)

    parts = {part: size for part, size in plan.memory.items() if size >= 0.05}
    text = ", ".join(f"{part} {size:.1f}" for part, size in parts.items())
    text = f"{plan.needed:.1f} GiB: {text}"
    add("memory", text, memory_gib=plan.memory, peak_gib=plan.peak, needed_gib=plan.needed)
    kept = (traced.checkpointed if plan.checkpointing else traced.per_token) / 2**20
    add("", f"{steps.largest:,} tokens in a micro-batch, each keeps {kept:.2f} MiB")
    if traced.carries_state:
        add("", "an upper estimate: layers with a state as torch computes them")
    label = "fits" if plan.fits else "DOES NOT FIT"
    add(label, f"the card has {card.memory_gib:.1f} GiB", fits=plan.fits)

    text = "not estimated: the peak of this card is not known"
    if plan.seconds is not None:
        walltime = shown_duration(-(-plan.seconds * 1.5 // 900) * 900)  # whole quarters of an hour
        text = f"about {shown_duration(plan.seconds)}; {plan.speed:,.0f} tokens/s,"
        text += f" {plan.speed_source}; suggested walltime {walltime}"
    speed, source = plan.speed, plan.speed_source
    add("time", text, tokens_per_second=speed, speed=source, seconds=plan.seconds)

    text = "" if plan.fits else "no known change of this recipe makes it fit: use more memory"
    if advice is not None:
        text = f"{advice.words}  ({advice.why}; {advice.plan.needed:.1f} GiB)"
    add("try", text, advice=advice and advice.words)
    return result
