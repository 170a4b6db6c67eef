"""What a plan leaves out: with any of it a sum may be too small, so that the plan does not say that
the training fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.planning.settings import COUNTED_MODULES, Settings

_EXPERTS = {"gate_proj", "up_proj", "down_proj"}
_LORA = {
    "use_dora": "DoRA's copies of weights",
    "rank_pattern": "ranks of single layers (lora.rank_pattern)",
    "target_parameters": "adapters on parameters (lora.target_parameters)",
    "trainable_token_indices": "trained tokens (lora.trainable_token_indices)",
    "layer_replication": "repeated layers (lora.layer_replication)",
    "arrow_config": "routing between adapters (lora.arrow_config)",
}


def uncounted(recipe: Recipe, settings: Settings) -> tuple[str, ...]:
    """Return what of the model and of the recipe needs memory and is not counted, in words."""
    of_adapter = _of_adapter(recipe.lora or {}, settings) if settings.adapter else ()
    return (*settings.shape.uncounted, *of_adapter, *_of_training(recipe))


def _of_adapter(lora: dict[str, Any], settings: Settings) -> Iterator[str]:
    assert settings.adapter is not None
    if settings.shape.experts > 1 and not _EXPERTS.isdisjoint(settings.adapter.targets):
        yield "adapters on experts"
    yield from (words for key, words in _LORA.items() if lora.get(key))
    saved = lora.get("modules_to_save") or []
    if others := [str(name) for name in saved if name not in COUNTED_MODULES]:
        yield f"{', '.join(others)} (lora.modules_to_save)"
    targets = lora.get("target_modules")
    if isinstance(targets, list) and settings.shape.known:
        names = [
            str(name)
            for name in targets
            if str(name).rpartition(".")[2] not in settings.shape.linears()
        ]
        if names:
            yield f"adapters on {', '.join(names)}"


def _of_training(recipe: Recipe) -> Iterator[str]:
    if recipe.train.get("torch_compile"):
        yield "what torch.compile keeps"
