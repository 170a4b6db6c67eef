"""Attention over a row that holds several examples end to end, on a GPU: torch's own
variable-length flash kernel, which needs no package besides torch.

transformers knows no such name. A model is loaded with sdpa and switched, so that only its training
uses the kernel: answers, which come with a cache and with padding, are sdpa's.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from recipes_lib.config.constraints import VARLEN

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None
_NEEDED = {"scale", "window_size", "enable_gqa"}  # torch 2.10 lacked some


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, tokens, channels)
    key: torch.Tensor,  # (1, key heads, tokens, channels)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example of a row, whose bounds are `cu_seq_lens_q`.

    A batch without bounds has one example a row and, where rows differ in length, its padding on
    the right: what is causal never sees it, and no mask is needed.

    Returns:
        The attention output of shape (1, tokens, heads, channels), and no weights.
    """
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        if sliding_window is not None and sliding_window < key.shape[2]:
            raise ValueError(f"{VARLEN} attention with a window needs the bounds of the examples")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    device = query.device.type
    # torch casts what its own attention gets under autocast, and not what this kernel gets; rotary
    # positions may have made float32 of queries and keys
    half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    rows = [one[0].transpose(0, 1).to(half).contiguous() for one in (query, key, value)]
    longest = int(kwargs["max_length_q"])
    out = varlen_attn(
        *rows,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        # how many tokens before it a token sees beside itself, and none after it
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None], None


def why_not_here(half: torch.dtype | None) -> str | None:
    """Return why `varlen` cannot run on this machine, as the end of a sentence that begins with the
    kernel's name; None where it can.

    Args:
        half: the precision of the training's products, None for float32.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
        return "needs a GPU of the Ampere generation or newer"
    if half is None:
        return "computes in half precision only; set train.bf16: true"
    known = inspect.signature(varlen_attn).parameters if varlen_attn is not None else {}
    if not known.keys() >= _NEEDED:
        return f"needs a newer torch than {torch.__version__}"
    if not torch.backends.cuda.is_flash_attention_available():
        return f"needs a torch that was built with flash attention, {torch.__version__} was not"
    return None


def use_varlen(model: Any) -> None:
    """Switch a model from sdpa to `varlen`. No mask is registered under the name: transformers then
    makes none, and does not wait for the GPU to find out whether one is needed.
    """
    AttentionInterface.register(VARLEN, varlen_attention)
    model.set_attn_implementation(VARLEN)
