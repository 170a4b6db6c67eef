"""A model without its weights, built by the functions that prepare one for training."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import object_or_none
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.models.families import auto_class, prepare_for_training, settle_targets


def known_configs() -> dict[str, Mapping[str, Any]]:
    """Return config.json by repository name, of models that people fine-tune: `model.json` of a
    folder in `recipes/`, and `recipes/models.jsonl`; shipped and of the working directory.
    """
    configs: dict[str, Mapping[str, Any]] = {}
    for folder in (project_root() / "recipes", Path("recipes")):
        for file in (*sorted(folder.glob("*/model.json")), *folder.glob("models.jsonl")):
            text = file.read_text("utf-8")
            for line in [text] if file.suffix == ".json" else text.splitlines():
                try:
                    model = json.loads(line)
                    configs |= {name: dict(model["config"]) for name in model["names"]}
                except (ValueError, TypeError, LookupError):
                    form = 'a model is {"names": [...], "source": "...", "config": {...}}'
                    raise RecipeError("cannot be read", form, file=shown_path(file)) from None
    return configs


def known_config(name: str) -> Mapping[str, Any] | None:
    """Return the config.json of a local folder or of a known model, else None."""
    folder = Path(name)
    return object_or_none(folder / "config.json") if folder.is_dir() else known_configs().get(name)


def configuration(values: Mapping[str, Any]) -> Any:
    """Return a model's configuration from its config.json; ValueError for an unknown type."""
    values = dict(values)
    return transformers.AutoConfig.for_model(values.pop("model_type", ""), **values)


def on_meta(
    config: Any, dtype: torch.dtype, lora: peft.LoraConfig | None = None, attention: str = "eager"
) -> Any:
    """Return the model that a recipe trains, without weights; ValueError where it cannot be."""
    loader, config = getattr(transformers, auto_class(config.model_type)), copy.deepcopy(config)
    with torch.device("meta"):
        model = loader.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention
        )
        prepare_for_training(model)
        if lora is not None:
            lora = settle_targets(copy.deepcopy(lora), model)
            lora.init_lora_weights = True
            model = peft.get_peft_model(model, lora)
    return model


def text_decoder(model: Any) -> torch.nn.Module:
    """Return the part of a model that reads text, without its head."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    decoder = base.get_decoder()
    # Llama 4 returns a model that still has its head
    return decoder.model if decoder.get_output_embeddings() is not None else decoder


def layers(model: Any) -> list[torch.nn.Module]:
    """Return the blocks of a model's text part, in their order."""
    parts = text_decoder(model).modules()
    return list(next(part for part in parts if isinstance(part, torch.nn.ModuleList)))
