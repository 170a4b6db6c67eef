"""A model without its weights: its configuration, its parts, and what of it is trained.

Built on torch's meta device by the same functions that prepare a model for training, so that a plan
counts what a training trains.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import peft
import torch
import transformers

from recipes_lib.models.families import auto_class, prepare_for_training, settle_targets


def configuration(values: Mapping[str, Any]) -> Any:
    """Return the configuration of a model from the contents of its config.json.

    Raises:
        ValueError: the installed transformers does not know the model's type.
    """
    values = dict(values)
    return transformers.AutoConfig.for_model(values.pop("model_type", ""), **values)


def on_meta(
    config: Any, dtype: torch.dtype, lora: peft.LoraConfig | None = None, attention: str = "eager"
) -> Any:
    """Return the model that a recipe trains, without weights; LoRA's starting values do not matter.

    Raises:
        ValueError: transformers cannot build it, or LoRA's targets are not in it.
    """
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
    lists = (
        part for part in text_decoder(model).modules() if isinstance(part, torch.nn.ModuleList)
    )
    return list(next(lists))
