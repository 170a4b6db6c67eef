"""Puts model, data and recipe together into a trainer, and says what came out. TRL's preparation of
rows is skipped: `data.prepare` names whatever it drops.
"""

import dataclasses
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
from trl import DPOConfig, SFTConfig, pack_dataset

from recipes_lib.config import launch, upstream
from recipes_lib.config.recipe import DPO, VARLEN, Recipe, one_rank_can_read, sync_each_batch
from recipes_lib.core.ranks import meet, on_main_rank, say_once
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.terminal import count
from recipes_lib.data.prepare import PreparedData
from recipes_lib.models import families, upstream_fixes
from recipes_lib.training import attention
from recipes_lib.training.counting import CountingTrainer
from recipes_lib.training.dpo import PreferenceTrainer
from recipes_lib.training.metrics import MetricsCallback
from recipes_lib.training.sft import SupervisedTrainer
from recipes_lib.training.stopping import StopRequest
from recipes_lib.weights.load import load_model

MOST_GRAPHS = 32  # of one kind of block: gradients, windows, lengths


def read_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, active: launch.Active
) -> PreTrainedModel:
    """Return the base model; every rank has to call, and waits until all have theirs.

    Under FSDP2 one rank of a machine reads, and accelerate hands the others their shares; until
    then their models are on torch's meta device. Where that cannot be, each rank reads.
    """
    may_read_once = launch.asks_for(launch.READS_ONCE_VARIABLE) and one_rank_can_read(recipe)
    reads_once = may_read_once and active.distributed_type == "FSDP"
    os.environ[launch.READS_ONCE_VARIABLE] = str(reads_once)  # accelerate and transformers ask it
    model = load_model(
        recipe,
        tokenizer,
        upstream.build_quantization_config(recipe),
        empty=reads_once and os.environ["LOCAL_RANK"] != "0",
        # also of a recipe for the CPU (`train.use_cpu`) on a machine with GPUs
        device="cpu" if active.device == "cpu" else None,
    )
    buffers = {name for name, _ in model.named_buffers()}
    buffers -= {name for name, _ in model.named_non_persistent_buffers()}
    if reads_once and buffers:
        # accelerate 1.15 takes every entry of the state dict, buffers too, for a parameter
        os.environ[launch.READS_ONCE_VARIABLE] = "false"
        model = load_model(recipe, tokenizer)
    meet()
    families.prepare_for_training(model)
    return model


def build_trainer(
    recipe: Recipe,
    args: SFTConfig | DPOConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    run: RunDirectory,
    stop: StopRequest,
    guard: Mapping[str, object],
) -> CountingTrainer:
    """Return the trainer, with the adapter (if the recipe has one) already on the model."""
    autocast = upstream.autocast_dtype(args)
    is_half = model.dtype.itemsize == 2
    if recipe.quantization and autocast and is_half and model.dtype != autocast:
        found = str(model.dtype).removeprefix("torch.")
        wanted = str(autocast).removeprefix("torch.")
        what = f"the checkpoint is {found} and autocast {wanted}: torch refuses to mix the two"
        raise recipe.error("model.dtype", what, f"set model.dtype: {wanted}")
    joins_rows = choose_attention(recipe, args, model)
    trainer_class: type[CountingTrainer] = SupervisedTrainer
    if recipe.stage == DPO:
        trainer_class = PreferenceTrainer
    lora = upstream.build_lora_config(recipe)
    if lora is not None:
        lora = families.settle_targets(lora, model)
    if lora is not None and getattr(args, "disable_dropout", False):
        lora.lora_dropout = 0.0  # TRL switches it off, and adapter_config.json would say otherwise
    if args.router_aux_loss_coef is None and not families.adds_router_loss(model, recipe.lora):
        args.router_aux_loss_coef = 0.0
    train = data.train
    is_packed = bool(recipe.train.get("packing"))
    if recipe.train.get("shuffle_dataset"):
        # not in a file beside the rows, which the next start would use unchecked
        train = train.shuffle(seed=args.seed, keep_in_memory=True, load_from_cache_file=False)
    columns = list(trainer_class.columns)
    validation = None
    if data.validation and args.eval_strategy != "no":
        validation = data.validation.select_columns(columns)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=_training_rows(train.select_columns(columns), recipe, args),
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[MetricsCallback(run.metrics)],
        stop=stop,
        row_ids=None if is_packed else list(train["example_id"]),
        keep=recipe.train.get("save_total_limit"),
        guard=guard,
    )
    if joins_rows:  # `args.padding_free` cannot say so: it depends on the loaded model
        trainer.data_collator = dataclasses.replace(trainer.data_collator, padding_free=True)
    if trainer.is_fsdp_enabled:
        gradients = trainer.accelerator.gradient_state
        gradients.plugin_kwargs["sync_each_batch"] = sync_each_batch(recipe)
    if args.fp16:
        # Loss scaling cannot undo the scale of gradients of fewer bits than float32, and TRL makes
        # the adapters of a quantized base bfloat16.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.float()
    if any(recipe.train.get(key) for key in upstream.COMPILE_KEYS):
        compile_blocks(trainer.model, recipe)
        trainer.is_compiled = True
    if lora is not None:
        upstream_fixes.save_new_rows(trainer.model)
    upstream_fixes.tell_empty_parameters_apart(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            trainer.precision[name] = parameter.dtype
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def compile_blocks(model: Any, recipe: Recipe) -> None:
    """Have each decoder block compiled when it is first used, once for all blocks of its kind."""
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    backend = recipe.train.get("torch_compile_backend") or "inductor"
    mode = recipe.train.get("torch_compile_mode")
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            # not `block.compile()`, which takes hooks along: FSDP2 gathers weights in one
            block.forward = torch.compile(block.forward, backend=backend, mode=mode)


def choose_attention(recipe: Recipe, args: SFTConfig | DPOConfig, model: PreTrainedModel) -> bool:
    """Choose how the examples of a micro-batch share a row; return whether each micro-batch becomes
    one row without padding. A recipe that says `padding_free` itself, or packs, is left alone.
    """
    requested = recipe.model.attn_implementation
    on_cpu = args.device.type == "cpu"
    if requested == VARLEN:
        why = families.why_not_varlen(model)
        if why:
            raise recipe.error("model.attn_implementation", f"varlen {why}", "leave the key out")
    if requested is not None and attention.is_flash(requested) and not on_cpu:
        why = _why_no_flash(requested, args, model)
        if why:
            hint = "leave the key out, or set train.bf16: true where the GPU has it"
            raise recipe.error("model.attn_implementation", f"{requested} {why}", hint)
    if recipe.stage == DPO:  # TRL pads pairs
        return False
    is_wrapped = args.packing and args.packing_strategy == "wrapped"
    if is_wrapped or recipe.train.get("padding_free") is False:
        return False

    joined_by_recipe = bool(recipe.train.get("padding_free") or args.packing)
    may_join = joined_by_recipe or args.per_device_train_batch_size > 1 or requested == VARLEN
    if on_cpu:
        separates = attention.use_document_attention(model)
    else:
        separates = may_join and _use_kernel_of_gpu(recipe, args, model, joined_by_recipe)
    if not joined_by_recipe and not (may_join and separates):
        return False
    why = families.why_rows_apart(model)
    # rank 0 has the weights, the others may not
    if why is None and on_main_rank(lambda: attention.examples_are_read_by_others(model)):
        kernel = model.config._attn_implementation
        why = f"lets an example read those before it in its row (attention {kernel})"
    if why and joined_by_recipe:
        key = "train.packing" if args.packing else "train.padding_free"
        raise recipe.error(key, f"{key}: {type(model).__name__} {why}", f"set {key}: false")
    if why:
        say_once(f"rows keep their padding: {type(model).__name__} {why}")
        return False
    return not joined_by_recipe  # TRL joins those of a recipe that says so


def _use_kernel_of_gpu(
    recipe: Recipe, args: SFTConfig | DPOConfig, model: PreTrainedModel, joined_by_recipe: bool
) -> bool:
    """Switch a model on a GPU to `varlen` where its recipe leaves that open; return whether its
    kernel is told where examples end: sdpa would compute a mask of all tokens of a joined row.
    """
    requested = recipe.model.attn_implementation
    if requested == VARLEN:
        attention.use_varlen(model)
        return True
    kernel = str(model.config._attn_implementation)
    if requested is not None or kernel != "sdpa":
        return attention.is_flash(kernel)
    why = families.why_not_varlen(model) or _why_no_flash(VARLEN, args, model)
    if why is None:
        attention.use_varlen(model)
        return True
    if joined_by_recipe:
        say_once(f"sdpa masks all tokens of a joined row, which takes time: varlen {why}")
    return False


def _why_no_flash(kernel: str, args: SFTConfig | DPOConfig, model: PreTrainedModel) -> str | None:
    """Why a kernel cannot compute the model on rank 0's GPU, for all ranks; or None."""
    dtype = upstream.autocast_dtype(args) or model.dtype
    return on_main_rank(lambda: attention.why_no_flash(kernel, model, dtype, args.device))


def _training_rows(rows: Dataset, recipe: Recipe, args: SFTConfig | DPOConfig) -> Dataset:
    if recipe.train.get("packing"):
        # not in a file beside the rows, which the next start would use unchecked
        options = {"keep_in_memory": True, "load_from_cache_file": False}
        rows = pack_dataset(rows, args.max_length, args.packing_strategy, options)
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if len(rows) < step:
        whole = recipe.run.global_batch_size
        raise recipe.error(
            "run.global_batch_size" if whole else "train.per_device_train_batch_size",
            f"{len(rows)} training rows do not fill one step of {step}: nothing would be trained",
            f"set run.global_batch_size to {len(rows)} or less, or give more rows",
        )
    return rows


def start_up_lines(trainer: CountingTrainer, launch_line: str) -> list[str]:
    """Return what is really active, the batch arithmetic and what is trained."""
    args = trainer.args
    model = trainer.model
    batches = trainer.batches
    num_rows = len(trainer.lengths)
    precision = str(model.dtype).removeprefix("torch.")
    if args.bf16:
        precision = "bf16 mixed"
    elif args.fp16:
        precision = "fp16 mixed"
    joined = ""
    if getattr(args, "packing", False):
        joined = ", packed"
    elif getattr(trainer.data_collator, "padding_free", False):
        joined = ", no padding"
    size = batches.global_batch
    epoch, steps = launch.planned_steps(num_rows, size, args.num_train_epochs, args.max_steps)
    left_out = ""
    if num_rows % size and steps >= epoch:
        left_out = f"; left out because they do not fill a step: {num_rows % size}"
    num_trained = model.num_parameters(only_trainable=True)
    trained = f"{num_trained:,} of {model.num_parameters():,} parameters"
    num_quantized = count_quantized(model)
    if num_quantized:
        trained += f"; base quantized in {num_quantized} layers"
    if trainer.aux_loss_enabled:
        trained += f"; router loss x {trainer.router_aux_loss_coef:g}"
    if isinstance(model, PeftModel):
        trained += f"; {families.describe_targets(model)}"
    lines = [
        f"launch: {launch_line}; precision {precision}; attention"
        f" {model.config._attn_implementation}{joined}",
        f"batch: {batches.per_device} per device x {batches.accumulation} accumulation x"
        f" {count(batches.world_size, 'rank')} = {size} {trainer.unit} per step;"
        f" {num_rows:,} {trainer.unit} -> {epoch:,} steps per epoch, {steps:,} steps{left_out}",
        f"trains: {trained}",
        *trainer.describe(),
    ]
    untrained = families.untrained_rows(model, getattr(model, "rows_added", 0))
    if untrained:
        lines.append(f"note: {untrained}")
    return lines


def count_quantized(model: Any) -> int:
    """Return the number of layers in 4 or 8 bits, which FSDP shards, too."""
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return sum(isinstance(module, kinds) for module in model.modules())
