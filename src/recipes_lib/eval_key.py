"""What a result depends on, as one hash: the model, the questions, how they are asked, the
judge and its prompts. A result whose `key` is this hash is the result that would be made again.

Needs no torch. Nothing about speed, addresses or where files lie is part of a key.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.atomic_files import file_hash
from recipes_lib.core.fingerprints import (
    digest_of,
    folder_fingerprint,
    hash_of,
    model_fingerprint,
)
from recipes_lib.eval_recipe import EvalRecipe
from recipes_lib.judging.prometheus import PROMETHEUS_PACKAGE, REQUIREMENT
from recipes_lib.weights.base import fingerprint, model_path

# Raised when a change of the code changes results.
_CODE = 1
# Keys of an eval recipe that change how fast an evaluation is, and no result.
_ONLY_SPEED = {
    *("batch_tokens", "concurrency", "timeout_s", "max_retries", "max_consecutive_failures"),
    *("base_url", "api_key_variable"),
}
_TEXTS = ("relative_prompt", "absolute_prompt", "rubric", "reference_rubric")


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


def result_key(recipe: EvalRecipe, model: str | None, opponent: str | None = None) -> str:
    """Return the key of a model's result.

    Args:
        model: hash of what answered.
        opponent: hash of the model it was compared with; None for the eval's own references.
    """
    values: dict[str, object] = {
        "code": _CODE,
        "model": model,
        "opponent": opponent,
        "suite": asdict(recipe.suite),
        "generation": _without(asdict(recipe.generation), _ONLY_SPEED),
        "metrics": _without(asdict(recipe.metrics), {"against", "probe_pairs"}),
        "max_questions": recipe.data.max_questions,
    }
    tasks = "include_path" if recipe.data.include_path else "folder"
    for name in ("questions", "references", "labels", tasks):
        if word := getattr(recipe.data, name):
            values[name] = _content(recipe.resolve(f"data.{name}", word)) or word
    if recipe.judge is not None:
        judge, texts = recipe.judge.judge, recipe.judge.texts()
        values["judge"] = _without(asdict(judge), {*_ONLY_SPEED, *_TEXTS})
        values["thresholds"] = asdict(recipe.judge.thresholds)
        for name, path in texts.items():
            packaged = getattr(judge, name) == PROMETHEUS_PACKAGE
            values[name] = REQUIREMENT if packaged else _content(path)
        weights = Path(judge.model)
        if judge.engine == "transformers" and any(weights.glob("*.safetensors")):
            values["judge_weights"] = fingerprint(weights)
    return digest_of(values)


def _without(values: dict[str, object], names: set[str]) -> dict[str, object]:
    return {name: value for name, value in values.items() if name not in names}


def _content(path: Path) -> str | None:
    """The hash of a file, or of a folder's files with their names; None where there is nothing."""
    if path.is_file():
        return file_hash(path)
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith((".", "__")) for part in file.relative_to(path).parts)
        if file.is_file() and not hidden:
            digest.update(f"{file.relative_to(path).as_posix()}\t{file_hash(file)}\n".encode())
    return digest.hexdigest()
