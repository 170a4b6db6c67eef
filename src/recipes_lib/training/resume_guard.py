"""Whether a run may be continued: everything that changes its result must be as it was when the run
began.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import (
    DataSection,
    ModelSection,
    RunSection,
)
from recipes_lib.core.errors import RecipeError

# Keys of `train` that may change between attempts: they decide what is written, shown or sent, not
# what is learnt. `eval_steps` is not among them: an evaluation draws from the random state that
# dropout uses; nor is `dataloader_persistent_workers`: other loaders do too.
FREE_KEYS = re.compile(
    r"^(logging_.*|log_.*|report_to|project|run_name|save_.*|push_to_hub|hub_.*|disable_tqdm|dataloader_num_workers|dataloader_prefetch_factor|"
    r"dataloader_pin_memory|dataset_num_proc|skip_memory_metrics|include_.*|restore_callback_states_from_checkpoint|trackio_.*)$"
)


def guarded_values(
    recipe: Recipe,
    data_fingerprint: str,
    world_size: int,
    distribution: str,
    versions: dict[str, str | None],
) -> dict[str, object]:
    """Return every value that a resumed run must share with its beginning, by dotted key."""
    surroundings = {
        "launch": {"world_size": world_size, "distribution": distribution},
        "version": dict(versions),
    }
    return {**_recipe_values(recipe), "data_fingerprint": data_fingerprint, **flatten(surroundings)}


def recipe_differences(
    recipe: Recipe, before: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """Return what the recipe itself would change of a run's guarded values, before any data is
    read.
    """
    elsewhere = re.compile(
        r"^(launch\.|version\.|data_fingerprint$|prompt_format_hash$|training_template_hash$)"
    )
    return differences(
        {key: value for key, value in before.items() if not elsewhere.match(key)},
        _recipe_values(recipe),
    )


def _recipe_values(recipe: Recipe) -> dict[str, object]:
    sections = recipe.to_dict()
    # The date is the run's own, and part of `prompt_format_hash`.
    sections["data"].pop("template_date", None)
    relevant: dict[str, object] = {
        name: sections.get(name) for name in ("model", "quantization", "lora", "data")
    }
    relevant["train"] = {
        key: value for key, value in recipe.train.items() if not FREE_KEYS.match(key)
    }
    relevant["run"] = {
        key: getattr(recipe.run, key) for key in ("global_batch_size", "max_tokens_per_micro_batch")
    }
    return flatten(relevant)


@functools.cache
def _defaults() -> dict[str, object]:
    # what has no default is in every record
    model, data = ModelSection(name_or_path=""), DataSection(source="")
    ours = {"model": dataclasses.asdict(model), "data": dataclasses.asdict(data)}
    return flatten({**ours, "run": dataclasses.asdict(RunSection())})


def flatten(value: Any, prefix: str = "") -> dict[str, object]:
    """Return nested mappings as one mapping with dotted keys.

    Example:
        >>> flatten({"a": {"b": 1, "c": {}}, "d": None})
        {'a.b': 1, 'd': None}
    """
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(
    before: Mapping[str, object], now: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """Return {key: (before, now)} of the keys that differ; a key missing on one side counts as
    None, and in `before` as our default: an earlier release did not have the key.
    """
    before = {key: value for key, value in _defaults().items() if key in now} | dict(before)
    keys = sorted(before.keys() | now.keys())
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def check_resume(
    name: str, before: Mapping[str, object], now: Mapping[str, object], anyway: bool
) -> dict[str, list[object]]:
    """Return what differs, as {key: [before, now]}, once continuing is allowed.

    Raises:
        RecipeError: something that changes the result differs and `anyway` is false; the message is
            a table of it.
    """
    changed = differences(before, now)
    if changed and not anyway:
        width = max(map(len, changed))
        table = [
            f"{key:<{width}}  {_shown(old)} -> {_shown(new)}" for key, (old, new) in changed.items()
        ]
        raise RecipeError(
            f"run '{name}' was begun with other settings, so resuming would mix two recipes",
            *table,
            "start a new run with run.name=OTHER, restore the settings, or insist with"
            " --resume-anyway (recorded in run.json)",
        )
    return {key: [old, new] for key, (old, new) in changed.items()}


def _shown(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
