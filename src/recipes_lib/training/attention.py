"""Attention over a row that holds several examples end to end.

sdpa takes a mask of (length)^2 for such a row and computes what the mask throws away. On a CPU each
example gets its own causal call instead, on a GPU torch's `varlen` kernel knows where they end.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipes_lib.config.recipe import VARLEN
from recipes_lib.core.errors import one_line
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
# of the flash kernels in torch, in flash-attn 2 to 4, and in their copies on the Hub
_HALF = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256
_OLDEST_GPU = (8, 0)  # Ampere
_OLDEST_GPU_OF = {"flash_attention_3": (9, 0), "flash_attention_4": (9, 0)}  # Hopper


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
    return _causal_parts(module, query, key, value, bounds.diff().tolist(), **kwargs), None


def _causal_parts(
    module: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], **kwargs: Any
) -> Tensor:
    """Return causal attention within each part of a row, whose parts have these lengths."""
    options = {name: kwargs[name] for name in ("dropout", "scaling", "softcap") if name in kwargs}
    parts = [heads.split(lengths, 2) for heads in (query, key, value)]
    outputs = []
    for part in zip(*parts, strict=True):
        output, _ = sdpa_attention_forward(module, *part, None, is_causal=True, **options)
        outputs.append(output)
    return torch.cat(outputs, dim=1)


def use_document_attention(model: Any) -> bool:
    """Switch a model from sdpa to `sdpa_by_document`; return whether it could."""
    if getattr(model.config, "_attn_implementation", "") != "sdpa":
        return False
    if set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_LAYERS:
        return False
    AttentionInterface.register(DOCUMENTS, sdpa_by_document)
    AttentionMaskInterface.register(DOCUMENTS, sdpa_mask)  # models with windows keep theirs
    model.set_attn_implementation(DOCUMENTS)
    return True


# ---- may examples share a row? ----


def is_flash(attention: str) -> bool:
    """Whether an attention is a kernel of a GPU that is told where examples end, not masked."""
    return attention == VARLEN or "flash" in attention


def examples_are_read_by_others(model: Any) -> bool:
    """Return whether an example in a row reads the one before it, by an experiment on the model as
    it is: the first of two examples is exchanged, and the logits of the second must stay.

    A model's signature does not say it. GPT-OSS, OPT, BioGPT, AFMoE and XGLM take positions and do
    not hand them to their mask (transformers 5.24); MiniMax carries a state. Nor does a signature
    say whether a model hands the bounds of the examples on to a kernel.

    A kernel of a GPU does not run on a model that is still on the CPU (the Trainer moves it later;
    under FSDP2 it never is on one card). Another one stands in for it there, which separates what
    the kernel would separate: by what the model hands to it.
    """
    attention = str(model.config._attn_implementation)
    kernel: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    needs_gpu = is_flash(attention) or "/" in attention  # one on the Hub
    if needs_gpu and model.device.type == "cpu":
        kernel = _stand_in_for(attention)
    collator = DataCollatorForLanguageModeling(0, padding_free=True)
    size = model.get_input_embeddings().weight.shape[0]
    second = [token % size for token in range(3, 3 + _PROBE_TOKENS)]
    logits = []
    was_training = model.training
    model.eval()  # no dropout, and no noise of routers: no random number is drawn
    with kernel, torch.no_grad():
        for start in (11, 11 + _PROBE_TOKENS):
            first = [token % size for token in range(start, start + _PROBE_TOKENS)]
            examples = [{"input_ids": ids, "labels": ids} for ids in (first, second)]
            batch = collator(examples)
            batch.pop("labels")
            for name, value in batch.items():
                if isinstance(value, Tensor):
                    batch[name] = value.to(model.device)
            row = model(**batch, use_cache=False).logits[0]
            logits.append(row[_PROBE_TOKENS:].float())
    model.train(was_training)
    change = (logits[0] - logits[1]).abs().max()
    scale = logits[0].abs().max()
    is_rounding = bool(change <= _ROUNDING * scale)  # False for a model whose logits are NaN
    return not is_rounding


@contextlib.contextmanager
def _stand_in_for(attention: str) -> Iterator[None]:
    """Compute a kernel's attention with sdpa until the block ends, under the kernel's own name, so
    that the model makes the mask and the arguments that the kernel would get.
    """

    def kernel(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        lengths = [query.shape[2]]
        if kwargs.get("cu_seq_lens_q") is not None:
            lengths = kwargs["cu_seq_lens_q"].diff().tolist()
        elif kwargs.get("position_ids") is not None and attention != VARLEN:
            # transformers' flash attention looks for positions that begin again
            positions = kwargs["position_ids"].flatten().tolist()
            starts = [index for index, position in enumerate(positions) if position == 0]
            lengths = torch.tensor(starts + [len(positions)]).diff().tolist()
        return _causal_parts(
            module, query, key, value, lengths, scaling=kwargs.get("scaling")
        ), None

    # an entry of the instance hides the class's, and goes without a trace
    ALL_ATTENTION_FUNCTIONS[attention] = kernel
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[attention]


# ---- kernels of a GPU ----


def why_no_flash(
    attention: str, model: Any, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return why a flash kernel (varlen, flash_attention_2, or one on the Hub) cannot compute a
    model in this type, autocast's or else its own, on this device, as the end of a sentence that
    begins with the kernel's name; None where it can.
    """
    config = model.config.get_text_config()
    num_heads = getattr(config, "num_attention_heads", None) or 1
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    # Gemma 4 has other heads in its layers of full attention
    head_size = max(head_size, getattr(config, "global_head_dim", None) or 0)
    if dtype not in _HALF:
        name = str(dtype).removeprefix("torch.")
        return f"computes in bfloat16 and float16 alone, and this training in {name}"
    if head_size > _LARGEST_HEAD:
        return f"takes heads of at most {_LARGEST_HEAD}, and {type(model).__name__} has {head_size}"
    if device.type != "cuda":
        return f"needs a GPU of NVIDIA, and this training runs on {device.type}"
    oldest = _OLDEST_GPU_OF.get(attention, _OLDEST_GPU)
    capability = torch.cuda.get_device_capability(device)
    if capability < oldest:
        needed = ".".join(map(str, oldest))
        found = ".".join(map(str, capability))
        return f"needs a GPU of compute capability {needed}, and this one has {found}"
    if attention == VARLEN:
        num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
        return _varlen_fault(num_heads, num_kv_heads, head_size, dtype, device)
    return None


def _varlen_fault(
    num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Try torch's kernel on two short examples, both ways; draws no random number."""
    if varlen_attn is None:
        return f"needs torch 2.10, and this is {torch.__version__}"
    shape = {"dtype": dtype, "device": device, "requires_grad": True}
    query = torch.ones(2 * _PROBE_TOKENS, num_heads, head_size, **shape)
    key = torch.ones(2 * _PROBE_TOKENS, num_kv_heads, head_size, **shape)
    bounds = torch.tensor([0, _PROBE_TOKENS, 2 * _PROBE_TOKENS], dtype=torch.int32, device=device)
    try:
        output = varlen_attn(
            query,
            key,
            key,
            bounds,
            bounds,
            _PROBE_TOKENS,
            _PROBE_TOKENS,
            window_size=(-1, 0),
            enable_gqa=num_heads != num_kv_heads,
        )
        output.sum().backward()
        float(key.grad.sum())  # waits for the kernel
    except RuntimeError as error:
        return f"does not run on this GPU: {one_line(error)}"
    return None


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention within each example of a row, whose bounds are `cu_seq_lens_q`."""
    bounds = kwargs["cu_seq_lens_q"]
    longest = int(kwargs["max_length_q"])
    window = kwargs.get("sliding_window")
    tokens_before = -1  # all
    if window is not None:
        tokens_before = window - 1
    # torch casts what its own attention gets under autocast, and not what this kernel gets
    device = query.device.type
    dtype = value.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)

    def rows_of(heads: Tensor) -> Tensor:  # (1, heads, tokens, size) -> (tokens, heads, size)
        return heads.squeeze(0).transpose(0, 1).to(dtype).contiguous()

    output = varlen_attn(
        rows_of(query),
        rows_of(key),
        rows_of(value),
        bounds,
        bounds,
        longest,
        longest,
        scale=kwargs.get("scaling"),
        window_size=(tokens_before, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None], None


def use_varlen(model: Any) -> None:
    """Switch a model from sdpa to `varlen`, under whose name there is no mask to be made."""
    AttentionInterface.register(VARLEN, varlen_attention)
    model.set_attn_implementation(VARLEN)
