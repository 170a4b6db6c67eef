"""Attention over a row that holds several examples end to end, on a CPU, where no flash attention
kernel takes such rows.

PyTorch's sdpa takes a (length)^2 mask for such a row and computes what the mask then throws away.
Here each example gets its own causal sdpa call: the same numbers, no mask, and the work of the
examples alone. Everything else (padded batches, generation, sliding windows) goes to sdpa as
before.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from recipes_lib.config.launch import Active
from recipes_lib.config.recipe import Recipe
from recipes_lib.models.architectures import ATTENTION_LAYERS

NAME = "sdpa_by_document"


def refuse_flex_attention(recipe: Recipe, active: Active) -> None:
    """Refuse the attention that no training on a CPU can use, before the model is loaded."""
    key = "model.attn_implementation"
    if recipe.model.attn_implementation == "flex_attention" and active.device.startswith("cpu"):
        raise recipe.error(
            key,
            f"{key}: flex_attention has no backward pass on a CPU",
            "use sdpa, or leave the key out",
        )


@torch.compiler.disable  # reads the lengths of the examples
def sdpa_by_document(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, tokens, channels)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' `sdpa_attention_forward`, document by document where `cu_seq_lens_q` tells
    their bounds.

    Returns:
        The attention output of shape (1, tokens, heads, channels), and no weights.
    """
    bounds = kwargs.get("cu_seq_lens_q")
    same_length = query.shape[0] == 1 and query.shape[2] == key.shape[2]
    if (
        bounds is None
        or not same_length
        or kwargs.get("sliding_window") is not None
        or kwargs.get("position_bias") is not None
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kept = {name: kwargs[name] for name in ("dropout", "scaling", "softcap") if name in kwargs}
    lengths = bounds.diff().tolist()
    parts = zip(
        query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
    )
    return torch.cat(
        [sdpa_attention_forward(module, *part, None, is_causal=True, **kept)[0] for part in parts],
        dim=1,
    ), None


def use_document_attention(model: Any) -> None:
    """Switch a model from sdpa to `sdpa_by_document` if it can."""
    config = model.config.get_text_config()
    if (
        getattr(model.config, "_attn_implementation", "") != "sdpa"
        or not set(getattr(config, "layer_types", None) or ()) <= ATTENTION_LAYERS
    ):
        return
    AttentionInterface.register(NAME, sdpa_by_document)
    AttentionMaskInterface.register(
        NAME, sdpa_mask
    )  # built, so that models with windows keep theirs
    model.set_attn_implementation(NAME)
