"""What the checks look at: a study, its measurements, the values of every arm, and which of them
can change a result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes_lib.compare.design import OF_RUN, TUNE, TUNED, Study
from recipes_lib.compare.measurements import ArmMeasurements, Measurements
from recipes_lib.config.vocabulary import subschema
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.eval_log import EvalLog
from recipes_lib.training.resume_guard import FREE_KEYS, FREE_WITHOUT_CHOICE, flatten

Values = Mapping[str, Any]  # by dotted key
# They decide how the same mathematics is cut into pieces, or where a job runs: rounding aside, the
# result stays.
_CUT = (
    "train.activation_checkpointing",
    "train.activation_checkpointing_kwargs",
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
_GLOBAL_BATCH, SEED = "run.global_batch_size", "train.seed"
_BEST = "train.load_best_model_at_end"
_OF_BATCH = (
    _GLOBAL_BATCH,
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "launch.world_size",
)
_CHECKPOINT_CHOICE = ("eval_steps", "save_steps", "eval_strategy", "save_strategy", "eval_on_start")


@dataclass(frozen=True)
class Case:
    """What is checked. `study` is None for `recipes compare`, which declares no factor."""

    study: Study | None
    measurements: Measurements

    @cached_property
    def arms(self) -> dict[str, ArmMeasurements]:
        """The arms that have a run."""
        return {name: arm for name, arm in self.measurements.arms.items() if arm.runs}

    @cached_property
    def trained(self) -> dict[str, ArmMeasurements]:
        """The arms that have a training."""
        return {name: arm for name, arm in self.arms.items() if not arm.is_base}

    @cached_property
    def logs(self) -> list[tuple[str, EvalLog]]:
        """Every evaluation with its arm."""
        return [(name, log) for name, arm in self.arms.items() for log in arm.logs]

    @cached_property
    def values(self) -> dict[str, Values]:
        """The values of every arm that a recipe is known of: as the study resolves it, else as its
        run recorded it.
        """
        declared = {
            arm.name: arm.resolved()
            for arm in (self.study.arms if self.study else ())
            if arm.recipe is not None
        }
        recorded = {
            name: values
            for name, arm in self.trained.items()
            if name not in declared and (values := _recorded(arm))
        }
        both = recorded | declared
        return {name: both[name] for name in [*self.measurements.arms, *declared] if name in both}

    def declares(self, *keys: str) -> bool:
        """Whether a factor may change one of these keys, or an arm is tuned by one."""
        if self.study is None:
            return False
        tuned = {arm.tuning.key for arm in self.study.arms if arm.tuning}
        return bool(tuned & {*keys}) or any(map(self.study.factor_of, keys))


def _recorded(arm: ArmMeasurements) -> Values | None:
    resolved = [run.resolved for run in arm.runs if run.resolved]
    if not resolved:
        return None
    flat = flatten(dict(resolved[0]))
    world_size = (arm.runs[0].state.get("guard") or {}).get("launch.world_size")
    if world_size is not None:
        flat["launch.world_size"] = world_size
    seeds = sorted({run.seed for run in arm.runs if run.seed is not None})
    if len(seeds) > 1:
        flat[SEED] = seeds
    return {key: value for key, value in flat.items() if key not in OF_RUN}


def pairs(values: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield every two arms."""
    yield from itertools.combinations(values, 2)


def with_derived_values(first: Values, second: Values) -> tuple[Values, Values]:
    """Return the values of two arms with those that follow from several keys."""
    pair = [dict(first), dict(second)]
    batches = [_examples_per_step(values) for values in pair]
    if None not in batches:
        for values, examples in zip(pair, batches, strict=True):
            values[EXAMPLES_PER_STEP] = examples
    # No recipe says it: under mixed precision accelerate's FSDP2 keeps float32 copies of
    # half-precision weights, and DDP does not.
    if all(values.get("lora", "adapter") is None for values in pair):
        for values in pair:
            mixed = (
                values.get("launch.mixed_precision") in ("bf16", "fp16")
                or values.get("train.bf16")
                or values.get("train.fp16")
            )
            sharded = values.get("launch.distributed_type") == "FSDP" and mixed
            values[_TRAINED_DTYPE] = "float32" if sharded else str(values.get("model.dtype"))
    return pair[0], pair[1]


def _examples_per_step(values: Values) -> int | None:
    """Examples per optimizer step; None where the number of processes is not known."""
    if values.get(_GLOBAL_BATCH) is not None:
        return int(values[_GLOBAL_BATCH])
    factors = [effective(key, values) for key in _OF_BATCH[1:]]
    return math.prod(factors) if all(isinstance(factor, int) for factor in factors) else None


def changed(
    study: Study | None, first: Values, second: Values, of_results: bool = True
) -> dict[str, str | None]:
    """Return what can have made a difference between two arms: every key that changes results and
    differs, with its factor; of what a training takes also those that change its time alone.

    The seed is left out, because it is chance and no cause. Empty means that both arms are
    trainings of one recipe; a key without a factor is a confound.
    """
    one, other = with_derived_values(first, second)
    return {
        key: declared_by(study, key, one, other)
        for key in differing(one, other)
        if key != SEED
        and (changes_result(key, one, other) or not (of_results or _changes_no_time(key)))
    }


def declared_by(study: Study | None, key: str, first: Values, second: Values) -> str | None:
    """Return the factor that declares a difference, TUNED where each arm has its best value of one
    grid; of examples per step, one of those that declare every key behind it.
    """
    if study is None:
        return None
    if key != EXAMPLES_PER_STEP:
        return study.factor_of(key) or (TUNED if key in tuned_alike(first, second) else None)
    whole = first.get(_GLOBAL_BATCH) is not None and second.get(_GLOBAL_BATCH) is not None
    sources = [
        name
        for name in (_OF_BATCH[:1] if whole else _OF_BATCH)
        if whole or effective(name, first) != effective(name, second)
    ]
    factors = [declared_by(study, name, first, second) for name in sources]
    return None if None in factors else factors[0]


def tuned_alike(first: Values, second: Values) -> dict[str, list[Any]]:
    """Return the grid of each key that was tuned in both arms over the same values."""
    grids = {name: grid for name, grid in first.items() if name.startswith(TUNE)}
    return {
        name.removeprefix(TUNE): grid for name, grid in grids.items() if second.get(name) == grid
    }


def differing(first: Values, second: Values) -> list[str]:
    """Return the keys whose values differ; a key that is absent has its default."""
    return [
        key
        for key in dict.fromkeys([*first, *second])
        if effective(key, first) != effective(key, second)
    ]


def told_apart(first: Values, second: Values) -> list[str]:
    """Return the keys that both have, with other values."""
    return [key for key in first if key in second and first[key] != second[key]]


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
    section, _, name = key.partition(".")
    if section == "train" and name in _CHECKPOINT_CHOICE:
        return bool(first.get(_BEST) or second.get(_BEST))
    free = FREE_KEYS.match(name) or FREE_WITHOUT_CHOICE.match(name)
    return key not in _CUT and not (section == "train" and free)


def _changes_no_time(key: str) -> bool:
    """Whether a key that changes no result leaves the time of a step alone too."""
    section, _, name = key.partition(".")
    free = FREE_KEYS.match(name) or FREE_WITHOUT_CHOICE.match(name)
    free_in_time = free and not name.startswith("dataloader")
    return section == "train" and bool(free_in_time or name in _CHECKPOINT_CHOICE)


def metrics_of(logs: Iterable[EvalLog]) -> tuple[str, ...]:
    """Return the names of all metrics of some evaluations."""
    return tuple(dict.fromkeys(measure.name for log in logs for measure in log.measures))


def evals_of(logs: Iterable[EvalLog]) -> tuple[str, ...]:
    """Return the names of some evaluations, each once."""
    return tuple(dict.fromkeys(log.eval for log in logs))


def run_place(path: Path) -> str:
    """Return a file of a run as `runs/<run>/...`, wherever the runs lie."""
    root, whole = runs_root().resolve(), path.resolve()
    inside = whole.is_relative_to(root)
    return f"runs/{whole.relative_to(root).as_posix()}" if inside else shown_path(path)


def settings_differ(
    keys: Iterable[str], arms: tuple[str, ...], one: Values, other: Values
) -> list[str]:
    """Return a line for each of these keys with its values in two arms."""
    first, second = arms
    return [
        f"{key}: {first} {setting_text(one.get(key))}, {second} {setting_text(other.get(key))}"
        for key in keys
    ]


def setting_text(value: Any) -> str:
    """Return a value as text of at most 60 characters."""
    words = {None: "absent", True: "true", False: "false"}
    named = value is None or isinstance(value, bool)
    text = words[value] if named else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
