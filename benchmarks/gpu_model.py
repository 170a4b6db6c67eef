"""What `gpu_check.py` measures: a model with random weights, batches with Dolly's lengths, and one
training step without a trainer.

It runs where torch, transformers and PEFT are; trl, datasets and a network are not needed,
bitsandbytes only for QLoRA.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from recipes_lib.models.shapes import ModelShape, shape_of_config
from recipes_lib.planning.lengths import dolly_lengths
from recipes_lib.planning.memory import memory_of
from recipes_lib.planning.settings import Settings, adapter_of
from recipes_lib.training import loss

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TINY = LLAMA_2_7B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
VARLEN = "torch_varlen"


@dataclass(frozen=True)
class Case:
    """One training setting.

    Args:
        name: what the table says.
        batching: padded, padding-free or packed.
        examples: examples per micro-batch; for packed rows, rows.
        attention: a name that transformers knows, or `torch_varlen`.
        bits: 4 for QLoRA.
        fsdp: wrap the model in FSDP2 on one rank.
        unavailable: why it cannot be tried here.
    """

    name: str
    batching: str
    examples: int
    attention: str
    checkpointing: bool = False
    dropout: float = 0.05
    bits: int | None = None
    fsdp: bool = False
    unavailable: str | None = None


def build_model(
    config: dict[str, Any], device: str, rank: int = 32, dropout: float | None = 0.05
) -> Any:
    """Return a causal language model in bf16 with random weights and LoRA on every linear layer,
    its adapters in float32.

    Args:
        dropout: LoRA's; None for no adapter.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    plain = {key: value for key, value in config.items() if key != "model_type"}
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**plain, attn_implementation="sdpa"))
    finally:
        torch.set_default_dtype(default)
    loss.add_token_loss(model)
    if device != "cpu":
        loss.gradient_is_made_at_once = lambda device: True  # TRL's kernels are not there
        loss.TOKENS_PER_TILE = 2048  # a GPU wants larger products than a cache does
    if dropout is None:
        return model.train()
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    with torch.device(device):
        model = get_peft_model(model, lora)
    for parameter in trained(model):
        parameter.data = parameter.data.float()
    return model.train()


def quantize(model: Any, device: str) -> None:
    """Turn the base's linear layers into NF4 with double quantization, in place, and the adapters
    into bf16 as TRL does.
    """
    import bitsandbytes as bnb
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit  # noqa: F401  (fails early where PEFT has no 4-bit layers)

    for module in model.modules():
        if isinstance(module, LoraLinear):
            old = module.base_layer
            new = bnb.nn.Linear4bit(
                old.in_features,
                old.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                compress_statistics=True,
            )
            new.weight = bnb.nn.Params4bit(
                old.weight.data.cpu(),
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=True,
            )
            module.base_layer = new.to(device)
            module.base_layer.support_avx512bf16_for_cpu = False
    for parameter in trained(model):
        parameter.data = parameter.data.bfloat16()


def trained(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def set_up(model: Any, case: Case) -> None:
    """Switch attention, dropout and checkpointing to what a case wants."""
    base = model.get_base_model()
    if case.attention == VARLEN:
        register_varlen()
    elif case.attention == "sdpa_by_document":
        from recipes_lib.training.cpu.attention import use_document_attention

        base.set_attn_implementation("sdpa")
        use_document_attention(base)
    base.set_attn_implementation(case.attention)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = case.dropout
    base.gradient_checkpointing_disable()
    if case.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})


def register_varlen() -> None:
    """PyTorch's own variable-length flash attention under a name that transformers knows; needs no
    flash-attn package.
    """
    from torch.nn.attention.varlen import varlen_attn
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **kwargs: Any
    ) -> Any:
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is None:
            return sdpa_attention_forward(
                module, query, key, value, mask, scaling=scaling, **kwargs
            )
        groups = query.shape[1] // key.shape[1]
        rows = [
            part[0].transpose(0, 1)
            for part in (
                query,
                key.repeat_interleave(groups, 1),
                value.repeat_interleave(groups, 1),
            )
        ]
        longest = kwargs["max_length_q"]
        scale = {"scale": scaling} if "scale" in known else {}
        return varlen_attn(
            *(row.contiguous() for row in rows), bounds, bounds, longest, longest, **scale, **causal
        )[None], None

    AttentionInterface.register(VARLEN, attention)
    AttentionMaskInterface.register(VARLEN, lambda *args, **kwargs: None)


def micro_batches(
    case: Case, config: dict[str, Any], device: str, longest: int, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield micro-batches of random tokens with Dolly's lengths, half of each example with loss,
    without end.

    Args:
        longest: examples are cut there; a packed row is four times as long.
    """
    draw = random.Random(seed)
    lengths = [min(max(length, 2), longest) for length in dolly_lengths(LLAMA_2_7B["vocab_size"])]
    generator = torch.Generator().manual_seed(seed)
    vocabulary = config["vocab_size"]
    while True:
        if case.batching == "packed":
            sizes = [
                size
                for _ in range(case.examples)
                for size in filled_row(draw, lengths, 4 * longest)
            ]
        else:
            sizes = draw.choices(lengths, k=case.examples)
        rows = [torch.randint(0, vocabulary, (size,), generator=generator) for size in sizes]
        labels = [torch.where(torch.arange(len(row)) < len(row) // 2, -100, row) for row in rows]
        batch = padded(rows, labels) if case.batching == "padded" else flattened(rows, labels)
        batch["num_tokens"] = sum(sizes)
        yield {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }


def filled_row(draw: random.Random, lengths: Sequence[int], size: int) -> list[int]:
    """Draw lengths that fill a row; the last is cut.

    Example:
        >>> sum(filled_row(random.Random(0), [50, 90], 400))
        400
    """
    row: list[int] = []
    while sum(row) < size:
        row.append(min(draw.choice(lengths), size - sum(row)))
    return row


def padded(rows: list[torch.Tensor], labels: list[torch.Tensor]) -> dict[str, Any]:
    """One row per example, as long as the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    return {
        "input_ids": pad(rows, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": mask,
    }


def flattened(rows: list[torch.Tensor], labels: list[torch.Tensor]) -> dict[str, Any]:
    """All examples end to end in one row, with the bounds that variable-length kernels need."""
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    together = torch.cat(labels)
    together[positions == 0] = -100
    lengths = torch.tensor([len(row) for row in rows])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(torch.int32)
    longest = int(lengths.max())
    return {
        "input_ids": torch.cat(rows)[None],
        "labels": together[None],
        "position_ids": positions[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def train_step(
    model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any]
) -> tuple[int, torch.Tensor]:
    """Make one optimizer step on one micro-batch; return its tokens (padding not counted) and its
    loss.
    """
    inputs = {key: value for key, value in batch.items() if key != "num_tokens"}
    scale = 1 / int((inputs["labels"][:, 1:] != -100).sum().clamp(min=1))
    with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16):
        loss = model(**inputs, loss_scale=scale, use_cache=False)[0]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained(model), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return batch["num_tokens"], loss.detach()


def planned_peak_gib(
    case: Case, config: dict[str, Any], tokens: int, row: int, longest: int, on_cpu: bool
) -> float:
    """Return the planner's figure for the peak of a forward and backward pass of `tokens` tokens
    (padding counted) in rows of `row`.
    """
    return memory_of(settings_of_case(case, config, longest, on_cpu=on_cpu), tokens, row).peak


def settings_of_case(
    case: Case, config: dict[str, Any], longest: int, *, on_cpu: bool, full: bool = False
) -> Settings:
    """Return a case as the planner's settings.

    Args:
        full: no adapter.
    """
    kinds = {"sdpa_by_document": "documents", VARLEN: "flash", "flash_attention_2": "flash"}
    shape = shape_of(config)
    lora = {"r": 32, "lora_dropout": case.dropout, "target_modules": list(TARGETS)}
    return Settings(
        shape=shape,
        dtype="bfloat16",
        bits=case.bits,
        half="bfloat16",
        adapter=None if full else adapter_of(lora, shape),
        optimizer="adamw_torch_fused",
        attention=kinds.get(case.attention, case.attention),
        checkpointing=case.checkpointing,
        per_device=case.examples,
        eval_per_device=0,
        max_length=longest,
        max_tokens=None,
        padding_free=case.batching == "padding-free",
        packing=case.batching == "packed",
        grouped=False,
        world_size=1,
        sharded=False,
        device="cpu" if on_cpu else "gpu",
    )


def shape_of(config: dict[str, Any]) -> ModelShape:
    """Return the planner's shape of a model."""
    return shape_of_config(config, "benchmark")


def shard(model: Any, device: str) -> None:
    """Wrap each block and the whole in FSDP2 on a process group of one."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1
        )
    mesh = dist.device_mesh.init_device_mesh(device, (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def with_bits(case: Case) -> Case:
    """The same case on a 4-bit base."""
    return replace(case, name=f"QLoRA: {case.name}", bits=4)
