"""The resolved values of every arm, and which of them can change a result."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.vocabulary import subschema
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.training.resume_guard import FREE_KEYS, flatten

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import Measurements

Values = Mapping[str, Any]
# They decide how the same mathematics is cut into pieces, or where a job runs: rounding aside, the
# result stays.
_CUT = (
    "train.activation_checkpointing",
    "train.gradient_checkpointing",
    "train.gradient_checkpointing_kwargs",
    "train.per_device_train_batch_size",
    "train.per_device_eval_batch_size",
    "train.gradient_accumulation_steps",
    "train.eval_accumulation_steps",
    "train.ddp_find_unused_parameters",
    "launch.accelerate",
    "launch.gpus",
    "launch.nodes",
)
EXAMPLES_PER_STEP = "launch.examples_per_step"
_TRAINED_DTYPE = "launch.trained_dtype"
_GLOBAL_BATCH, _SEED = "run.global_batch_size", "train.seed"
_OF_BATCH = (
    _GLOBAL_BATCH,
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "launch.world_size",
)
_LEFT_OUT = ("run.name", "run.notes", "run.tags")
_CHECKPOINT_CHOICE = (
    "train.eval_steps",
    "train.save_steps",
    "train.eval_strategy",
    "train.save_strategy",
    "train.eval_on_start",
)


def arm_values(study: Study | None, measurements: Measurements) -> dict[str, Values]:
    """Return the dotted values of every arm that a recipe is known of: as the study resolves it,
    else as its run recorded it.
    """
    values: dict[str, Values] = {}
    declared = {arm.name: arm for arm in study.arms} if study else {}
    for name in [*measurements.arms, *(arm for arm in declared if arm not in measurements.arms)]:
        if name in declared and declared[name].recipe is not None:
            values[name] = declared[name].resolved()
        elif name in measurements.arms and not measurements.arms[name].is_base:
            recorded = [run.resolved for run in measurements.arms[name].runs if run.resolved]
            if recorded:
                flat = flatten(dict(recorded[0]))
                world_size = (measurements.arms[name].runs[0].state.get("guard") or {}).get(
                    "launch.world_size"
                )
                if world_size is not None:
                    flat["launch.world_size"] = world_size
                seeds = sorted(
                    {run.seed for run in measurements.arms[name].runs if run.seed is not None}
                )
                if len(seeds) > 1:
                    flat["train.seed"] = seeds
                values[name] = {key: value for key, value in flat.items() if key not in _LEFT_OUT}
    return values


def pairs(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every two arms."""
    yield from itertools.combinations(values, 2)


def with_derived_values(first: Values, second: Values) -> tuple[Values, Values]:
    """Return the values of two arms with those that follow from several keys: examples per
    optimizer step, precision of trained weights.
    """
    pair = [dict(first), dict(second)]
    batches = [_examples_per_step(values) for values in pair]
    if None not in batches:
        for values, examples in zip(pair, batches, strict=True):
            values[EXAMPLES_PER_STEP] = examples
    # No recipe says it: under mixed precision accelerate's FSDP2 keeps float32 copies of
    # half-precision weights, and DDP does not.
    if all(values.get("lora", "adapter") is None for values in pair):
        for values in pair:
            values[_TRAINED_DTYPE] = _trained_dtype(values)
    return pair[0], pair[1]


def _examples_per_step(values: Values) -> int | None:
    """Examples per optimizer step; None where the number of processes is not known."""
    if values.get(_GLOBAL_BATCH) is not None:
        return int(values[_GLOBAL_BATCH])
    _, *factors = (effective(key, values) for key in _OF_BATCH)
    return math.prod(factors) if all(isinstance(factor, int) for factor in factors) else None


def _trained_dtype(values: Values) -> str:
    mixed = (
        values.get("launch.mixed_precision") in ("bf16", "fp16")
        or values.get("train.bf16")
        or values.get("train.fp16")
    )
    return (
        "float32"
        if values.get("launch.distributed_type") == "FSDP" and mixed
        else str(values.get("model.dtype"))
    )


def changed(study: Study | None, first: Values, second: Values) -> dict[str, str | None]:
    """Return what can have made a difference between two arms: every key that changes results and
    differs, with its factor.

    It is computed from values alone. The seed is left out, because it is chance and no cause. Empty
    means that both arms are trainings of one recipe; a key without a factor is a confound.
    """
    one, other = with_derived_values(first, second)
    keys = [
        key for key in differing(one, other) if key != _SEED and changes_result(key, one, other)
    ]
    return {key: declared_by(study, key, one, other) for key in keys}


def declared_by(study: Study | None, key: str, first: Values, second: Values) -> str | None:
    """Return the factor that declares a difference; of examples per step, one of those that declare
    every key behind it.
    """
    if study is None:
        return None
    if key != EXAMPLES_PER_STEP:
        return study.factor_of(key)
    whole = first.get(_GLOBAL_BATCH) is not None and second.get(_GLOBAL_BATCH) is not None
    sources = (
        [_GLOBAL_BATCH]
        if whole
        else [name for name in _OF_BATCH if effective(name, first) != effective(name, second)]
    )
    factors = [study.factor_of(name) for name in sources]
    return None if None in factors else factors[0]


def differing(first: Values, second: Values) -> list[str]:
    """Return the keys whose values differ; a key that is absent has its default."""
    return [
        key
        for key in dict.fromkeys([*first, *second])
        if effective(key, first) != effective(key, second)
    ]


def effective(key: str, values: Values) -> Any:
    """Return the value of a dotted key, its default where it is absent; None in a section that is
    absent as a whole.
    """
    section = key.partition(".")[0]
    if values.get(key) is not None or not any(name.startswith(f"{section}.") for name in values):
        return values.get(key)
    schema = subschema(*key.split("."))
    return schema.get("default") if schema else None


def changes_result(key: str, first: Values, second: Values) -> bool:
    """Whether a key can change what is learnt.

    How often is evaluated and saved changes nothing, unless the best checkpoint is chosen among
    those that were.
    """
    if key in _CHECKPOINT_CHOICE:
        return bool(
            first.get("train.load_best_model_at_end") or second.get("train.load_best_model_at_end")
        )
    section, _, name = key.partition(".")
    return key not in _CUT and not (section == "train" and FREE_KEYS.match(name))


def run_place(path: Path) -> str:
    """Return a file of a run as `runs/<run>/...`, wherever the runs lie."""
    root = runs_root().resolve()
    whole = path.resolve()
    return (
        f"runs/{whole.relative_to(root).as_posix()}"
        if whole.is_relative_to(root)
        else shown_path(path)
    )


def setting_text(value: Any) -> str:
    """Return a value as text of at most 60 characters."""
    text = (
        "absent"
        if value is None
        else "true"
        if value is True
        else "false"
        if value is False
        else str(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."
