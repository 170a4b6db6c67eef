"""Attention over a row that holds several examples end to end, on a GPU: torch's own
variable-length flash kernel, which needs no package besides torch.

transformers knows no such name. A model is loaded with sdpa and switched, so that only its training
uses the kernel: answers, which come with a cache and with padding, are sdpa's.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from recipes_lib.config.constraints import VARLEN
from recipes_lib.core.errors import first_line

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None
_NEEDED = {"scale", "window_size", "enable_gqa"}  # torch 2.10 lacked some
_TRIED = [5, 1, 12]  # lengths of the examples of a trial
_TOLERANCE = 0.05  # of the largest value: several times what half precision rounds


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
    """Causal attention within each example of a row, whose bounds are `cu_seq_lens_q`. A batch
    without bounds has its padding on the right, which what is causal never sees.

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
    rows = [one.squeeze(0).transpose(0, 1).to(half).contiguous() for one in (query, key, value)]
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


def why_it_fails(model: Any, half: torch.dtype, device: torch.device) -> str | None:
    """Try the kernel on three small examples in one row, forward and backward, against sdpa; return
    what is wrong as the end of a sentence that begins with the kernel's name.

    A kernel that nobody has run on this GPU with heads of this size must not be found out by a
    training that fails, or that learns something else.
    """
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    groups = heads // int(getattr(config, "num_key_value_heads", None) or heads)
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    generator = torch.Generator().manual_seed(0)
    rows = query, key, value = [
        torch.randn(1, number, sum(_TRIED), channels, generator=generator, dtype=torch.float32)
        .to(device, half)
        .requires_grad_()
        for number in (heads, heads // groups, heads // groups)
    ]
    bounds = torch.tensor([0, *itertools.accumulate(_TRIED)], dtype=torch.int32, device=device)
    scale = channels**-0.5
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    for window in (None, 3):
        parts = zip(*(row.split(_TRIED, 2) for row in rows), strict=True)
        masks = [_window(length, window, device) for length in _TRIED]
        alone = [
            sdpa_attention_forward(module, *part, mask, scaling=scale)[0]
            for part, mask in zip(parts, masks, strict=True)
        ]
        try:
            joined, _ = varlen_attention(
                module,
                query,
                key,
                value,
                None,
                scaling=scale,
                sliding_window=window,
                cu_seq_lens_q=bounds,
                max_length_q=max(_TRIED),
            )
            found = (joined, *torch.autograd.grad(joined.float().square().sum(), rows))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            return f"fails on this machine: {first_line(error)}"
        expected = torch.cat(alone, 1)
        wanted = (expected, *torch.autograd.grad(expected.float().square().sum(), rows))
        for mine, theirs in zip(found, wanted, strict=True):
            apart = float(((mine - theirs).abs().max() / theirs.abs().max()).detach())
            if not apart < _TOLERANCE:
                return f"computes something else than sdpa on this machine (apart by {apart:.2g})"
    return None


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return which tokens of an example see which, (1, 1, length, length)."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return (seen if window is None else seen.triu(1 - window))[None, None]


def use_varlen(model: Any) -> None:
    """Switch a model from sdpa to `varlen`. No mask is registered under the name: transformers
    makes none, and does not wait for the GPU to find out whether one is needed.
    """
    AttentionInterface.register(VARLEN, varlen_attention)
    model.set_attn_implementation(VARLEN)
