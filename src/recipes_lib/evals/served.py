"""The engine that answers for a model: the weights in this process, or a server."""

from __future__ import annotations

from recipes_lib.evals.engine import Engine
from recipes_lib.evals.engine_hf import HFEngine
from recipes_lib.evals.engine_openai import OpenAIEngine
from recipes_lib.evals.models import Loaded
from recipes_lib.evals.recipe import EvalRecipe


def engine_for(recipe: EvalRecipe, loaded: Loaded) -> Engine:
    """Return what answers for a model."""
    section, model = recipe.generation, loaded.model
    if section.engine == "openai":
        name = section.served_name or (model.name if model.trained else model.word)
        return OpenAIEngine(section, name, None if model.served_only else model.fingerprint)
    tokenizer = model.prompts.tokenizer
    return HFEngine(
        loaded.network, tokenizer, model.fingerprint, section.batch_tokens, loaded.using
    )
