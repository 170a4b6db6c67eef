"""Whether a run may be continued: from a checkpoint that is whole, and with everything that changes
its result as it began.

A checkpoint is whole when COMPLETE.json in it, written last, lists every file with its size (and
its sha256 up to 1 GB), and the files are still those.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import file_hash, object_or_none, sync, sync_tree, write_json

MARKER = "COMPLETE.json"
HASHED_UP_TO = 10**9  # bytes: all GPUs wait for the hashes, 1.4 s for each GB
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
# Raised when the same values train other weights, not for a new key. 3: an epoch is evaluated and
# saved at the end of its last step.
TRAINING_PROTOCOL = 3


def mark_complete(checkpoint: Path, **facts: Any) -> None:
    """Flush every file of a checkpoint to the disk, then write its marker with these facts."""
    sizes: dict[str, int] = {}
    hashes: dict[str, str] = {}
    for path in sorted(checkpoint.rglob("*")):
        if not path.is_file() or path.name == MARKER:
            continue
        name = str(path.relative_to(checkpoint))
        sizes[name] = path.stat().st_size
        if sizes[name] <= HASHED_UP_TO:
            hashes[name] = file_hash(path)
    sync_tree(checkpoint)
    write_json(checkpoint / MARKER, {**facts, "files": sizes, "sha256": hashes})
    sync(checkpoint.parent)


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's marker; empty for one that is missing or damaged."""
    return object_or_none(checkpoint / MARKER) or {}


def what_is_wrong(checkpoint: Path, hashes: bool = False) -> str | None:
    """Return why a checkpoint cannot be used, by sizes or hashes too; None for a whole one."""
    marker = read_marker(checkpoint)
    sizes = marker.get("files")
    recorded = marker.get("sha256")
    if not (isinstance(sizes, dict) and isinstance(recorded, dict)):
        return f"no complete {MARKER}: the save was interrupted"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or does not have its {size:,} bytes"
    if not hashes:
        return None
    changed = [name for name in recorded if file_hash(checkpoint / name) != recorded[name]]
    if changed:
        return f"{', '.join(changed)} changed after the checkpoint was written (sha256 differs)"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest step first."""
    by_step = {}
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if path.is_dir() and step.isdecimal():
            by_step[int(step)] = path
    return [by_step[step] for step in sorted(by_step)]


def find_newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest whole checkpoint, and why others cannot be used; change nothing."""
    whole: Path | None = None
    broken: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(folder)):
        reason = what_is_wrong(checkpoint, hashes=whole is None)
        if reason is not None:
            broken[checkpoint] = reason
        elif whole is None:
            whole = checkpoint
    return whole, broken


def rotate(folder: Path, keep: int | None, best: str | None) -> None:
    """Delete the oldest complete checkpoints beyond `keep`, never the newest or the best one."""
    if keep is None:
        return
    complete = [path for path in list_checkpoints(folder) if what_is_wrong(path) is None]
    for checkpoint in complete[: -max(keep, 1)]:
        if best is None or checkpoint.resolve() != Path(best).resolve():
            # first, so that a crash in the next line leaves no checkpoint that looks whole
            (checkpoint / MARKER).unlink()
            shutil.rmtree(checkpoint)


def set_aside(folder: Path, ending: str) -> Path:
    """Rename a folder to its name with `ending` (and a number); return the new path."""
    aside = folder.with_name(f"{folder.name}{ending}")
    number = 2
    while aside.exists():
        aside = folder.with_name(f"{folder.name}{ending}-{number}")
        number += 1
    return folder.rename(aside)


def guarded_values(
    recipe: Recipe,
    data_fingerprint: str,
    world_size: int,
    distribution: str,
    versions: Mapping[str, str | None],
) -> dict[str, object]:
    """Return what a resumed run must share with its beginning and is there before the tokenizer is
    read, by dotted key; `train.py` adds the rest. A key that begins with the name of a recipe's
    section is the recipe's own (`recipe_differences`): name what comes from elsewhere otherwise.
    """
    values = _recipe_values(recipe)
    values["data_fingerprint"] = data_fingerprint
    values["launch.world_size"] = world_size
    values["launch.distribution"] = distribution
    values |= flatten({"version": {**versions, "training": TRAINING_PROTOCOL}})
    return values


def recipe_differences(
    recipe: Recipe, before: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """Return what the recipe itself would change of a run's guarded values; reads no data."""
    sections = ("stage", "model", "quantization", "lora", "data", "train", "run")
    of_recipe = {key: before[key] for key in before if key.partition(".")[0] in sections}
    return differences(of_recipe, _recipe_values(recipe))


def _recipe_values(recipe: Recipe) -> dict[str, object]:
    sections = recipe.to_dict()
    # The date is the run's own, and part of `prompt_format_hash`.
    sections["data"].pop("template_date", None)
    schedule = recipe.train.get("lr_scheduler_type")
    keeps_best = recipe.train.get("load_best_model_at_end")
    validation_chooses = keeps_best or schedule in CHOOSING_SCHEDULES
    sections["train"] = {}
    for key, value in recipe.train.items():
        is_free = FREE_KEYS.match(key)
        if not validation_chooses:
            is_free = is_free or FREE_WITHOUT_CHOICE.match(key)
        if not is_free:
            sections["train"][key] = value
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
    """Return {key: (before, now)} of the keys that differ; one that is missing counts as None, so a
    key that is new in this version refuses the runs before it: CHANGELOG.md says so.
    """
    changed = {}
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            changed[key] = (before.get(key), now.get(key))
    return changed


def refuse_changes(name: str, changed: Mapping[str, tuple[object, object]]) -> None:
    """Refuse to resume a run with other settings than it was begun with, in a table of them."""
    width = max(len(key) for key in changed)
    table = [f"{key:<{width}}  {old} -> {new}" for key, (old, new) in changed.items()]
    raise RecipeError(
        f"run '{name}' was started with other settings, so resuming would mix two recipes",
        *table,
        "start a new run with run.name=OTHER, restore the settings, or force it with"
        " --resume-anyway (recorded in run.json; not with another launch)",
    )
