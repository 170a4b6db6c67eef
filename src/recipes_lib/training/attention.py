"""Attention over a row that holds several examples end to end.

sdpa takes a mask of (length)^2 for such a row and computes what the mask throws away. On a CPU each
example gets its own causal call instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipes_lib.config.recipe import VARLEN
from recipes_lib.models.families import ATTENTION_LAYERS

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None
DOCUMENTS = "sdpa_by_document"
_PROBE_TOKENS = 8
# Of the largest logit. In 20 tiny families whose examples stay apart it was at most 1e-6, in bf16
# too; in GPT-OSS over 0.5.
_ROUNDING = 0.01


@torch.compiler.disable  # reads the lengths of the examples
def sdpa_by_document(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`, for each example between two `cu_seq_lens_q`."""
    bounds = kwargs.get("cu_seq_lens_q")
    whole_row = query.shape[0] == 1 and query.shape[2] == key.shape[2]
    limited = kwargs.get("sliding_window") is not None or kwargs.get("position_bias") is not None
    if bounds is None or not whole_row or limited:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kept = {name: kwargs[name] for name in ("dropout", "scaling", "softcap") if name in kwargs}
    lengths = bounds.diff().tolist()
    outputs = [
        sdpa_attention_forward(module, *example, None, is_causal=True, **kept)[0]
        for example in zip(*(part.split(lengths, 2) for part in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def use_document_attention(model: Any) -> bool:
    """Switch a model from sdpa to `sdpa_by_document`; return whether it could."""
    layers = {*(getattr(model.config.get_text_config(), "layer_types", None) or ())}
    if getattr(model.config, "_attn_implementation", "") != "sdpa" or layers - ATTENTION_LAYERS:
        return False
    AttentionInterface.register(DOCUMENTS, sdpa_by_document)
    AttentionMaskInterface.register(DOCUMENTS, sdpa_mask)  # models with windows keep theirs
    model.set_attn_implementation(DOCUMENTS)
    return True


def examples_are_read_by_others(model: Any) -> bool:
    """Return whether an example in a row reads the one before it, by an experiment on the model as
    it is: the first of two examples is exchanged, and the logits of the second must stay.

    A model's signature does not say it. GPT-OSS, OPT, BioGPT, AFMoE and XGLM take positions and do
    not hand them to their mask (transformers 5.24); MiniMax carries a state.
    """
    collator = DataCollatorForLanguageModeling(0, padding_free=True)
    size = model.get_input_embeddings().weight.shape[0]
    second = [token % size for token in range(3, 3 + _PROBE_TOKENS)]
    logits = []
    was_training = model.training
    model.eval()  # no dropout, and no noise of routers: no random number is drawn
    for start in (11, 11 + _PROBE_TOKENS):
        first = [token % size for token in range(start, start + _PROBE_TOKENS)]
        examples = [{"input_ids": ids, "labels": ids} for ids in (first, second)]
        batch = collator(examples)
        batch.pop("labels")
        for name, value in batch.items():
            if isinstance(value, Tensor):
                batch[name] = value.to(model.device)
        with torch.no_grad():
            row = model(**batch, use_cache=False).logits[0]
        logits.append(row[_PROBE_TOKENS:].float())
    model.train(was_training)
    change = (logits[0] - logits[1]).abs().max()
    scale = logits[0].abs().max()
    is_rounding = bool(change <= _ROUNDING * scale)  # False for a model whose logits are NaN
    return not is_rounding


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention within each example of a row, whose bounds are `cu_seq_lens_q`."""
    bounds, longest = kwargs["cu_seq_lens_q"], int(kwargs["max_length_q"])
    kind, window = query.device.type, kwargs.get("sliding_window")
    # torch casts what its own attention gets under autocast, and not what this kernel gets
    half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    rows = [part.squeeze(0).transpose(0, 1).to(half).contiguous() for part in (query, key, value)]
    out = varlen_attn(
        *rows,
        *(bounds, bounds, longest, longest),
        scale=kwargs.get("scaling"),
        window_size=(-1 if window is None else window - 1, 0),  # tokens before and after
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None], None


def use_varlen(model: Any) -> None:
    """Switch a model from sdpa to `varlen`, under whose name there is no mask to be made."""
    AttentionInterface.register(VARLEN, varlen_attention)
    model.set_attn_implementation(VARLEN)
