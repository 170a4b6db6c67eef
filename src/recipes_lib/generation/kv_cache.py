"""Keys and values of an answer's tokens in one piece of memory with room for all of them.

transformers' own cache grows by one token in every step, and copies all tokens before it to do so.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values; what `update` returns are views of what is filled.

    Args:
        room: tokens, prompt and answer.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._pieces: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens behind the others, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._pieces = [
                new.new_empty((*new.shape[:-2], max(self.room, new.shape[-2]), new.shape[-1]))
                for new in (key_states, value_states)
            ]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for piece, new in zip(self._pieces, (key_states, value_states), strict=True):
            piece[..., start:end, :] = new
        self.keys, self.values = (piece[..., :end, :] for piece in self._pieces)
        return self.keys, self.values


def cache_name(model: Any) -> str:
    """Return what a model calls its cache: transformers 5.24 renamed it."""
    known = inspect.signature(model.get_decoder().forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def roomy_cache(model: Any, room: int) -> dict[str, Any]:
    """Return a cache as `generate` takes it, with room for so many tokens; nothing for a model that
    has a cache of its own kind. Layers with a window keep theirs.
    """
    config = model.config.get_text_config(decoder=True)
    own = getattr(model.generation_config, "cache_implementation", None)
    if own or model.config.is_encoder_decoder or not model._supports_default_dynamic_cache():
        return {}
    cache = DynamicCache(config=config)
    cache.layers = [
        RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return {cache_name(model): cache} if cache.layers else {}
