"""What a recipe must change for the user's own rows, mostly fewer: split, batch, epochs."""

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


@dataclass
class Fitted:
    """Values that replace the origin's, and lines about what was changed and what was kept."""

    values: Values = field(default_factory=dict)  # by section, as in a recipe
    lines: list[str] = field(default_factory=list)

    def set(self, key: str, value: object, before: object) -> None:
        """Replace the value of a dotted key, and say so."""
        *sections, name = key.split(".")
        inner = self.values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
        self.lines.append(f"fitted {key}: {value_text(value)} (was {value_text(before)})")


def fit_to_rows(recipe: Recipe, num_rows: int, num_characters: int, chosen: Set[str]) -> Fitted:
    """Return what other rows change in a recipe.

    Args:
        recipe: that for the new rows, with the origin's values; its steps follow from its epochs.
        num_rows: of the new rows.
        num_characters: of the longest new row: there is no tokenizer yet.
        chosen: dotted keys that the user has set, which stay.
    """
    fitted = Fitted()
    train = recipe.train
    num_trained = _fit_split(recipe, num_rows, chosen, fitted)
    world_size = plan_launch(recipe.launch).world_size
    per_device = train.get("per_device_train_batch_size", 8)
    batch = per_device * world_size * accumulation_steps(recipe, world_size)
    epochs = train.get("num_train_epochs", 3)
    max_steps = train.get("max_steps", -1)
    if not chosen & {"run.global_batch_size", "train.per_device_train_batch_size"}:
        batch = _fit_batch(recipe, batch, num_trained, world_size, fitted)
    steps = planned_steps(num_trained, batch, epochs, max_steps)[1]
    if steps < _FEWEST_STEPS and epochs < _MOST_EPOCHS and "train.num_train_epochs" not in chosen:
        fitted.set("train.num_train_epochs", _MOST_EPOCHS, epochs)
        steps = planned_steps(num_trained, batch, _MOST_EPOCHS, max_steps)[1]
    logging_steps = train.get("logging_steps", 1)
    if logging_steps > steps / 5 and "train.logging_steps" not in chosen:
        fitted.set("train.logging_steps", 1, logging_steps)
    warmup = train.get("warmup_steps", 0)
    is_long = warmup >= 1 and warmup > steps / 10  # below 1 it is a share of the steps
    if is_long and "train.warmup_steps" not in chosen:
        fitted.set("train.warmup_steps", 0.1, warmup)
    summary = f"{num_rows:,} rows, about {num_trained:,} of them train: {steps:,} steps"
    fitted.lines.insert(0, f"{summary} of {batch} examples")
    if steps < _FEWEST_STEPS:
        fitted.lines.append(f"{steps} steps are few: more rows, or more epochs, teach more")

    # what cannot be derived from the rows
    if "learning_rate" in train and "train.learning_rate" not in chosen:
        rate = f"kept train.learning_rate: {value_text(train['learning_rate'])}"
        fitted.lines.append(f"{rate}, chosen for other rows and steps; try others")
    max_length = train.get("max_length", MAX_LENGTH)
    num_tokens = num_characters // _CHARACTERS_PER_TOKEN
    if max_length is not None and num_tokens > max_length and "train.max_length" not in chosen:
        longest = f"the longest row has about {num_tokens:,} tokens, the rest is cut"
        fitted.lines.append(f"kept train.max_length: {max_length}; {longest}")
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
            fitted.set(f"data.split.{name}", _HELD_OUT, share)
        num_held_out = round(num_rows * shares[name])
        if share and num_held_out < _FEWEST_HELD_OUT:
            few = f"about {num_held_out} rows are few for data.split.{name}"
            fitted.lines.append(f"{few}: differences of its loss may be chance")
    return max(round(num_rows * (1 - shares["validation"] - shares["test"])), 1)


def _fit_batch(
    recipe: Recipe, before: int, num_trained: int, world_size: int, fitted: Fitted
) -> int:
    """Halve the batch, and a device's share of it, until the training has some steps; return it."""
    epochs = recipe.train.get("num_train_epochs", 3)
    smallest = max(_SMALLEST_BATCH, world_size)
    batch = before
    while batch > smallest or batch > num_trained:
        is_enough = planned_steps(num_trained, batch, epochs)[1] >= _FEWEST_STEPS
        half = max(batch // 2 // world_size, 1) * world_size
        if (is_enough and batch <= num_trained) or half == batch:
            break
        batch = half
    if batch == before:
        return batch
    per_device = recipe.train.get("per_device_train_batch_size", 8)
    if batch % (per_device * world_size):
        fitted.set("train.per_device_train_batch_size", batch // world_size, per_device)
        per_device = batch // world_size
    if recipe.run.global_batch_size is not None:
        fitted.set("run.global_batch_size", batch, before)
    elif "gradient_accumulation_steps" in recipe.train:
        accumulation = recipe.train["gradient_accumulation_steps"]
        new_accumulation = batch // (per_device * world_size)
        fitted.set("train.gradient_accumulation_steps", new_accumulation, accumulation)
    return batch
