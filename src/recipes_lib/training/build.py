"""Puts model, data and recipe together into a trainer, and says what came out.

TRL's dataset preparation is skipped: `data.prepare` has tokenised, masked, truncated and
audited the rows, so that nothing is dropped without being named. Packing is TRL's `pack_dataset`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import bitsandbytes
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, pack_dataset

from recipes_lib.config.batch import (
    WITHOUT_WARMUP,
    describe_batch,
    describe_schedule,
    planned_steps,
    sync_each_batch,
    warmup_steps,
)
from recipes_lib.config.preflight import attention_refused
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import VARLEN
from recipes_lib.config.upstream import COMPILE_KEYS, build_lora_config
from recipes_lib.core.ranks import say_once
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.data.prepare import PreparedData
from recipes_lib.models import upstream_fixes
from recipes_lib.models.families import (
    describe_experts,
    describe_targets,
    prepare_for_training,
    settle_targets,
    why_not_varlen,
    why_rows_apart,
)
from recipes_lib.training.attention import use_document_attention, use_varlen
from recipes_lib.training.metrics import MetricsCallback
from recipes_lib.training.stopping import StopRequest
from recipes_lib.training.trainer import RecipeTrainer
from recipes_lib.weights.load import precision_name

# graphs of one kind of block (with and without gradients, windows, the first length and any); at as
# many torch goes on without compiling
MOST_GRAPHS = 32


def build_trainer(
    recipe: Recipe,
    args: SFTConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    run: RunDirectory,
    stop: StopRequest,
    marker_facts: Mapping[str, object],
) -> RecipeTrainer:
    """Return the trainer, with the adapter (if the recipe has one) already on the model.

    Raises:
        RecipeError: a 4-bit base whose `model.dtype: auto` became the other half precision than
            autocast's; fewer rows than one step takes.
    """
    half = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None
    if recipe.quantization and half and model.dtype.itemsize == 2 and model.dtype != half:
        wanted = precision_name(half)
        what = f"the checkpoint is {precision_name(model.dtype)} and autocast {wanted}"
        what += ": quantized layers would mix the two, which torch refuses"
        raise recipe.error("model.dtype", what, f"set model.dtype: {wanted}")
    joins_rows = choose_attention(recipe, args, model)
    prepare_for_training(model)
    if (recipe.train.get("activation_checkpointing_kwargs") or {}).get("selective"):
        upstream_fixes.keep_attention(model)
    lora = build_lora_config(recipe)
    train = data.train.shuffle(seed=args.seed) if args.shuffle_dataset else data.train
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=_training_rows(train, recipe, args),
        eval_dataset=_validation_rows(data.validation, args),
        processing_class=tokenizer,
        peft_config=lora and settle_targets(lora, model),
        callbacks=[MetricsCallback(run.metrics)],
        recipe=recipe,
        stop=stop,
        joins_rows=joins_rows,
        row_ids=None if args.packing else list(train["example_id"]),
        marker_facts=marker_facts,
    )
    if trainer.is_fsdp_enabled:
        kwargs = trainer.accelerator.gradient_state.plugin_kwargs
        kwargs["sync_each_batch"] = sync_each_batch(recipe)
    if args.fp16:
        # Loss scaling cannot undo the scale of gradients of fewer bits than float32, and TRL makes
        # the adapters of a quantized base bfloat16.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        trainer.precision = dict.fromkeys(trainer.precision, torch.float32)
    if any(recipe.train.get(key) for key in COMPILE_KEYS):
        compile_blocks(trainer.model, recipe, run)
    upstream_fixes.tell_empty_parameters_apart(trainer.model)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def compile_blocks(model: Any, recipe: Recipe, run: RunDirectory) -> None:
    """Have each decoder block compiled when it is first used: one kind of block is compiled once
    for all layers, and under FSDP2 each still gathers its own weights. What was compiled is kept in
    the run's folder.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(run.path / "compiled"))
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    backend = recipe.train.get("torch_compile_backend") or "inductor"
    mode = recipe.train.get("torch_compile_mode")
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            # not `block.compile()`, which takes hooks along: FSDP2 gathers weights in one
            block.forward = torch.compile(block.forward, backend=backend, mode=mode)


def choose_attention(recipe: Recipe, args: SFTConfig, model: PreTrainedModel) -> bool:
    """Choose how the examples of a micro-batch share a row; return whether each micro-batch becomes
    one row without padding. A recipe that says `padding_free` itself, or packs, is left alone.

    Raises:
        RecipeError: `varlen` was asked for, and the model is not for it.
    """
    varlen, on_cpu = recipe.model.attn_implementation == VARLEN, args.device.type == "cpu"
    if varlen and (why := why_not_varlen(model)):
        raise attention_refused(recipe, why)
    wrapped = args.packing and args.packing_strategy == "wrapped"
    if wrapped or recipe.train.get("padding_free") is False:
        return False
    by_document = on_cpu and use_document_attention(model)
    if varlen and not on_cpu:
        use_varlen(model)
    decided = "padding_free" in recipe.train or args.packing
    if decided or (args.per_device_train_batch_size == 1 and not varlen):
        return False
    name = str(getattr(model.config, "_attn_implementation", ""))
    apart = by_document if on_cpu else name in ("sdpa", VARLEN) or "flash" in name
    if apart and (why := why_rows_apart(model)):
        say_once(f"rows keep their padding: {type(model).__name__} {why}")
        return False
    return apart


def _training_rows(train: Dataset, recipe: Recipe, args: SFTConfig) -> Dataset:
    rows = train.select_columns(["input_ids", "labels"])
    if args.packing:
        rows = pack_dataset(rows, recipe.train["max_length"], args.packing_strategy)
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if len(rows) < step:
        kind = "packed rows" if args.packing else "training rows"
        whole = recipe.run.global_batch_size
        raise recipe.error(
            "run.global_batch_size" if whole else "train.per_device_train_batch_size",
            f"{len(rows)} {kind} do not fill one step of {step}: nothing would be trained",
            f"set run.global_batch_size to {len(rows)} or less, or give more rows",
        )
    return rows


def _validation_rows(validation: Dataset | None, args: SFTConfig) -> Dataset | None:
    if validation is None or not len(validation) or args.eval_strategy == "no":
        return None
    return validation.select_columns(["input_ids", "labels"])


# ---- What a training says before its first step ----


def start_up_lines(trainer: RecipeTrainer, launch_line: str) -> list[str]:
    """Return the batch arithmetic, what is trained, and what is really active."""
    args, model = trainer.args, trainer.model
    padding = ", packed" if args.packing else ", no padding" if trainer.joins_rows else ""
    mixed = "bf16 mixed" if args.bf16 else "fp16 mixed" if args.fp16 else None
    attention = getattr(model.config, "_attn_implementation", "unknown")
    shape = {
        "per_device": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "world_size": args.world_size,
    }
    rows = len(trainer.train_dataset)
    epochs, most = args.num_train_epochs, args.max_steps
    _, total = steps = planned_steps(rows, **shape, epochs=epochs, max_steps=most)
    raised = trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision != "no"
    rate, warmup = args.learning_rate, args.warmup_steps
    lines = [
        f"launch: {launch_line}; precision {mixed or precision_name(model.dtype)}; attention"
        f" {attention}{padding}; seed {args.seed}",
        f"batch: {describe_batch(rows, steps, **shape)}",
        f"schedule: {describe_schedule(_schedule(args), rate, warmup, total)}",
        f"trains: {describe_trainable(model, raised=raised)}",
    ]
    if trains_nothing(trainer, total):
        what = "the only step is a warm-up step with learning rate 0 and trains nothing"
        lines.append(f"warning: {what}; set train.warmup_steps: 0")
    if isinstance(model, PeftModel):
        lines.append(describe_targets(model))
    weight = trainer.router_aux_loss_coef if trainer.aux_loss_enabled else 0.0
    experts = describe_experts(model, weight)
    return [*lines, experts] if experts else lines


def _schedule(args: SFTConfig) -> str:
    return str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))


def trains_nothing(trainer: RecipeTrainer, steps: int) -> bool:
    """Whether the only step of a training is one of warm-up, which begins at learning rate 0."""
    warms_up = _schedule(trainer.args) not in WITHOUT_WARMUP
    return warms_up and steps == 1 and warmup_steps(trainer.args.warmup_steps, steps) > 0


def count_quantized(model: Any) -> int:
    """Return the number of 4-bit layers, which FSDP shards, too."""
    return sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())


def describe_trainable(model: Any, *, raised: bool = False) -> str:
    """Return how many parameters are trained, and where they sit.

    Args:
        raised: whether FSDP2 will keep those of half precision in float32, as it does under mixed
            precision.
    """
    quantized = count_quantized(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    count = sum(weight.numel() for weight in trained)
    total = count + sum(weight.numel() for weight in frozen)
    precision = ", ".join(sorted({precision_name(weight.dtype) for weight in trained}))
    if raised and not quantized and precision != "float32":
        precision = f"float32 (FSDP2 keeps the {precision} weights so)"
    kinds = {precision_name(weight.dtype) for weight in frozen} - {"uint8"}
    base = f"NF4 in {quantized} layers" if quantized else ", ".join(sorted(kinds))
    return f"{count:,} of {total:,} parameters in {precision}" + (f"; base {base}" if base else "")
