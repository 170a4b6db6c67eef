"""Counts what a training keeps in memory by tracing the real model, as transformers and PEFT build
it, on fake tensors; attention and dropout are replaced by what their CUDA kernels keep.
"""

from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from recipes_lib.core.files import hash_of, object_or_none, write_json
from recipes_lib.core.project import cache_root
from recipes_lib.models import families

# Tokens of the two passes: what differs grows with the tokens, the rest is constant.
FEW = 128
MANY = 256
_OUTSIDE = -1  # of all blocks, whose numbers begin at 0
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")


@dataclass(frozen=True)
class Trace:
    """Numbers of a model, and bytes of one forward pass."""

    parameters: int
    trained: int
    active: int  # parameters that multiply each token; of experts, those that it is sent to
    fused_experts: int  # parameters of experts, which quantization leaves as they are
    weight_bytes: int
    trained_bytes: int
    per_token: float  # kept for the backward pass
    constant: float  # the same, what does not grow with the tokens
    checkpointed: float  # per token, where only the inputs of the blocks are kept
    block: float  # per token, of the largest block: what recomputation brings back
    largest_layer: int
    outside: int  # parameters of embeddings, head and everything that is in no block
    layers: int
    windows: int  # layers with sliding window attention
    hidden: int
    vocabulary: int
    carries_state: bool  # traced as torch computes it; special kernels keep less


def trace(config: Any, lora: peft.LoraConfig | None, *precision: Any) -> Trace:
    """Return what `trace_now` does, from the cache if it was traced before."""
    adapter: dict[str, Any] = {}
    if lora:
        for key, value in lora.to_dict().items():
            adapter[key] = str(value)
            if isinstance(value, set):  # its order is another in every process
                adapter[key] = sorted(value)
    versions = [version(name) for name in ("torch", "transformers", "peft")]
    # families: which layers take an adapter, and which parts are trained
    code = [Path(file).read_text("utf-8") for file in (__file__, families.__file__)]
    stamp = hash_of(config.to_dict(), adapter, precision, versions, code)
    file = cache_root() / "traces" / f"{stamp[:32]}.json"
    with suppress(TypeError):  # not there, or damaged
        return Trace(**(object_or_none(file) or {}))
    traced = trace_now(config, lora, *precision)
    with suppress(OSError):  # a cache that cannot be written costs the next plan some seconds
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(traced))
    return traced


def trace_now(
    config: Any,
    lora: peft.LoraConfig | None,
    dtype: str = "bfloat16",  # of the base
    half: str | None = "bfloat16",  # autocast's
    packed: float | None = None,  # bytes of a weight in quantized layers
) -> Trace:
    """Trace what a training of this model keeps, on fake tensors."""
    try:
        return _trace_with("traced", config, lora, dtype, half, packed)
    except ValueError:
        raise  # about names or types
    except Exception as error:
        # A class with a table of attentions of its own (Falcon), or one that reads its mask; sdpa
        # keeps what flash attention keeps. Eager attention is not tried: what it keeps grows with
        # the square of a row, and two short passes would make too little of it.
        try:
            return _trace_with("sdpa", config, lora, dtype, half, packed)
        except Exception:
            raise error from None


def _trace_with(
    attention: str, config: Any, lora: Any, dtype: str, half: str | None, packed: float | None
) -> Trace:
    model = families.on_meta(config, getattr(torch, dtype), lora, attention=attention)
    text = config.get_text_config()
    blocks = families.layers(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if lora and packed and half == "bfloat16":
        for parameter in trained:
            parameter.data = parameter.data.bfloat16()  # TRL's adapters on a quantized base
    # before the passes: a fake tensor has no number of its own
    in_blocks: set[int] = set()
    for block in blocks:
        in_blocks.update(map(id, block.parameters()))
    quantized = _quantized(model, config) if packed else set()
    parameters = 0
    outside = 0
    weight_bytes = 0.0
    for name, weight in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            continue
        parameters += weight.numel()
        if id(weight) not in in_blocks:
            outside += weight.numel()
        bytes_each = packed if packed and weight in quantized else weight.itemsize
        weight_bytes += weight.numel() * bytes_each
    trained_count = sum(weight.numel() for weight in trained)
    trained_bytes = sum(weight.nbytes for weight in trained)
    active = _active(model, text)
    largest_layer = max(sum(part.numel() for part in block.parameters()) for block in blocks)

    autocast = half or dtype
    packing = "transformers.masking_utils.find_packed_sequence_indices"  # reads values of tensors
    experts = "transformers.integrations.moe._can_use_grouped_mm"  # a fake one takes bf16 alone
    with (
        # on "cuda" they need a CUDA build of torch (2.13): "cpu" with its autocast
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autocast("cpu", getattr(torch, autocast), enabled=half is not None),
        mock.patch("torch.nn.functional.dropout", _dropout),
        mock.patch(packing, lambda positions: None),
        mock.patch(experts, lambda *_: autocast == "bfloat16"),
    ):
        model = model.to_empty(device="cpu").train()
        few = _kept(model, FEW)
        many = _kept(model, MANY)
    per_token = (many.total() - few.total()) / (MANY - FEW)
    inputs = len(blocks) * text.hidden_size * getattr(torch, dtype).itemsize
    layer_types = getattr(text, "layer_types", None) or []
    return Trace(
        parameters=parameters,
        trained=trained_count,
        active=active,
        fused_experts=families.fused_experts(model),
        weight_bytes=round(weight_bytes),
        trained_bytes=trained_bytes,
        per_token=per_token,
        constant=max(few.total() - FEW * per_token, 0.0),
        checkpointed=inputs + (many[_OUTSIDE] - few[_OUTSIDE]) / (MANY - FEW),
        block=max(many[number] - few[number] for number in range(len(blocks))) / (MANY - FEW),
        largest_layer=largest_layer,
        outside=outside,
        layers=len(blocks),
        windows=layer_types.count("sliding_attention"),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        carries_state=any(isinstance(part, torch.nn.Conv1d) for part in model.modules()),
    )


def _quantized(model: Any, config: Any) -> set[torch.Tensor]:
    """Return the weights that bitsandbytes quantizes: of linear layers, but those left alone."""
    left_alone = {name.rpartition(".")[2] for name in families.not_quantized(config)} | {"lm_head"}
    weights = set()
    for name, module in model.named_modules():
        is_linear = isinstance(module, torch.nn.Linear | Conv1D)  # Conv1D: of GPT-2
        if is_linear and "lora_" not in name and left_alone.isdisjoint(name.split(".")):
            weights.add(module.weight)
    return weights


def _active(model: Any, text: Any) -> int:
    """Return the parameters that multiply a token: no look-up, of experts those it is sent to."""
    names = [name for name in EXPERTS_PER_TOKEN if hasattr(text, name)]
    experts = getattr(text, names[0]) if names else 1  # that a token is sent to
    head = set(model.get_output_embeddings().parameters())
    used = set(families.text_decoder(model).parameters()) | head
    used -= {model.get_input_embeddings().weight} - head
    used -= {weight for name, weight in model.named_parameters() if "lora_" in name}
    active = 0.0
    for weight in used:
        share = 1.0
        if weight.ndim == 3:  # a matrix for each expert
            share = min(experts / weight.shape[0], 1.0)
        active += weight.numel() * share
    return round(active)


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps: its inputs, its output, and a float for each head."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        """Make an output; there is no way back."""
        output = value.new_empty(*query.transpose(1, 2).shape[:3], value.shape[-1])
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, sums, output)
        return output


def attention_as_flash(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any
) -> tuple[Any, None]:
    """Stand in for flash attention, which computes in autocast's precision."""
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(half), key.to(half), value.to(half)
    return _Attention.apply(query, key, value), None


def _dropout(given: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Keep a mask of booleans, as CUDA's dropout does; the CPU's keeps a number for each."""
    if p and training:
        return given * torch.empty_like(given, dtype=torch.bool)
    return given


transformers.AttentionInterface.register("traced", attention_as_flash)


def _kept(model: Any, tokens: int) -> Counter[int]:
    """Run a forward pass; return the bytes that autograd keeps for each block and outside them."""
    decoder = families.text_decoder(model)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    # by address, with the tensor: kept alive, so that no address is used twice
    seen: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers(), ids):
        seen[tensor.untyped_storage()._cdata] = tensor
    kept: Counter[int] = Counter()
    current = _OUTSIDE

    def enter(block: int, *_: Any) -> None:
        nonlocal current
        current = block

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = tensor
            kept[current] += storage.nbytes()
        return tensor

    for number, block in enumerate(families.layers(model)):
        block.register_forward_pre_hook(partial(enter, number))
        block.register_forward_hook(partial(enter, _OUTSIDE))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pack(decoder(input_ids=ids, use_cache=False).last_hidden_state)  # the head's input
    return kept
