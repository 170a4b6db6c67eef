"""What a recipe for other rows must change when they are the user's own, which are mostly fewer:
a share held out, the batch, the epochs. What cannot be derived is kept, and said.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from recipes_lib.config.documents import Values, value_text
from recipes_lib.config.launch import plan_launch, planned_steps
from recipes_lib.config.recipe import MAX_LENGTH, Recipe, accumulation_steps

# Fewer rows than these tell nothing about a loss; a tenth is what is held out by default.
_FEWEST_HELD_OUT = 20
_HELD_OUT = 0.1
# A schedule needs some steps. Batches below 8 are noisy, and above 3 epochs small data is learnt
# by heart.
_FEWEST_STEPS = 50
_SMALLEST_BATCH = 8
_MOST_EPOCHS = 3
# Characters of a token, at least, in most languages that are written with spaces.
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class UserRows:
    """What is known of the user's own rows, before a tokenizer is there."""

    num_rows: int
    num_characters: int  # of the longest row


@dataclass
class Fitted:
    """Values that replace the origin's, and lines about what was changed and what was kept."""

    data: Values = field(default_factory=dict)
    train: Values = field(default_factory=dict)
    run: Values = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def set(self, section: str, key: str, value: object, before: object) -> None:
        """Replace a value, and say so."""
        getattr(self, section)[key] = value
        self.lines.append(f"fitted {section}.{key}: {value_text(value)} (was {value_text(before)})")


def fit_to_rows(recipe: Recipe, rows: UserRows, chosen: Set[str]) -> Fitted:
    """Return what other rows change in a recipe.

    Args:
        recipe: that for the new rows, with the origin's values; its steps follow from its epochs.
        rows: the new rows.
        chosen: dotted keys that the user has set, which stay.
    """
    fitted = Fitted()
    num_trained = _fit_split(recipe, rows.num_rows, chosen, fitted)
    world_size = plan_launch(recipe.launch).world_size
    per_device = recipe.train.get("per_device_train_batch_size", 8)
    batch = per_device * world_size * accumulation_steps(recipe, world_size)
    epochs = recipe.train.get("num_train_epochs", 3)
    max_steps = recipe.train.get("max_steps", -1)
    new_batch = batch
    if not chosen & {"run.global_batch_size", "train.per_device_train_batch_size"}:
        new_batch = _batch_for(num_trained, epochs, batch, world_size)
        _fit_batch(recipe, new_batch, world_size, fitted)
    steps = planned_steps(num_trained, new_batch, epochs, max_steps)[1]
    if steps < _FEWEST_STEPS and epochs < _MOST_EPOCHS and "train.num_train_epochs" not in chosen:
        fitted.set("train", "num_train_epochs", _MOST_EPOCHS, epochs)
        epochs = _MOST_EPOCHS
        steps = planned_steps(num_trained, new_batch, epochs, max_steps)[1]
    _fit_steps(recipe, steps, chosen, fitted)
    summary = f"{rows.num_rows:,} rows, about {num_trained:,} of them train: {steps:,} steps"
    fitted.lines.insert(0, f"{summary} of {new_batch} examples")
    if steps < _FEWEST_STEPS:
        fitted.lines.append(f"{steps} steps are few: more rows, or more epochs, teach more")
    _say_kept(recipe, rows, chosen, fitted)
    return fitted


def _fit_split(recipe: Recipe, num_rows: int, chosen: Set[str], fitted: Fitted) -> int:
    """Hold out enough rows to tell something; return about how many train."""
    split = recipe.data.split
    if split.method == "none":
        return num_rows
    shares = {"validation": split.validation, "test": split.test}
    for name, share in shares.items():
        is_chosen = bool(chosen & {"data.split", f"data.split.{name}"})
        if share and not is_chosen and num_rows * share < _FEWEST_HELD_OUT and share < _HELD_OUT:
            shares[name] = _HELD_OUT
            fitted.data.setdefault("split", {})[name] = _HELD_OUT
            fitted.lines.append(f"fitted data.split.{name}: {_HELD_OUT} (was {share})")
        num_held_out = round(num_rows * shares[name])
        if share and num_held_out < _FEWEST_HELD_OUT:
            few = f"about {num_held_out} rows are few for data.split.{name}"
            fitted.lines.append(f"{few}: differences of its loss may be chance")
    return max(round(num_rows * (1 - shares["validation"] - shares["test"])), 1)


def _batch_for(num_trained: int, epochs: float, batch: int, world_size: int) -> int:
    """Return the batch, halved until the training has some steps."""
    smallest = max(_SMALLEST_BATCH, world_size)
    while batch > smallest or batch > num_trained:
        is_enough = planned_steps(num_trained, batch, epochs)[1] >= _FEWEST_STEPS
        half = max(batch // 2 // world_size, 1) * world_size
        if (is_enough and batch <= num_trained) or half == batch:
            break
        batch = half
    return batch


def _fit_batch(recipe: Recipe, batch: int, world_size: int, fitted: Fitted) -> None:
    """Set a smaller batch, and with it what each device takes at a time."""
    per_device = recipe.train.get("per_device_train_batch_size", 8)
    before = per_device * world_size * accumulation_steps(recipe, world_size)
    if batch == before:
        return
    if batch % (per_device * world_size):
        new_per_device = batch // world_size
        fitted.set("train", "per_device_train_batch_size", new_per_device, per_device)
        per_device = new_per_device
    if recipe.run.global_batch_size is not None:
        fitted.set("run", "global_batch_size", batch, before)
    elif "gradient_accumulation_steps" in recipe.train:
        accumulation = batch // (per_device * world_size)
        key = "gradient_accumulation_steps"
        fitted.set("train", key, accumulation, recipe.train[key])


def _fit_steps(recipe: Recipe, steps: int, chosen: Set[str], fitted: Fitted) -> None:
    """Fit what is counted in steps."""
    logging_steps = recipe.train.get("logging_steps", 1)
    if logging_steps > steps / 5 and "train.logging_steps" not in chosen:
        fitted.set("train", "logging_steps", 1, logging_steps)
    warmup = recipe.train.get("warmup_steps", 0)
    is_long = warmup >= 1 and warmup > steps / 10  # below 1 it is a share of the steps
    if is_long and "train.warmup_steps" not in chosen:
        fitted.set("train", "warmup_steps", 0.1, warmup)


def _say_kept(recipe: Recipe, rows: UserRows, chosen: Set[str], fitted: Fitted) -> None:
    """Say which values stay although they were chosen for other rows."""
    key = "train.learning_rate"
    if "learning_rate" in recipe.train and key not in chosen:
        rate = value_text(recipe.train["learning_rate"])
        fitted.lines.append(f"kept {key}: {rate}, chosen for other rows and steps; try others")
    max_length = recipe.train.get("max_length", MAX_LENGTH)
    num_tokens = rows.num_characters // _CHARACTERS_PER_TOKEN
    if max_length is not None and num_tokens > max_length and "train.max_length" not in chosen:
        longest = f"the longest row has about {num_tokens:,} tokens, the rest is cut"
        fitted.lines.append(f"kept train.max_length: {max_length}; {longest}")
