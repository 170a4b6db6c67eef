"""Stage 1, continued: combinations of keys that a schema cannot judge and that need no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from recipes_lib.config.accelerate_config import load_accelerate_config, precision_conflict
from recipes_lib.config.batch import WITHOUT_WARMUP, solve_batch
from recipes_lib.config.constraints import (
    NOT_IN_MODEL_KWARGS,
    VARLEN,
)
from recipes_lib.config.kinds import SECTIONS
from recipes_lib.config.launch import plan_launch
from recipes_lib.config.loader import Document, run_name
from recipes_lib.config.model_files import no_model_at
from recipes_lib.config.sections import TRL, LaunchSection, trl_templates
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.validation import PlacedError
from recipes_lib.core.errors import RecipeError
from recipes_lib.models.known import widest

_ROWS_OF_ACCELERATE = {
    "split_batches": True,
    "dispatch_batches": True,
    "use_seedable_sampler": False,
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+\Z")
_Section = dict[str, Any]


def check_combinations(document: Document) -> Iterator[PlacedError]:
    """Yield what is wrong between keys, with the key to blame; warnings are added to the document.

    Values of the wrong type were reported already, so the rules look only at values they can
    understand.
    """
    sections, is_recipe = _sections(document), document.kind.name == "recipe"
    for rule in (_always, _of_a_recipe) if is_recipe else (_always,):
        for key, what, *hints in rule(**sections):
            path = tuple(key.split("."))
            yield path, document.error(path, what, *hints)
    yield from _launch(document, sections["launch"], sections["train"])
    for key, what, hint in _warnings(**sections):
        document.warnings.append(document.error(tuple(key.split(".")), f"warning: {what}", hint))
    document.warnings.extend(_changed_scaling(document))
    given = document.values.get("run", {})
    if is_recipe and isinstance(given, dict) and isinstance(given.get("name", ""), str):
        try:
            run_name(document)
        except RecipeError as error:
            yield ("run", "name"), error


def _sections(document: Document) -> dict[str, dict[str, Any]]:
    """Return every section, those that are absent or no mapping as empty ones."""
    values = {name: document.values.get(name) for name in SECTIONS}
    return {name: value if isinstance(value, dict) else {} for name, value in values.items()}


def _always(
    *,
    train: _Section,
    model: _Section,
    quantization: _Section,
    lora: _Section,
    data: _Section,
    **_: _Section,
) -> Iterator[tuple[str, ...]]:
    """Yield key, what is wrong and hints: what cannot be, in a recipe and in what it extends."""
    if train.get("bf16") is True and train.get("fp16") is True:
        what = "train.bf16 and train.fp16 are both true; a run has one precision"
        yield "train.fp16", what, "remove one of them (bf16 needs no loss scaling)"
    if quantization.get("load_in_4bit") is True and quantization.get("load_in_8bit") is True:
        what = (
            "quantization.load_in_4bit and load_in_8bit are both true; weights have one precision"
        )
        yield "quantization.load_in_8bit", what, "remove one of them"
    yield from _target_modules(lora.get("target_modules"), lora.get("target_parameters"))
    kernel = model.get("attn_implementation")
    if isinstance(kernel, str) and "flash" in kernel and model.get("dtype") == "float32":
        what = f"model.attn_implementation {kernel} cannot compute in float32"
        hint = "set model.dtype: bfloat16, or attn_implementation: sdpa"
        yield "model.attn_implementation", what, hint
    template = data.get("chat_template")
    if (
        isinstance(template, str)
        and template.startswith(TRL)
        and template not in (shipped := trl_templates())
    ):
        what = f"data.chat_template: TRL ships no template {template!r}"
        names = f"there are {', '.join(shipped)}"
        yield "data.chat_template", what, *(did_you_mean(template, shipped) or [names])
    split = data.get("split")
    held = [split.get("validation", 0.1), split.get("test", 0.0)] if isinstance(split, dict) else []
    if held and all(isinstance(part, int | float) for part in held) and sum(held) >= 1:
        what = f"data.split leaves no training rows: validation + test = {sum(held):g}"
        yield "data.split", what, "make the sum smaller than 1"
    kwargs = model.get("kwargs")
    for key in kwargs if isinstance(kwargs, dict) else ():
        if key in NOT_IN_MODEL_KWARGS:
            what = f"model.kwargs.{key} cannot be set there"
            yield f"model.kwargs.{key}", what, NOT_IN_MODEL_KWARGS[key]
    # What accelerate would do to the rows of a step must not depend on the number of processes, nor
    # on a break.
    config = train.get("accelerator_config")
    if not isinstance(config, dict):
        return
    for key, wrong in _ROWS_OF_ACCELERATE.items():
        if config.get(key) is wrong:
            name = f"train.accelerator_config.{key}"
            what = f"{name}: {str(wrong).lower()} gives the steps other examples on another number"
            yield name, f"{what} of processes", "remove it"
    accumulation = config.get("gradient_accumulation_kwargs")
    if isinstance(accumulation, dict) and "num_steps" in accumulation:
        name = "train.accelerator_config.gradient_accumulation_kwargs"
        what = f"{name}.num_steps would replace train.gradient_accumulation_steps"
        hint = "set train.gradient_accumulation_steps, or declare run.global_batch_size"
        yield name, what, hint


def _target_modules(targets: Any, parameters: Any) -> Iterator[tuple[str, ...]]:
    key = "lora.target_modules"
    if isinstance(targets, str) and targets != "all-linear" and _PLAIN_NAME.match(targets):
        yield key, f"{key} must be a list of names, got {targets!r}", f"write [{targets}]"
    if targets == "" or (targets == [] and not parameters):
        hint = "write all-linear or a list such as [q_proj, v_proj]"
        yield key, f"{key} is empty: no layer would be trained", hint
    if "lm_head" in (targets if isinstance(targets, list) else [targets]):
        what = "holds lm_head: TRL's loss cannot run through an adapter on the output layer"
        yield key, f"{key} {what}", "remove lm_head"


def _of_a_recipe(
    *,
    train: _Section,
    model: _Section,
    quantization: _Section,
    lora: _Section,
    data: _Section,
    **_: _Section,
) -> Iterator[tuple[str, ...]]:
    """Yield what a whole recipe cannot mean, as `_always`."""
    dtype, fp16 = model.get("dtype"), train.get("fp16") is True
    is_half = dtype in ("float16", "bfloat16")
    if fp16 and not lora and is_half:
        what = (
            f"train.fp16 cannot train weights that are {dtype} themselves: its loss scaling needs"
            " float32 ones"
        )
        hint = "set model.dtype: float32, or train.bf16: true in place of fp16"
        yield "train.fp16", what, hint
    four, eight = (quantization.get(f"load_in_{bits}bit") is True for bits in (4, 8))
    if quantization and not four and not eight:
        hint = "set load_in_4bit: true or load_in_8bit: true, or remove the section"
        yield "quantization", "quantization switches nothing on", hint
    if (four or eight) and not lora:
        what = "quantized weights cannot be trained without an adapter"
        yield "quantization", what, "add a lora section, or remove quantization"
    # A 4-bit layer answers in the base's precision; where autocast's is the other half, the next
    # concatenation ends the run.
    bf16 = train.get("bf16", True) is True
    half = "float16" if fp16 else "bfloat16" if bf16 else dtype
    if four and is_half and dtype != half:
        under = "train.fp16" if half == "float16" else "train.bf16"
        what = (
            f"model.dtype {dtype} under {under}: 4-bit layers would mix the two, which torch"
            " refuses"
        )
        yield "model.dtype", what, f"set model.dtype: {half}"
    if model.get("attn_implementation") == VARLEN:
        key = "model.attn_implementation"
        if train.get("packing") and train.get("packing_strategy") == "wrapped":
            what = f"{key} {VARLEN}: wrapped rows do not say where an example ends"
            yield key, what, "set attn_implementation: sdpa, or train.packing_strategy: bfd"
        elif train.get("padding_free") is False:
            what = f"{key} {VARLEN} is for rows without padding, and train.padding_free is false"
            yield key, what, "remove train.padding_free, or set attn_implementation: sdpa"
    if train.get("train_sampling_strategy") == "batch_rebalance":
        key = "train.train_sampling_strategy"
        what = f"{key} batch_rebalance deals the rows of a step out by another number of processes"
        yield key, what, "set group_by_length, which puts rows of like length into one step"
    checkpointing = train.get("activation_checkpointing_kwargs")
    if isinstance(checkpointing, dict) and checkpointing.get("selective") is True:
        yield from _selective(train, checkpointing, model)
    strategy, split = train.get("eval_strategy", "no"), data.get("split")
    split = split if isinstance(split, dict) else {}
    nothing_held_out = split.get("method") == "none" or split.get("validation") == 0
    if strategy in ("steps", "epoch") and nothing_held_out:
        what = f"train.eval_strategy is {strategy}, but data.split holds no validation rows out"
        hint = "set data.split.validation, or train.eval_strategy: 'no'"
        yield "train.eval_strategy", what, hint
    if train.get("load_best_model_at_end") is True and train.get("save_strategy") != "best":
        yield from _best_model(train, strategy, train.get("save_strategy", "steps"))


def _selective(train: _Section, how: _Section, model: _Section) -> Iterator[tuple[str, ...]]:
    """Selective checkpointing keeps what attention's kernel returned and computes the rest twice;
    upstream says so after the model was loaded, or does nothing.
    """
    key = "train.activation_checkpointing_kwargs"
    if train.get("activation_checkpointing") is not True:
        what = f"{key}.selective: train.activation_checkpointing is off"
        yield key, what, "set train.activation_checkpointing: true, or remove selective"
    elif how.get("use_reentrant") is True:
        what = f"{key}.selective cannot work with use_reentrant: true"
        yield key, what, "remove use_reentrant"
    elif model.get("attn_implementation") == "eager":
        what = f"{key}.selective: eager attention has no kernel whose result could be kept"
        yield key, what, "remove selective, or set model.attn_implementation: sdpa"


def _best_model(train: _Section, validated: Any, saved: Any) -> Iterator[tuple[str, ...]]:
    """The best model is chosen among checkpoints, so each validation needs one."""
    key = "train.load_best_model_at_end"
    if validated != saved:
        what = (
            f"{key} needs a checkpoint at every validation: eval_strategy is {validated},"
            f" save_strategy {saved}"
        )
        yield key, what, "set both to steps or both to epoch, or save_strategy: best"
    every, between = train.get("eval_steps"), train.get("save_steps", 500)
    whole = type(every) is int and type(between) is int and every > 0
    if validated == saved == "steps" and whole and between % every:
        what = f"{key}: train.save_steps {between} is not a multiple of train.eval_steps {every}"
        below = between // every * every
        near = [str(steps) for steps in (below, below + every) if steps]
        yield key, what, f"set train.save_steps to {' or '.join(near)}"


def _launch(document: Document, launch: _Section, train: _Section) -> Iterator[PlacedError]:
    is_recipe = document.kind.name == "recipe"
    name = launch.get("accelerate", LaunchSection.accelerate if is_recipe else None)
    if not isinstance(name, str):
        return

    def wrong(key: str, *words: str) -> PlacedError:
        return ("launch", key), document.error(("launch", key), *words)

    try:
        config = load_accelerate_config(name)
    except RecipeError as error:
        yield wrong("accelerate", error.what, *error.hints)
        return
    conflict = precision_conflict(train, config.mixed_precision, f"launch.accelerate {name}")
    if conflict and is_recipe:
        yield wrong("accelerate", *conflict)
    for key in ("gpus", "nodes") if config.distributed_type == "NO" else ():
        if isinstance(launch.get(key), int) and launch[key] > 1:
            what = f"launch.accelerate {name} starts one process, but launch.{key} is {launch[key]}"
            hint = "set launch.accelerate to ddp or fsdp (ddp_cpu or fsdp_cpu without GPUs)"
            yield wrong(key, what, hint)
            return


def check_here(document: Document) -> Iterator[RecipeError]:
    """Yield what is wrong with a recipe on this machine as it stands: a model folder that is not
    here, a batch its launch cannot make.

    Only `recipes check` asks: a launch from the command line may have other processes, and a recipe
    may be read on another machine.
    """
    sections = _sections(document)
    train, run, launch = sections["train"], sections["run"], sections["launch"]
    name, path = sections["model"].get("name_or_path"), ("model", "name_or_path")
    if isinstance(name, str) and (wrong := no_model_at(name)):
        yield document.error(path, *wrong)
    rank: Any = sections["lora"].get("r")
    width = widest(name) if isinstance(name, str) and type(rank) is int else None
    if width is not None and rank > width:
        yield document.error(("lora", "r"), *rank_too_large(rank, width))
    total: Any = run.get("global_batch_size")
    per_device = train.get("per_device_train_batch_size", 8)
    numbers = (total, per_device, launch.get("gpus") or 1, launch.get("nodes", 1))
    sound = all(type(number) is int and number > 0 for number in numbers)
    if document.kind.name != "recipe" or not sound:
        return
    try:
        world_size = plan_launch(LaunchSection(**launch)).world_size
    except (RecipeError, TypeError):
        return  # the launch section is refused itself
    try:
        solve_batch(total, per_device, world_size)
    except RecipeError as error:
        yield document.error(("run", "global_batch_size"), error.what, *error.hints)


def rank_too_large(rank: int, widest: int) -> tuple[str, str]:
    """Return what is wrong with a rank beyond the widest layer of a model, and a hint."""
    what = (
        f"lora.r {rank:,} is larger than the widest layer of the model ({widest:,}), so it adds"
        " nothing but memory"
    )
    return what, "ranks of 8 to 128 are usual"


def _warnings(
    *, train: _Section, run: _Section, model: _Section, **others: _Section
) -> Iterator[tuple[str, str, str]]:
    """Yield combinations that are legal but rarely meant."""
    steps: Any = train.get("max_steps")
    warmup: Any = train.get("warmup_steps")
    if "num_train_epochs" in train and isinstance(steps, int) and steps > 0:
        what = "train.max_steps wins over train.num_train_epochs"
        yield "train.max_steps", what, "remove one of them"
    if run.get("global_batch_size") and "gradient_accumulation_steps" in train:
        key = "train.gradient_accumulation_steps"
        what = f"{key} is ignored: it is derived from run.global_batch_size"
        yield key, what, "remove one of them"
    numbers = all(
        isinstance(number, int | float) and not isinstance(number, bool)
        for number in (steps, warmup)
    )
    if numbers and warmup >= steps > 0 and train.get("lr_scheduler_type") not in WITHOUT_WARMUP:
        what = (
            f"train.warmup_steps {warmup:g} is not less than train.max_steps {steps:g}:"
            " train.learning_rate is never reached"
        )
        hint = "a number below 1 is a share of all steps: train.warmup_steps: 0.03"
        yield "train.warmup_steps", what, hint


def _changed_scaling(document: Document) -> Iterator[RecipeError]:
    """Yield a warning where a rank was replaced and its lora_alpha was not: the update is scaled by
    lora_alpha / r.
    """
    lora, before = _sections(document)["lora"], document.replaced.get(("lora", "r"))
    places = [document.origin(("lora", key)).file for key in ("r", "lora_alpha")]
    if not before or places[0] == places[1]:
        return
    rank: Any = lora.get("r")
    alpha: Any = lora.get("lora_alpha")
    if all(isinstance(number, int | float) and number > 0 for number in (rank, alpha, before)):
        root = 0.5 if lora.get("use_rslora") is True else 1
        was, now = alpha / before**root, alpha / rank**root
        what = (
            f"warning: lora.r {before} -> {rank} with lora.lora_alpha still {alpha} scales the"
            f" adapter by {now:g} instead of {was:g}"
        )
        hint = f"to change the rank alone: lora.lora_alpha={was * rank**root:g}"
        yield document.error(("lora", "r"), what, hint)
