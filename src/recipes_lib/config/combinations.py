"""Stage 1, continued: combinations of keys that a schema cannot judge and that need no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from recipes_lib.config.accelerate_config import load_accelerate_config, precision_conflict
from recipes_lib.config.batch import solve_batch
from recipes_lib.config.constraints import NOT_IN_MODEL_KWARGS
from recipes_lib.config.launch import plan_launch
from recipes_lib.config.loader import Document, run_name
from recipes_lib.config.model_files import no_model_at
from recipes_lib.config.schedule import WITHOUT_WARMUP
from recipes_lib.config.sections import LaunchSection
from recipes_lib.config.validation import PlacedError
from recipes_lib.core.errors import RecipeError
from recipes_lib.models.known import named_shape

_ROWS_OF_ACCELERATE = {
    "split_batches": True,
    "dispatch_batches": True,
    "use_seedable_sampler": False,
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+\Z")


def check_combinations(document: Document) -> Iterator[PlacedError]:
    """Yield what is wrong between keys, with the key to blame; warnings are added to the document.

    Values of the wrong type were reported already, so the rules look only at values they can
    understand.
    """
    sections = {
        name: value if isinstance(value, dict) else {} for name, value in document.values.items()
    }
    for rule in _RULES:
        for path, what, *hints in rule(sections, document):
            yield path, document.error(path, what, *hints)
    for path, what, *hints in _warnings(sections):
        document.warnings.append(document.error(path, f"warning: {what}", *hints))
    document.warnings.extend(_changed_scaling(document))
    if document.kind.name == "recipe":
        yield from _run_name(document)


_Rule = Callable[[dict[str, Any], Document], Iterator[Any]]


def _precision(sections: dict[str, Any], document: Document) -> Iterator[Any]:
    train = sections.get("train", {})
    if train.get("bf16") is True and train.get("fp16") is True:
        yield (
            ("train", "fp16"),
            "train.bf16 and train.fp16 are both true; a run has one precision",
            "remove one of them (bf16 needs no loss scaling)",
        )
    dtype = sections.get("model", {}).get("dtype")
    if (
        train.get("fp16") is True
        and not sections.get("lora")
        and dtype in ("float16", "bfloat16")
        and document.kind.name == "recipe"
    ):
        what = (
            f"train.fp16 cannot train weights that are {dtype} themselves: its loss scaling needs"
            " float32 ones"
        )
        yield (
            ("train", "fp16"),
            what,
            "set model.dtype: float32, or train.bf16: true in place of fp16",
        )


def _quantization(sections: dict[str, Any], document: Document) -> Iterator[Any]:
    quantization = sections.get("quantization", {})
    four, eight = quantization.get("load_in_4bit") is True, quantization.get("load_in_8bit") is True
    if four and eight:
        yield (
            ("quantization", "load_in_8bit"),
            "quantization.load_in_4bit and load_in_8bit are both true; weights have one precision",
            "remove one of them",
        )
    if quantization and not four and not eight and document.kind.name == "recipe":
        yield (
            ("quantization",),
            "quantization switches nothing on",
            "set load_in_4bit: true or load_in_8bit: true, or remove the section",
        )
    if (four or eight) and not sections.get("lora") and document.kind.name == "recipe":
        yield (
            ("quantization",),
            "quantized weights cannot be trained without an adapter",
            "add a lora section, or remove quantization",
        )


def _half_precisions(sections: dict[str, Any], document: Document) -> Iterator[Any]:
    """A 4-bit layer answers in the base's precision; where autocast's is the other half, the next
    concatenation ends the run.
    """
    train, dtype = sections.get("train", {}), sections.get("model", {}).get("dtype")
    half = (
        "float16"
        if train.get("fp16") is True
        else "bfloat16"
        if train.get("bf16", True) is True
        else dtype
    )
    quantized = (
        sections.get("quantization", {}).get("load_in_4bit") is True
        and document.kind.name == "recipe"
    )
    if quantized and dtype in ("float16", "bfloat16") and dtype != half:
        under = "train.fp16" if half == "float16" else "train.bf16"
        what = (
            f"model.dtype {dtype} under {under}: 4-bit layers would mix the two, which torch"
            " refuses"
        )
        yield ("model", "dtype"), what, f"set model.dtype: {half}"


def _target_modules(sections: dict[str, Any], _: Document) -> Iterator[Any]:
    targets = sections.get("lora", {}).get("target_modules")
    path = ("lora", "target_modules")
    if isinstance(targets, str) and targets != "all-linear" and _PLAIN_NAME.match(targets):
        yield (
            path,
            f"lora.target_modules must be a list of names, got {targets!r}",
            f"write [{targets}]",
        )
    if targets in ([], ""):
        yield (
            path,
            "lora.target_modules is empty: no layer would be trained",
            "write all-linear or a list such as [q_proj, v_proj]",
        )
    names = targets if isinstance(targets, list) else [targets]
    if "lm_head" in names:
        yield (
            path,
            (
                "lora.target_modules holds lm_head: TRL's loss cannot run through an adapter on the"
                " output layer"
            ),
            "remove lm_head",
        )


def _evaluation(sections: dict[str, Any], document: Document) -> Iterator[Any]:
    split, strategy = (
        sections.get("data", {}).get("split"),
        sections.get("train", {}).get("eval_strategy", "no"),
    )
    split = split if isinstance(split, dict) else {}
    nothing_held_out = split.get("method") == "none" or split.get("validation") == 0
    if strategy in ("steps", "epoch") and nothing_held_out and document.kind.name == "recipe":
        what = f"train.eval_strategy is {strategy}, but data.split holds no validation rows out"
        yield (
            ("train", "eval_strategy"),
            what,
            "set data.split.validation, or train.eval_strategy: 'no'",
        )
    if isinstance(split.get("validation", 0), int | float) and isinstance(
        split.get("test", 0), int | float
    ):
        held_out = split.get("validation", 0.1) + split.get("test", 0.0)
        if held_out >= 1:
            yield (
                ("data", "split"),
                f"data.split leaves no training rows: validation + test = {held_out:g}",
                "make the sum smaller than 1",
            )


def _best_model(sections: dict[str, Any], document: Document) -> Iterator[Any]:
    """The best model is chosen among checkpoints, so each validation needs one."""
    train = sections.get("train", {})
    validated, saved = train.get("eval_strategy", "no"), train.get("save_strategy", "steps")
    if (
        train.get("load_best_model_at_end") is not True
        or saved == "best"
        or document.kind.name != "recipe"
    ):
        return
    path = ("train", "load_best_model_at_end")
    if validated != saved:
        what = (
            "train.load_best_model_at_end needs a checkpoint at every validation: eval_strategy is"
            f" {validated}, save_strategy {saved}"
        )
        yield path, what, "set both to steps or both to epoch, or save_strategy: best"
    every, between = train.get("eval_steps"), train.get("save_steps", 500)
    if (
        validated == saved == "steps"
        and type(every) is int
        and type(between) is int
        and every > 0
        and between % every
    ):
        what = (
            f"train.load_best_model_at_end: train.save_steps {between} is not a multiple of"
            f" train.eval_steps {every}"
        )
        near = [
            str(steps)
            for steps in (between // every * every, (between // every + 1) * every)
            if steps
        ]
        yield path, what, f"set train.save_steps to {' or '.join(near)}"


def _attention(sections: dict[str, Any], _: Document) -> Iterator[Any]:
    model = sections.get("model", {})
    kernel, dtype = model.get("attn_implementation"), model.get("dtype")
    if isinstance(kernel, str) and "flash" in kernel and dtype == "float32":
        what = f"model.attn_implementation {kernel} cannot compute in float32"
        yield (
            ("model", "attn_implementation"),
            what,
            "set model.dtype: bfloat16, or attn_implementation: sdpa",
        )


def _model_kwargs(sections: dict[str, Any], _: Document) -> Iterator[Any]:
    kwargs = sections.get("model", {}).get("kwargs")
    for key in kwargs if isinstance(kwargs, dict) else ():
        if key in NOT_IN_MODEL_KWARGS:
            yield (
                ("model", "kwargs", key),
                f"model.kwargs.{key} cannot be set there",
                NOT_IN_MODEL_KWARGS[key],
            )


def _accelerator(sections: dict[str, Any], _: Document) -> Iterator[Any]:
    """What accelerate would do to the rows of a step; it must not depend on the number of
    processes, nor on a break.
    """
    config = sections.get("train", {}).get("accelerator_config")
    for key, wrong in _ROWS_OF_ACCELERATE.items():
        if isinstance(config, dict) and config.get(key) is wrong:
            what = (
                f"train.accelerator_config.{key}: {str(wrong).lower()} gives the steps other"
                " examples on another number of processes"
            )
            yield ("train", "accelerator_config", key), what, "remove it"
    accumulation = config.get("gradient_accumulation_kwargs") if isinstance(config, dict) else None
    if isinstance(accumulation, dict) and "num_steps" in accumulation:
        what = (
            "train.accelerator_config.gradient_accumulation_kwargs.num_steps would replace"
            " train.gradient_accumulation_steps"
        )
        hint = "set train.gradient_accumulation_steps, or declare run.global_batch_size"
        yield ("train", "accelerator_config", "gradient_accumulation_kwargs"), what, hint


def _launch(sections: dict[str, Any], document: Document) -> Iterator[Any]:
    launch = sections.get("launch", {})
    name = launch.get(
        "accelerate", LaunchSection.accelerate if document.kind.name == "recipe" else None
    )
    several = [
        key for key in ("gpus", "nodes") if isinstance(launch.get(key), int) and launch[key] > 1
    ]
    if not isinstance(name, str):
        return
    try:
        config = load_accelerate_config(name)
        conflict = precision_conflict(
            sections.get("train", {}), config.mixed_precision, f"launch.accelerate {name}"
        )
        if conflict and document.kind.name == "recipe":
            yield ("launch", "accelerate"), *conflict
        if several and config.distributed_type == "NO":
            what = (
                f"launch.accelerate {name} starts one process, but launch.{several[0]} is"
                f" {launch[several[0]]}"
            )
            yield (
                ("launch", several[0]),
                what,
                "set launch.accelerate to ddp or fsdp (ddp_cpu or fsdp_cpu without GPUs)",
            )
    except RecipeError as error:
        yield ("launch", "accelerate"), error.what, *error.hints


def check_here(document: Document) -> Iterator[RecipeError]:
    """Yield what is wrong with a recipe on this machine as it stands: a model folder that is not
    here, a batch its launch cannot make.

    Only `recipes check` asks: a launch from the command line may have other processes, and a recipe
    may be read on another machine.
    """
    sections = {
        name: value if isinstance(value, dict) else {} for name, value in document.values.items()
    }
    name, path = sections.get("model", {}).get("name_or_path"), ("model", "name_or_path")
    if isinstance(name, str) and (wrong := no_model_at(name)):
        yield document.error(path, *wrong)
    yield from _rank_beyond_the_model(document, sections.get("lora", {}).get("r"), name)
    train, run, launch = (
        sections.get("train", {}),
        sections.get("run", {}),
        sections.get("launch", {}),
    )
    total, per_device = run.get("global_batch_size"), train.get("per_device_train_batch_size", 8)
    numbers = (total, per_device, launch.get("gpus") or 1, launch.get("nodes", 1))
    if (
        document.kind.name != "recipe"
        or total is None
        or not all(type(number) is int and number > 0 for number in numbers)
    ):
        return
    try:
        world_size = plan_launch(LaunchSection(**launch)).world_size
    except (RecipeError, TypeError):
        return  # the launch section is refused itself
    try:
        solve_batch(total, per_device, world_size)
    except RecipeError as error:
        yield document.error(("run", "global_batch_size"), error.what, *error.hints)


def _rank_beyond_the_model(document: Document, rank: Any, model: Any) -> Iterator[RecipeError]:
    shape = named_shape(model) if isinstance(model, str) and type(rank) is int else None
    widest = (
        max(shape.hidden, shape.intermediate, shape.query_width, shape.vocabulary) if shape else 0
    )
    if shape and rank > widest:
        yield document.error(("lora", "r"), *rank_too_large(rank, widest))


def rank_too_large(rank: int, widest: int) -> tuple[str, str]:
    """Return what is wrong with a rank beyond the widest layer of a model, and a hint."""
    what = (
        f"lora.r {rank:,} is larger than the widest layer of the model ({widest:,}), so it adds"
        " nothing but memory"
    )
    return what, "ranks of 8 to 128 are usual"


_RULES: tuple[_Rule, ...] = (
    _precision,
    _quantization,
    _half_precisions,
    _target_modules,
    _evaluation,
    _best_model,
    _attention,
    _model_kwargs,
    _accelerator,
    _launch,
)


def _warnings(sections: dict[str, Any]) -> Iterator[Any]:
    """Yield combinations that are legal but rarely meant."""
    train, run = sections.get("train", {}), sections.get("run", {})
    if (
        "num_train_epochs" in train
        and isinstance(train.get("max_steps"), int)
        and train["max_steps"] > 0
    ):
        yield (
            ("train", "max_steps"),
            "train.max_steps wins over train.num_train_epochs",
            "remove one of them",
        )
    if run.get("global_batch_size") and "gradient_accumulation_steps" in train:
        what = (
            "train.gradient_accumulation_steps is ignored: it is derived from run.global_batch_size"
        )
        yield ("train", "gradient_accumulation_steps"), what, "remove one of them"
    steps, warmup = train.get("max_steps"), train.get("warmup_steps")
    numbers = all(
        isinstance(number, int | float) and not isinstance(number, bool)
        for number in (steps, warmup)
    )
    if numbers and warmup >= steps > 0 and train.get("lr_scheduler_type") not in WITHOUT_WARMUP:
        what = (
            f"train.warmup_steps {warmup:g} is not less than train.max_steps {steps:g}:"
            " train.learning_rate is never reached"
        )
        yield (
            ("train", "warmup_steps"),
            what,
            "a number below 1 is a share of all steps: train.warmup_steps: 0.03",
        )


def _changed_scaling(document: Document) -> Iterator[RecipeError]:
    """Yield a warning where a rank was replaced and its lora_alpha was not: the update is scaled by
    lora_alpha / r.
    """
    lora = document.values.get("lora")
    before = document.replaced.get(("lora", "r"))
    if (
        not isinstance(lora, dict)
        or not before
        or document.origin(("lora", "r")).file == document.origin(("lora", "lora_alpha")).file
    ):
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
        same = was * rank**root
        yield document.error(
            ("lora", "r"), what, f"to change the rank alone: lora.lora_alpha={same:g}"
        )


def _run_name(document: Document) -> Iterator[PlacedError]:
    given = document.values.get("run", {})
    if not isinstance(given, dict) or not isinstance(
        given.get("name", ""), str
    ):  # reported already
        return
    try:
        run_name(document)
    except RecipeError as error:
        yield ("run", "name"), error
