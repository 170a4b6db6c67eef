"""What a result depends on, as hashes: the settings, the model, the opponent, the judge.

A study asks with them whether a result is there. Needs no torch. Nothing about speed, addresses or
where files lie is part of a key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.files import (
    file_hash,
    folder_fingerprint,
    hash_of,
    model_fingerprint,
    object_or_none,
)
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.weights.load import model_path

CODE_VERSION = 1  # raised when a change of the code changes results
_ONLY_SPEED = (
    "engine",
    "batch_tokens",
    "base_url",
    "api_key_variable",
    "concurrency",
    "timeout_s",
    "max_retries",
    "max_consecutive_failures",
    "served_name",
    "trust_remote_code",
)


def settings_key(recipe: EvalRecipe) -> str:
    """Return the hash of an eval recipe's settings, and of the files that it names, as far as they
    decide a result.
    """
    values = recipe.to_dict()
    for section in ("generation", "judge"):
        for name in _ONLY_SPEED:
            values.get(section, {}).pop(name, None)
    for name in ("against", "probe_pairs"):
        values["metrics"].pop(name)
    values.pop("thresholds", None)
    names = ("questions", "references", "labels")
    files = [recipe.path_of(f"data.{name}") for name in names if getattr(recipe.data, name)]
    files += sorted(Path(recipe.data.include_path).rglob("*")) if recipe.data.include_path else []
    files += recipe.judge.texts().values() if recipe.judge else []
    return hash_of(values, [file_hash(file) for file in files if file.is_file()], CODE_VERSION)


def model_key(recipe: Recipe, weights: Path | None) -> str:
    """Return the hash of what answers: a base, or a run of it.

    Args:
        recipe: how the base is loaded.
        weights: the run's adapter, or its whole model; None for the base alone.

    Raises:
        RecipesError: the base is not on this machine.
    """
    precision = [recipe.model.dtype, recipe.quantization]
    if weights is not None and recipe.lora is None:
        return hash_of(folder_fingerprint(weights), precision)
    base = model_fingerprint(model_path(recipe.model), recipe.model.revision)
    return hash_of(base, precision, folder_fingerprint(weights) if weights else None)


def result_key(settings: str, *parts: Any) -> str:
    """Return the key of a result: its settings, and the hashes of who answered and who judged."""
    return hash_of(settings, *parts)


def is_current(
    file: Path, recipe: EvalRecipe, model: str | None = None, opponent: str | None = None
) -> bool:
    """Whether a result file is there, of these settings and weights. No weights are loaded.

    Args:
        file: result.json (`log.log_file`).
        model: `model_key` of who answered; None for whoever it was.
        opponent: the same of the opponent.
    """
    stored = object_or_none(file) or {}
    if not stored or stored.get("settings") != settings_key(recipe):
        return False
    if recipe.generation.engine == "openai":
        return True  # what a server answers with is known by its name
    for section, wanted in (("answers", model), ("opponent", opponent)):
        found = (stored.get(section) or {}).get("fingerprint")
        if wanted is not None and found != wanted:
            return False
    return True
