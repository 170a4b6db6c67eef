"""Which settings to change, ranked by what they gain. Each proposal is planned like the recipe
itself, none is a rule of thumb.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from recipes_lib.planning.batches import validations
from recipes_lib.planning.methods import divided
from recipes_lib.planning.plan import Plan
from recipes_lib.planning.settings import Settings

WORTH_S, WORTH_SHARE = 5.0, 0.03
VALIDATION_SHARE = 0.25  # of the training: above it, less often or on fewer rows is proposed
_EVAL_SHARE = 0.2  # of the training between two validations
FEW_ROWS = 500  # validation rows that tell a loss to a few hundredths
LONGEST_MASKED_ROW = 4096


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
    """Return proposals: what makes the training fit, or what makes it faster; the best first."""
    if not plan.fits:
        found = list(
            {advice.setting: advice for advice in _to_fit(plan) if advice.makes_it_fit}.values()
        )
        if plan.uncounted:
            found = [replace(advice, makes_it_fit=False) for advice in found]
        return sorted(found, key=lambda advice: (not advice.same_result, -advice.saves_s))
    found = [
        advice
        for advice in _to_be_faster(plan)
        if advice.saves_s > max(WORTH_S, WORTH_SHARE * plan.duration.training)
    ]
    if plan.uncounted:
        found = [advice for advice in found if advice.memory_gib <= 0]
    return sorted(found, key=lambda advice: -advice.saves_s)


@dataclass(frozen=True)
class Cost:
    """What one setting costs of a training: `setting` as it is, what it means, and its seconds."""

    setting: str
    why: str
    seconds: float


def largest_cost(plan: Plan) -> Cost | None:
    """Return the setting that costs most time, beside the rows and the model themselves; None where
    none costs a tenth of the whole.
    """
    train, batches, spent = plan.recipe.train, plan.batches, plan.duration.training
    how_often = "eval_steps" if train.get("eval_strategy") == "steps" else "eval_strategy"
    passes = validations(batches.steps, batches.steps_per_epoch, train)
    recomputed = 1 / 4 if plan.settings.adapter is None else 1 / 3
    validating = f"{passes:,} passes over {plan.lengths.validation:,} validation rows"
    padding = 1 - 1 / batches.padding
    costs = [
        Cost(
            f"train.{how_often} {train.get(how_often, 'absent')}",
            validating,
            plan.duration.validation,
        ),
        Cost(
            "train.padding_free false",
            f"padding is {padding:.0%} of the computed tokens",
            spent * padding,
        ),
        Cost(
            "train.activation_checkpointing true",
            "every block is computed twice",
            spent * recomputed * plan.settings.checkpointing,
        ),
    ]
    if train.get("max_steps", -1) <= 0 and batches.epochs > 1:
        words = f"{batches.epochs:g} passes over {plan.lengths.train:,} training rows"
        costs.append(
            Cost(
                f"train.num_train_epochs {train.get('num_train_epochs', 3):g}",
                words,
                spent * (1 - 1 / batches.epochs),
            )
        )
    most = max(costs, key=lambda cost: cost.seconds)
    return most if most.seconds > plan.duration.total / 10 else None


def _validating(plan: Plan) -> Iterator[Advice]:
    """Validation that costs much of the training: less often, on fewer rows."""
    train = plan.recipe.train
    if plan.duration.validation <= VALIDATION_SHARE * plan.duration.training:
        return
    share = plan.duration.validation / plan.duration.training
    times = f"{share:.1f} times as long as" if share >= 1 else f"{share:.0%} of the time of"
    why = f"validation takes {times} training"
    seldom = plan.with_train(eval_strategy="steps", eval_steps=_EVAL_SHARE)
    chooses = bool(train.get("load_best_model_at_end"))
    words = [f"train.eval_steps={_EVAL_SHARE}"]
    if train.get("eval_strategy") != "steps":
        words.append("train.eval_strategy=steps")
    if (
        chooses and train.get("save_strategy") != "best"
    ):  # the best model is chosen among checkpoints
        words.append(f"train.save_strategy=steps train.save_steps={_EVAL_SHARE}")
    yield replace(_compare(plan, seldom, " ".join(words), why), same_result=not chooses)
    rows, split = plan.lengths.validation, plan.recipe.data.split
    if rows > 2 * FEW_ROWS and split.method == "hash":
        fewer = float(f"{split.validation * FEW_ROWS / rows:.2g}")
        kept = round(rows * fewer / split.validation)
        less = _compare(
            plan,
            plan.with_rows(kept),
            f"data.split.validation={fewer:g}",
            f"{kept:,} validation rows, not {rows:,}",
        )
        yield replace(less, same_result=False)


def _to_be_faster(plan: Plan) -> Iterator[Advice]:
    yield from _validating(plan)
    settings, base, words = plan.settings, plan, ""
    if (free := _padding_free(plan)) is not None:
        unpadded = plan.with_settings(free[0], plan.batches.accumulation)
        if unpadded.fits:
            base, words = unpadded, free[1]
            yield _compare(
                plan,
                base,
                words,
                f"padding is {1 - 1 / plan.batches.padding:.0%} of the computed tokens",
            )
    if settings.checkpointing:
        off, capped = _without_checkpointing(plan)
        if off.fits:
            yield _compare(
                plan,
                off,
                f"train.activation_checkpointing=false{capped}",
                "activations fit without computing them twice",
            )
    if settings.sharded:
        whole = plan.with_settings(replace(settings, sharded=False), plan.batches.accumulation)
        if whole.fits:
            name = "ddp" if plan.launch.machines == 1 else "ddp_multi_node"
            yield _compare(
                plan,
                whole,
                f"launch.accelerate={name}",
                "the model fits each GPU whole, so nothing has to be gathered",
            )
    larger = _larger(base)
    if larger is not None:
        size = f"train.per_device_train_batch_size={larger.settings.per_device}"
        yield _compare(
            plan,
            larger,
            f"{words} {size}".strip(),
            "larger micro-batches: fewer passes, less waiting",
        )


def _without_checkpointing(plan: Plan) -> tuple[Plan, str]:
    """Return the plan that keeps all activations, with a cap on the micro-batches where it would
    not fit else, and the cap's words.
    """
    settings = replace(plan.settings, checkpointing=False)
    off = plan.with_settings(settings, plan.batches.accumulation)
    cap = plan.largest(checkpointing=False) // 256 * 256
    longest = min(settings.max_length or max(plan.lengths.tokens), max(plan.lengths.tokens))
    if off.fits or settings.packing or cap < longest:
        return off, ""
    cap = min(cap, settings.max_tokens or cap)
    return (
        plan.with_settings(replace(settings, max_tokens=cap), plan.batches.accumulation),
        f" run.max_tokens_per_micro_batch={cap}",
    )


def _padding_free(plan: Plan) -> tuple[Settings, str] | None:
    """Return the settings without padding and the words for it, where there is padding to drop."""
    settings = plan.settings
    if settings.flattened or plan.batches.padding < 1.05:
        return None
    changed, words = replace(settings, padding_free=True), "train.padding_free=true"
    if (
        settings.attention == "sdpa"
        and settings.per_device * (settings.max_length or LONGEST_MASKED_ROW) > LONGEST_MASKED_ROW
    ):
        changed = replace(
            changed, max_tokens=min(settings.max_tokens or LONGEST_MASKED_ROW, LONGEST_MASKED_ROW)
        )
        words += f" run.max_tokens_per_micro_batch={changed.max_tokens}"
    return changed, words


def _larger(plan: Plan) -> Plan | None:
    """Return the fastest plan with larger micro-batches of the same examples per step that fits;
    the smallest of those within 1%.
    """
    best = None
    for factor in (2, 4, 8, 16):
        size, rest = plan.settings.per_device * factor, plan.batches.accumulation % factor
        if rest:
            break
        other = plan.with_settings(
            replace(plan.settings, per_device=size), plan.batches.accumulation // factor
        )
        if other.fits and other.duration.training < 0.99 * (best or plan).duration.training:
            best = other
    return best


def _to_fit(plan: Plan) -> Iterator[Advice]:
    settings, accumulation = plan.settings, plan.batches.accumulation
    longest = min(settings.max_length or max(plan.lengths.tokens), max(plan.lengths.tokens))

    def proposal(
        words: str,
        why: str,
        *,
        same: bool = True,
        accumulation: int = accumulation,
        **changes: object,
    ) -> Advice:
        changed = plan.with_settings(replace(settings, **changes), accumulation)  # type: ignore[arg-type]
        return replace(
            _compare(plan, changed, words, why), same_result=same, makes_it_fit=changed.fits
        )

    cap = max(longest, plan.largest() // 256 * 256)
    if not settings.packing and cap < plan.batches.largest:
        yield proposal(
            f"run.max_tokens_per_micro_batch={cap}",
            "cuts only the micro-batches that are too large",
            max_tokens=cap,
        )
    if not settings.checkpointing:
        words = "train.activation_checkpointing=true"
        yield proposal(
            words,
            "keeps the blocks' inputs only, and computes each block twice",
            checkpointing=True,
        )
        cap = max(longest, plan.largest(checkpointing=True) // 256 * 256)
        if not settings.packing and cap < plan.batches.largest:
            words += f" run.max_tokens_per_micro_batch={cap}"
            yield proposal(words, "both of the above", checkpointing=True, max_tokens=cap)
    if (
        settings.eval_per_device > 1
        and plan.memory.validation > plan.memory.activations + plan.memory.moment
    ):
        size = max(1, settings.eval_per_device // 4)
        yield proposal(
            f"train.per_device_eval_batch_size={size}",
            "validation is what needs most",
            eval_per_device=size,
        )
    for size in (settings.per_device // 2, settings.per_device // 4, 1):
        sizes = divided(plan.batches.examples_per_step, size, settings.world_size) if size else None
        if sizes and sizes[0] < settings.per_device:
            words = f"train.per_device_train_batch_size={sizes[0]}"
            yield proposal(
                words,
                "smaller micro-batches of the same step",
                accumulation=sizes[1],
                per_device=sizes[0],
            )
    if settings.device == "gpu":
        yield from _sharded(plan, proposal)
    yield from _other_experiments(plan, proposal)


def _sharded(plan: Plan, proposal: Callable[..., Advice]) -> Iterator[Advice]:
    settings = plan.settings
    for count in (2, 4, 8):
        sizes = divided(plan.batches.examples_per_step, settings.per_device, count)
        if (
            sizes is None
            or count < settings.world_size
            or (count == settings.world_size and settings.sharded)
        ):
            continue
        config = "fsdp_qlora" if settings.bits else "fsdp"
        why = f"weights, gradients and optimizer shared out over {count} GPUs"
        for checkpointing in {settings.checkpointing, True}:
            words = f"launch.accelerate={config} launch.gpus={count}"
            if checkpointing and not settings.checkpointing:
                words += " train.activation_checkpointing=true"
            if sizes[0] != settings.per_device:
                words += f" train.per_device_train_batch_size={sizes[0]}"
            changes = {
                "world_size": count,
                "per_machine": count,
                "sharded": True,
                "per_device": sizes[0],
                "checkpointing": checkpointing,
            }
            changes["reshard"] = config == "fsdp"  # fsdp_qlora.yaml keeps what it gathered
            yield proposal(words, why, accumulation=sizes[1], **changes)


def _other_experiments(plan: Plan, proposal: Callable[..., Advice]) -> Iterator[Advice]:
    """Changes of what is learnt."""
    settings = plan.settings
    if settings.adapter is not None and settings.adapter.dropout:
        words = "lora.lora_dropout=0"
        yield proposal(
            words, "no masks to keep", same=False, adapter=replace(settings.adapter, dropout=0.0)
        )
    if settings.adapter is not None and settings.bits is None:
        words = (
            "quantization.load_in_4bit=true quantization.bnb_4bit_quant_type=nf4"
            " quantization.bnb_4bit_use_double_quant=true"
        )
        words += (
            " quantization.bnb_4bit_compute_dtype=bfloat16"
            " quantization.bnb_4bit_quant_storage=bfloat16"
        )
        for checkpointing in sorted({settings.checkpointing, True}):
            more = (
                " train.activation_checkpointing=true"
                if checkpointing and not settings.checkpointing
                else ""
            )
            changes = {"bits": 4, "double_quantized": True, "checkpointing": checkpointing}
            yield proposal(words + more, "the base in 4 bits", same=False, **changes)
    if settings.max_length is None or settings.max_length > 512:
        words = "train.max_length=512"
        yield proposal(words, "longer examples lose their tail", same=False, max_length=512)


def _compare(before: Plan, after: Plan, words: str, why: str) -> Advice:
    saved = (
        before.duration.training
        + before.duration.validation
        - after.duration.training
        - after.duration.validation
    )
    return Advice(words, why, saved, after.memory.peak - before.memory.peak)
