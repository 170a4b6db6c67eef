"""What to say of a word of the command line that is no `section.key=value`."""

from __future__ import annotations

from recipes_lib.core.project import recipe_path

# Short names that other programs give to keys of `train`.
SHORT_NAMES = {
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "batch_size": "train.per_device_train_batch_size",
    "model_name_or_path": "model.name_or_path",
    "base_model": "model.name_or_path",
    "dataset": "data.source",
}
_EXAMPLE = "for example train.learning_rate=1e-4"


def hints_of_word(word: str) -> tuple[str, ...]:
    """Return what to type instead of a word that is no `section.key=value`."""
    name = word.lstrip("-").replace("-", "_")
    if name.startswith("resume"):
        return ("the same command resumes a run that was stopped",)
    if word.startswith("-"):
        key = SHORT_NAMES.get(name, f"train.{name}")
        return (f"keys of a recipe have no dashes and no spaces: {key}=VALUE",)
    if word in ("=", ":"):
        return (f"write it without spaces, {_EXAMPLE}",)
    if ":" in word:
        return (f"write it with =: {word.replace(':', '=', 1)}",)
    if recipe_path(word).is_file():
        return ("one recipe at a time; several are a study: recipes study --help",)
    return (f"write key and value in one word, {_EXAMPLE}",)
