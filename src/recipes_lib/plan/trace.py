"""Counts what a training keeps in memory by tracing the real model on fake tensors.

No weights are read and nothing is computed. The model is built by transformers and PEFT, so every
family and every option of LoRA is counted as it is; attention and dropout are replaced by what
their CUDA kernels keep. Traces are cached by configuration, adapter, precision and versions.
"""

from __future__ import annotations

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

from recipes_lib.core.files import hash_of, object_or_none, write_json
from recipes_lib.core.project import cache_root
from recipes_lib.models import families

# Tokens of the two passes: what differs grows with the tokens, the rest is constant.
FEW, MANY = 128, 256
# Bytes of a 4-bit weight: the scale of each block of 64 is a float32, or with double quantization a
# byte and a float32 for 256 scales.
NF4, NF4_NESTED = 0.5 + 4 / 64, 0.5 + (1 + 4 / 256) / 64
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")


@dataclass(frozen=True)
class Precision:
    """The types a training computes in."""

    weights: str = "bfloat16"  # of the base
    half: str | None = "bfloat16"  # autocast's
    bits: int | None = None  # 4 or 8 for quantized linear layers
    nested: bool = False  # double quantization

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation that a matrix product makes."""
        return getattr(torch, self.half or self.weights).itemsize


@dataclass(frozen=True)
class Trace:
    """Numbers of a model, and bytes of one forward pass."""

    parameters: int
    trained: int
    active: int  # parameters that multiply each token; of experts, those that it is sent to
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


def trace(config: Any, lora: peft.LoraConfig | None, precision: Precision) -> Trace:
    """Return what a training of this model keeps, from the cache if it was traced before."""
    adapter = lora and {
        key: sorted(value) if isinstance(value, set) else str(value)
        for key, value in lora.to_dict().items()
    }
    versions = [version(name) for name in ("torch", "transformers", "peft")]
    code = Path(__file__).read_text(encoding="utf-8")
    stamp = hash_of(config.to_dict(), adapter, asdict(precision), versions, code)
    file = cache_root() / "traces" / f"{stamp[:32]}.json"
    with suppress(TypeError):  # not there, damaged, or written by another version
        return Trace(**(object_or_none(file) or {}))
    traced = trace_now(config, lora, precision)
    with suppress(OSError):  # a cache that cannot be written costs the next plan some seconds
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(traced))
    return traced


def trace_now(config: Any, lora: peft.LoraConfig | None, precision: Precision) -> Trace:
    """Trace a model on fake tensors."""
    dtype = getattr(torch, precision.weights)
    model = families.on_meta(config, dtype, lora, attention="traced")
    text, blocks = config.get_text_config(), families.layers(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if lora and precision.bits and precision.half == "bfloat16":
        for parameter in trained:  # TRL's adapters on a quantized base
            parameter.data = parameter.data.to(dtype)
    added = ("lora_", "modules_to_save")
    named = model.named_parameters()
    base = [weight for name, weight in named if not any(part in name for part in added)]
    in_blocks = {id(weight) for block in blocks for weight in block.parameters()}
    packed = _quantized(model, config) if precision.bits else set()
    packed_bytes = 1.0
    if precision.bits == 4:
        packed_bytes = NF4_NESTED if precision.nested else NF4
    weight_bytes = sum(
        weight.numel() * (packed_bytes if weight in packed else weight.itemsize) for weight in base
    )
    # before the passes: a fake tensor has no number of its own
    numbers = {
        "parameters": sum(weight.numel() for weight in base),
        "trained": sum(weight.numel() for weight in trained),
        "active": _active(model, text),
        "weight_bytes": round(weight_bytes),
        "trained_bytes": sum(weight.nbytes for weight in trained),
        "outside": sum(weight.numel() for weight in base if id(weight) not in in_blocks),
        "largest_layer": max(sum(part.numel() for part in block.parameters()) for block in blocks),
    }
    packing = "transformers.masking_utils.find_packed_sequence_indices"  # reads values of tensors
    half = precision.half and getattr(torch, precision.half)
    with (
        # on "cuda" they need a CUDA build of torch (2.13): "cpu" with its autocast
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autocast("cpu", half, enabled=half is not None),
        mock.patch("torch.nn.functional.dropout", _dropout),
        mock.patch(packing, lambda positions: None),
    ):
        model = model.to_empty(device="cpu").train()
        few, few_inputs = _kept(model, FEW)
        many, many_inputs = _kept(model, MANY)
    per_token = (many.total() - few.total()) / (MANY - FEW)
    block = max(many[place] - few[place] for place in range(len(blocks)))
    return Trace(
        **numbers,
        per_token=per_token,
        constant=max(few.total() - FEW * per_token, 0.0),
        checkpointed=(many_inputs.total() - few_inputs.total()) / (MANY - FEW),
        block=block / (MANY - FEW),
        layers=len(blocks),
        windows=(getattr(text, "layer_types", None) or []).count("sliding_attention"),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        carries_state=any(isinstance(part, torch.nn.Conv1d) for part in model.modules()),
    )


def _quantized(model: Any, config: Any) -> set[torch.Tensor]:
    """Return the weights that bitsandbytes quantizes: of linear layers, but those left alone."""
    left_alone = {name.rpartition(".")[2] for name in families.not_quantized(config)} | {"lm_head"}
    return {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and "lora_" not in name
        and not left_alone & {*name.split(".")}
    }


def _active(model: Any, text: Any) -> int:
    """Return the parameters that multiply a token of text: without embeddings that are only looked
    up, and of experts those that it is sent to.
    """
    chosen = next((getattr(text, name) for name in EXPERTS_PER_TOKEN if hasattr(text, name)), 1)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    used = {*families.text_decoder(model).parameters(), *head.parameters()}
    used -= {embeddings.weight} - {*head.parameters()}
    used -= {weight for name, weight in model.named_parameters() if "lora_" in name}
    experts = [weight for weight in used if weight.ndim == 3]
    share = sum(weight.numel() * min(chosen / weight.shape[0], 1.0) for weight in experts)
    return round(share + sum(weight.numel() for weight in used if weight.ndim != 3))


class _Kernel(torch.autograd.Function):
    """A kernel that returns one new tensor like `output` and keeps tensors. Forward only."""

    @staticmethod
    def forward(ctx: Any, output: Any, keep_output: bool, *kept: Any) -> Any:
        """Make the output and keep what the kernel keeps."""
        made = torch.empty_like(output)
        ctx.save_for_backward(*kept, *([made] if keep_output else []))
        return made


def attention_as_flash(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any
) -> tuple[Any, None]:
    """Keep what flash attention keeps: its inputs, its output, and a float for each head."""
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(half), key.to(half), value.to(half)
    sums = query.new_empty(query.shape[:3], dtype=torch.float32)
    output = value.new_empty(*query.transpose(1, 2).shape[:3], value.shape[-1])
    return _Kernel.apply(output, True, query, key, value, sums), None


def _dropout(given: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Keep a mask of booleans, as CUDA's dropout does; the CPU's keeps a number for each."""
    if not p or not training:
        return given
    return _Kernel.apply(given, False, torch.empty_like(given, dtype=torch.bool))


transformers.AttentionInterface.register("traced", attention_as_flash)


def _kept(model: Any, tokens: int) -> tuple[Counter[int], Counter[int]]:
    """Run a forward pass; return for each block, and outside as -1, the bytes that autograd keeps,
    and those that it keeps where only the inputs of the blocks are kept.
    """
    decoder, blocks = families.text_decoder(model), families.layers(model)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    # by address, with the tensor: kept alive, so that no address is used twice
    weights = (*model.parameters(), *model.buffers(), ids)
    known = {tensor.untyped_storage()._cdata: tensor for tensor in weights}
    kept: Counter[int] = Counter()
    inputs: Counter[int] = Counter()
    place = -1

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = tensor
            kept[place] += storage.nbytes()
        return tensor

    def enter(number: int, block: Any, args: Any, named: Any) -> None:
        nonlocal place
        place = number
        inputs[number] += (args[0] if args else named["hidden_states"]).nbytes

    def leave(*_: Any) -> None:
        nonlocal place
        place = -1

    hooks = [block.register_forward_hook(leave) for block in blocks]
    for number, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(partial(enter, number), with_kwargs=True))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pack(decoder(input_ids=ids, use_cache=False).last_hidden_state)  # the head's input
    for hook in hooks:
        hook.remove()
    inputs[-1] = kept[-1]
    return kept, inputs
