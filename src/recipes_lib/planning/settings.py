"""What of a recipe and its launch decides about memory and time, as plain numbers.

Precision is that of TRL 1.16, PEFT 0.21 and accelerate 1.15: adapters on an unquantized base are
float32, on a 4-bit base bf16; FSDP2 under bf16 keeps trained weights of other bases in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from recipes_lib.config.batch import written_sync
from recipes_lib.config.constraints import COMPILE_KEYS, VARLEN
from recipes_lib.config.launch import READS_ONCE_KEY, Launch, why_each_rank_reads
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import MAX_LENGTH
from recipes_lib.models.blocks import Block
from recipes_lib.models.shapes import KEEPS_BUFFERS, ModelShape
from recipes_lib.planning.targets import Adapted, adapted_matrices

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
_FORMER_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_COUNTED_MODULES = ("lm_head", "embed_tokens")
_UNCOUNTED_LORA = {
    "use_dora": "DoRA's copies of weights",
    "trainable_token_indices": "trained tokens (lora.trainable_token_indices)",
    "layer_replication": "repeated layers (lora.layer_replication)",
    "arrow_config": "routing between adapters (lora.arrow_config)",
}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter.

    Args:
        targets: the matrices of each layer it sits on, last those in no layer, with their ranks.
        extra_parameters: of modules that are trained in full.
        vectors: trained numbers per output of an adapted matrix: DoRA's lengths, LoRA's bias.
    """

    rank: int
    dropout: float
    targets: tuple[Adapted, ...]
    extra_parameters: int = 0
    vectors: int = 0

    @cached_property
    def parameters(self) -> int:
        """How many parameters are trained."""
        return self.extra_parameters + sum(
            rank * max(matrix.experts, 1) * (matrix.inputs + matrix.outputs)
            + self.vectors * matrix.outputs
            for layer in self.targets
            for matrix, rank in layer
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training in numbers.

    Args:
        dtype: precision of the base weights in memory.
        bits: 4 or 8 for quantized linear layers, None for none.
        half: the autocast type, float16 (which scales the loss) or bfloat16; None for no autocast.
        adapter: None for full fine-tuning.
        attention: sdpa, flash, eager, or documents (sdpa example by example, on a CPU).
        per_device: examples per micro-batch and process.
        max_length: rows are cut there; None for no cut.
        max_tokens: cap on the tokens of one forward pass.
        selective: whether checkpointing keeps what attention returned.
        compiled: whether decoder blocks are compiled.
        reshard: under FSDP2, whether gathered weights are freed after the forward pass.
        sync_each_batch: under FSDP2, whether gradients are shared out after every backward pass;
            None as `shares_each_batch` has it.
        accumulates: whether a step has several backward passes; the plan finds out.
        device: gpu or cpu.
        reads_once: whether rank 0 alone reads the base weights.
    """

    shape: ModelShape
    dtype: str
    bits: int | None
    double_quantized: bool = True
    half: str | None
    adapter: Adapter | None
    optimizer: str
    attention: str
    checkpointing: bool
    per_device: int
    eval_per_device: int
    max_length: int | None
    max_tokens: int | None
    padding_free: bool
    packing: bool
    grouped: bool
    world_size: int
    sharded: bool
    compiled: bool = False
    reshard: bool = True
    selective: bool = False
    sync_each_batch: bool | None = None
    accumulates: bool = False
    device: str = "gpu"
    per_machine: int = 1
    reads_once: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of an unquantized base weight."""
        return BYTES[self.dtype]

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation that a matrix product makes."""
        return 2 if self.half else self.weight_bytes

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trained weight: adapters are float32 on a plain base and under a scaled loss;
        FSDP2 raises full weights.
        """
        if self.adapter is not None:
            return 2 if self.bits and self.half != "float16" else 4
        return 4 if self.sharded and self.half else self.weight_bytes

    @property
    def trained_parameters(self) -> int:
        """How many parameters are trained."""
        shape, adapter = self.shape, self.adapter
        return shape.parameters - shape.frozen if adapter is None else adapter.parameters

    @cached_property
    def layers(self) -> tuple[tuple[Block, Adapted, int], ...]:
        """The different layers with what is adapted of them, and how many there are of each."""
        blocks = self.shape.blocks
        adapted = self.adapter.targets if self.adapter else ((),) * len(blocks)
        found = Counter(zip(blocks, adapted[: len(blocks)], strict=True))
        return tuple((block, targets, count) for (block, targets), count in found.items())

    @property
    def shares_each_batch(self) -> bool:
        """Whether FSDP2 shares gradients out after every backward pass, as it does by itself for
        whole layers.
        """
        whole_layers = self.adapter is None or self.adapter.extra_parameters > 0
        return whole_layers if self.sync_each_batch is None else self.sync_each_batch

    @property
    def masked(self) -> bool:
        """Whether sdpa gets a mask of row x row, and keys and values repeated for each head."""
        return self.attention in ("sdpa", "eager") and (self.flattened or self.per_device > 1)

    def masks(self, layer: Block) -> bool:
        """Whether a layer's attention gets a mask, as windows shorter than rows need, or is written
        out.
        """
        if self.attention == "flash":
            return False
        short = self.max_length is not None and self.max_length <= (layer.window or 0)
        windowed = layer.window is not None and (self.attention == "documents" or not short)
        return self.masked or self.attention == "eager" or windowed

    @property
    def flattened(self) -> bool:
        """Whether a micro-batch is one row of examples end to end."""
        return self.padding_free or self.packing

    @property
    def fills(self) -> bool:
        """Whether a training chooses a cap by itself, up to which rows of several micro-batches
        share a forward pass. The loss that keeps experts busy would be another one.
        """
        by_bounds = self.flattened and self.attention == "flash"
        return self.device == "gpu" and by_bounds and not self.shape.experts


def settings_of(recipe: Recipe, launch: Launch, shape: ModelShape, *, on_cpu: bool) -> Settings:
    """Return the settings of a recipe under a launch."""
    train, fsdp = recipe.train, launch.config.fsdp
    quantization = recipe.quantization or {}
    bits = {"load_in_4bit": 4, "load_in_8bit": 8}
    written = recipe.model.dtype  # auto is the checkpoint's own; bf16 where the plan cannot see it
    dtype = next((name for name in (written, shape.dtype) if name in BYTES), "bfloat16")
    half = "float16" if train.get("fp16") else "bfloat16" if train.get("bf16", True) else None
    per_device = int(train.get("per_device_train_batch_size", 8))
    packing = bool(train.get("packing", False))
    attention = _attention(recipe, shape, on_cpu)
    several = per_device > 1 and not packing and not shape.carries_state
    apart = ("flash", "documents") if on_cpu else ("flash", "documents", "sdpa")
    flat_by_itself = attention in apart and several
    validates = train.get("eval_strategy", "no") != "no"
    checkpointing = train.get("activation_checkpointing_kwargs") or {}
    sharded = launch.distributed_type == "FSDP" and launch.world_size > 1
    why = why_each_rank_reads(recipe, sharded, bool(fsdp.get(READS_ONCE_KEY, True)))
    return Settings(
        shape=shape,
        dtype=dtype,
        bits=next((bits[key] for key in bits if quantization.get(key)), None),
        double_quantized=bool(quantization.get("bnb_4bit_use_double_quant", False)),
        half=half,
        adapter=_adapter(recipe, shape),
        optimizer=str(train.get("optim", "adamw_torch_fused")),
        attention=attention,
        checkpointing=bool(
            train.get("activation_checkpointing", train.get("gradient_checkpointing"))
            or fsdp.get("fsdp_activation_checkpointing")
        ),
        per_device=per_device,
        eval_per_device=int(train.get("per_device_eval_batch_size", 8)) if validates else 0,
        max_length=train.get("max_length", MAX_LENGTH),
        max_tokens=None,
        compiled=any(train.get(key) for key in COMPILE_KEYS),
        padding_free=bool(train.get("padding_free", flat_by_itself)),
        packing=packing,
        selective=bool(checkpointing.get("selective")),
        grouped=train.get("train_sampling_strategy") == "group_by_length",
        world_size=launch.world_size,
        per_machine=launch.per_machine,
        sharded=sharded,
        sync_each_batch=written_sync(recipe),
        reshard=bool(fsdp.get("fsdp_reshard_after_forward", True)),
        reads_once=not why and shape.family not in KEEPS_BUFFERS,
        device="cpu" if on_cpu else "gpu",
    )


def _attention(recipe: Recipe, shape: ModelShape, on_cpu: bool) -> str:
    """Return the kernel, as `training.build` chooses it."""
    named, train = recipe.model.attn_implementation, recipe.train
    name = named or ("eager" if shape.lacks_sdpa else "sdpa")
    if name == "eager":
        return name
    if "flash" in name or (name == VARLEN and not on_cpu):
        return "flash"
    wrapped = train.get("packing") and train.get("packing_strategy") == "wrapped"
    if train.get("padding_free") is False or wrapped:
        return "sdpa"
    if on_cpu:
        apart = not shape.carries_state and shape.family != "llama4_text"  # chunks
        return "documents" if apart else "sdpa"
    return "sdpa"


def _adapter(recipe: Recipe, shape: ModelShape) -> Adapter | None:
    """Return the adapter of a recipe.

    Raises:
        RecipeError: no target is a matrix of this model.
    """
    lora = recipe.lora
    if lora is None:
        return None
    adapter = adapter_of(lora, shape)
    if not any(adapter.targets):
        linear = dict.fromkeys(
            matrix.last_name
            for block, _ in shape.kinds
            for matrix in block.matrices
            if matrix.linear
        )
        what = f"lora.target_modules names no linear layer of {shape.name}"
        raise recipe.error("lora.target_modules", what, f"its blocks have {', '.join(linear)}")
    return adapter


def adapter_of(lora: Mapping[str, Any], shape: ModelShape) -> Adapter:
    """Return what a `lora` section puts on a model."""
    saved = [name for name in lora.get("modules_to_save") or () if name in _COUNTED_MODULES]
    return Adapter(
        rank=int(lora.get("r", 8)),
        dropout=float(lora.get("lora_dropout", 0.0)),
        targets=adapted_matrices(lora, shape),
        extra_parameters=len(saved) * shape.vocabulary * shape.hidden,
        vectors=bool(lora.get("use_dora")) + bool(lora.get("lora_bias")),
    )


def uncounted(recipe: Recipe, settings: Settings) -> tuple[str, ...]:
    """Return what of the model and of the recipe needs memory and is not counted, in words."""
    shape, adapter, lora = settings.shape, settings.adapter, recipe.lora or {}
    found = list(shape.uncounted)
    if adapter is not None:
        found += [words for key, words in _UNCOUNTED_LORA.items() if lora.get(key)]
        if lora.get("bias", "none") != "none":
            found.append("trained biases (lora.bias)")
        saved = [str(name) for name in lora.get("modules_to_save") or []]
        if others := [name for name in saved if name not in _COUNTED_MODULES]:
            found.append(f"{', '.join(others)} (lora.modules_to_save)")
        targets = lora.get("target_modules")
        if isinstance(targets, list):
            known = {matrix.last_name for block, _ in shape.kinds for matrix in block.matrices}
            known |= {*_FORMER_NAMES} if shape.experts else set()
            if others := [
                name for name in map(str, targets) if name.rpartition(".")[2] not in known
            ]:
                found.append(f"adapters on {', '.join(others)}")
    checkpointing = recipe.train.get("activation_checkpointing_kwargs") or {}
    if settings.checkpointing and checkpointing.get("every_n_layers", 1) > 1:
        found.append(
            "layers that every_n_layers leaves out (train.activation_checkpointing_kwargs)"
        )
    if settings.compiled:
        found.append("what torch.compile keeps")
    return tuple(found)
