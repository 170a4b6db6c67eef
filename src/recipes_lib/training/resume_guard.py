"""Whether a run may be continued: everything that changes its result must be as it began."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipeError

# Keys of `train` that may change between attempts: they decide what is written, shown or sent, not
# what is learnt.
FREE_KEYS = re.compile(
    r"^(logging_.*|log_.*|report_to|project|disable_tqdm|dataset_num_proc|skip_memory_metrics|"
    r"dataloader_(num_workers|prefetch_factor|pin_memory|persistent_workers)|include_.*|"
    r"restore_callback_states_from_checkpoint|trackio_.*)$"
)
# So may these, unless a validation chooses the weights or the learning rate.
FREE_WITHOUT_CHOICE = re.compile(r"^(save_.*|eval_.*|per_device_eval_batch_size)$")
CHOOSING_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
TRAINING_PROTOCOL = 2  # whole global batches, and a probe before each process's first step


def guarded_values(
    recipe: Recipe,
    data_fingerprint: str,
    world_size: int,
    distribution: str,
    versions: Mapping[str, str | None],
) -> dict[str, object]:
    """Return every value that a resumed run must share with its beginning, by dotted key."""
    launch = {"world_size": world_size, "distribution": distribution}
    around = {"launch": launch, "version": {**versions, "training": TRAINING_PROTOCOL}}
    return {**_recipe_values(recipe), "data_fingerprint": data_fingerprint, **flatten(around)}


def recipe_differences(
    recipe: Recipe, before: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """Return what the recipe itself would change of a run's guarded values; reads no data."""
    sections = ("model", "quantization", "lora", "data", "train", "run")
    own = {key: value for key, value in before.items() if key.partition(".")[0] in sections}
    return differences(own, _recipe_values(recipe))


def _recipe_values(recipe: Recipe) -> dict[str, object]:
    sections, train = recipe.to_dict(), recipe.train
    # The date is the run's own, and part of `prompt_format_hash`.
    sections["data"].pop("template_date", None)
    chooses = train.get("load_best_model_at_end")
    chooses = chooses or train.get("lr_scheduler_type") in CHOOSING_SCHEDULES
    sections["train"] = {
        key: value
        for key, value in train.items()
        if not FREE_KEYS.match(key) and (chooses or not FREE_WITHOUT_CHOICE.match(key))
    }
    sections["run"] = {"global_batch_size": recipe.run.global_batch_size}
    del sections["launch"]
    return flatten(sections)


def flatten(value: Any, prefix: str = "") -> dict[str, object]:
    """Return nested mappings as one with dotted keys: {"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(
    before: Mapping[str, object], now: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """Return {key: (before, now)} of the keys that differ; one that is missing counts as None."""
    keys = sorted(before.keys() | now.keys())
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def refuse_changes(name: str, changed: Mapping[str, tuple[object, object]]) -> None:
    """Refuse to resume a run with other settings than it was begun with, in a table of them."""
    width = max(map(len, changed))
    table = [f"{key:<{width}}  {old} -> {new}" for key, (old, new) in changed.items()]
    raise RecipeError(
        f"run '{name}' was begun with other settings, so resuming would mix two recipes",
        *table,
        "start a new run with run.name=OTHER, restore the settings, or insist with"
        " --resume-anyway (recorded in run.json)",
    )
