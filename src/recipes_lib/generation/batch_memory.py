"""How many padded tokens a batch of prompts and answers may have, from the memory that is free.
Arithmetic only; torch where it is asked.

A token keeps its keys and values in every layer; while the prompt is read, one layer's activations
stand beside them. Half of what is free is used: the cache grows by copying, and attention and
sampling need room of their own. A batch that is too large all the same is halved by the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recipes_lib.planning.cards import available_gib

if TYPE_CHECKING:
    import torch

# where nothing is known of a model, and the most on a processor, which larger batches make no
# faster
USUAL_TOKENS = 8192
LEAST_TOKENS = 1024
MOST_TOKENS = 1 << 20
USED_SHARE = 0.5


def token_bytes(
    layers: int, kv_width: int, hidden: int, intermediate: int, element_bytes: int
) -> int:
    """Return the memory of one token: its keys and values in all layers, and one layer's
    activations.

    Args:
        kv_width: of all keys of a layer together.

    Example:
        >>> token_bytes(layers=32, kv_width=1024, hidden=4096, intermediate=14336, element_bytes=2)
        282624
    """
    return element_bytes * (2 * layers * kv_width + 8 * hidden + 3 * intermediate)


def tokens_per_batch(free_bytes: float, bytes_per_token: int, on_gpu: bool) -> int:
    """Return the padded tokens of a batch.

    Args:
        free_bytes: memory that can be had beside the weights.
        bytes_per_token: see `token_bytes`.
        on_gpu: a processor gets no more than `USUAL_TOKENS`.

    Example:
        >>> tokens_per_batch(60 * 2**30, 282_624, on_gpu=True), tokens_per_batch(60 * 2**30, 282_624, on_gpu=False)
        (113975, 8192)
    """  # noqa: E501
    fitting = int(free_bytes * USED_SHARE / max(bytes_per_token, 1))
    return max(LEAST_TOKENS, min(fitting, MOST_TOKENS if on_gpu else USUAL_TOKENS))


def tokens_for(model: Any) -> int:
    """Return the padded tokens of a batch for a loaded model, from what is free on its
    device now.
    """
    config = model.config.get_text_config()
    try:
        heads = int(config.num_attention_heads)
        hidden = int(config.hidden_size)
        head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
        kv_width = int(getattr(config, "num_key_value_heads", None) or heads) * head_dim
        intermediate = int(getattr(config, "intermediate_size", None) or 4 * hidden)
        per_token = token_bytes(
            int(config.num_hidden_layers), kv_width, hidden, intermediate, model.dtype.itemsize
        )
    except (AttributeError, TypeError):  # another kind of model
        return USUAL_TOKENS
    return tokens_per_batch(free_bytes(model.device), per_token, on_gpu=model.device.type == "cuda")


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device; what torch holds of it unused counts as free."""
    import torch

    if device.type != "cuda":
        return int(available_gib() * 2**30)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
