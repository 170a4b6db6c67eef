"""Puts model, data and recipe together into a trainer, and says what came out.

TRL's dataset preparation is skipped: `data.prepare` has tokenised, masked, truncated and
audited the rows, so that nothing is dropped without being named. Packing is TRL's `pack_dataset`.
"""

from __future__ import annotations

import functools
from typing import Any

import bitsandbytes
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, pack_dataset

from recipes_lib.config.batch import (
    describe_batch,
    describe_last_step,
    describe_schedule,
    planned_steps,
    sync_each_batch,
)
from recipes_lib.config.constraints import COMPILE_KEYS, VARLEN
from recipes_lib.config.model_names import varlen_refused
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.upstream import build_lora_config
from recipes_lib.core.ranks import say_once
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.data.prepare import PreparedData
from recipes_lib.models.architectures import (
    describe_experts,
    describe_targets,
    prepare_for_training,
    settle_targets,
    why_not_varlen,
    why_rows_apart,
)
from recipes_lib.training import varlen
from recipes_lib.training.batches import ROW, with_fillers
from recipes_lib.training.checkpoints import MarkerFacts
from recipes_lib.training.compiled import compile_blocks
from recipes_lib.training.cpu import attention as cpu_attention
from recipes_lib.training.metrics import MetricsCallback
from recipes_lib.training.reading import prepare_to_share
from recipes_lib.training.stopping import StopRequest
from recipes_lib.training.trainer import RecipeTrainer
from recipes_lib.weights.base import precision_name

_ATTENTION_KERNELS = ("scaled_dot_product", "flash_attn", "varlen_attn")
NOT_ASKED = ("none", "all", "flyte")  # transformers does not say whether flyte is there


def check_trackers(recipe: Recipe, args: SFTConfig) -> None:
    """Refuse a tracker that is not installed; the Trainer would say so after the model was loaded.

    Raises:
        EnvironmentFault: with the way to install it.
    """
    missing = sorted(set(args.report_to) - {*NOT_ASKED, *get_available_reporting_integrations()})
    if missing:
        raise recipe.fault(
            "train.report_to",
            f"train.report_to: {', '.join(missing)} is not installed",
            "pip install -c constraints.txt -e '.[tracking]' brings tensorboard, trackio and wandb;"
            " or train.report_to=none",
        )


def build_trainer(
    recipe: Recipe,
    args: SFTConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    run: RunDirectory,
    stop: StopRequest,
    marker_facts: MarkerFacts,
    *,
    tokens_per_pass: int | None = None,
) -> RecipeTrainer:
    """Return the trainer, with the adapter (if the recipe has one) already on the model.

    Args:
        tokens_per_pass: cap that the free memory allows (`Plan.tokens_per_pass`), for a recipe
            without one.

    Raises:
        EnvironmentFault: the ranks have unlike models.
        RecipeError: a 4-bit base whose `model.dtype: auto` became the other half precision than
            autocast's.
    """
    half = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None
    if recipe.quantization and half and model.dtype.itemsize == 2 and model.dtype != half:
        found, wanted = precision_name(model.dtype), precision_name(half)
        what = (
            f"the checkpoint is {found} and autocast {wanted}: quantized layers would mix the two,"
            " which torch refuses"
        )
        raise recipe.error("model.dtype", what, f"set model.dtype: {wanted}")
    choose_attention(recipe, args, model, half)
    attention = str(getattr(model.config, "_attn_implementation", ""))
    prepare_for_training(model)
    if (recipe.train.get("activation_checkpointing_kwargs") or {}).get("selective"):
        keep_attention(model)
    lora = build_lora_config(recipe)
    step_tokens: list[int] = []
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=_training_rows(data.train, recipe, args),
        eval_dataset=_validation_rows(data.validation, args),
        processing_class=tokenizer,
        peft_config=lora and settle_targets(lora, model),
        callbacks=[MetricsCallback(run.metrics, args.process_index != 0, step_tokens)],
        stop=stop,
        keep_checkpoints=recipe.train.get("save_total_limit"),
        flattens=padding_costs_nothing_to_drop(recipe, args, model, attention),
        max_tokens=recipe.run.max_tokens_per_micro_batch,
        row_ids=list(data.train["example_id"]),
        marker_facts=marker_facts,
        step_tokens=step_tokens,
    )
    by_bounds = attention == VARLEN or "flash" in attention
    if (
        trainer.max_tokens is None
        and by_bounds
        and trainer.data_collator.collate.padding_free
        and trainer.scored_here
        and not trainer.aux_loss_enabled  # it is one of a micro-batch
    ):
        trainer.max_tokens, trainer.cap_is_chosen = tokens_per_pass, True
    marker_facts["tokens_per_pass"] = trainer.max_tokens
    if trainer.is_fsdp_enabled:
        kwargs = trainer.accelerator.gradient_state.plugin_kwargs
        kwargs["sync_each_batch"] = sync_each_batch(recipe)
    if args.fp16:
        # Loss scaling cannot undo the scale of gradients of fewer bits than float32. TRL makes the
        # adapters of a quantized base bfloat16, whatever `train.fp16` says, and torch has no
        # unscaling of bfloat16 gradients on a GPU: the first step would end in an error.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.float()
    if any(recipe.train.get(key) for key in COMPILE_KEYS):
        trainer.add_callback(compile_blocks(trainer.model, recipe.train, run.path / "compiled"))
    prepare_to_share(trainer.model)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def keep_attention(model: PreTrainedModel) -> None:
    """Have activation checkpointing keep what attention's kernel returns (`selective`). TRL 1.16's
    own is a method that transformers 5.24 does not call, and does not know `varlen`.
    """
    enable = model.activation_checkpointing_enable
    contexts = functools.partial(create_selective_checkpoint_contexts, attention_is_kept)

    def enable_keeping(
        activation_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        how = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        enable(activation_checkpointing_kwargs={**how, "context_fn": contexts}, **more)

    model.activation_checkpointing_enable = enable_keeping


def attention_is_kept(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return what selective checkpointing does with an operator's result."""
    if any(name in str(operator) for name in _ATTENTION_KERNELS):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def choose_attention(
    recipe: Recipe, args: SFTConfig, model: PreTrainedModel, half: torch.dtype | None
) -> None:
    """Switch a model from sdpa to an attention that takes several examples in one row without a
    mask, where rows come so and the recipe names none.

    Args:
        half: the precision of the training's products, None for float32.

    Raises:
        RecipeError: `varlen` was asked for, and cannot be had.
    """
    named, on_cpu = recipe.model.attn_implementation, args.device.type == "cpu"
    why = why_not_varlen(model) or (None if on_cpu else varlen.why_not_here(half))
    if why is None and half is not None and not on_cpu and named in (None, VARLEN):
        why = varlen.why_it_fails(model, half, args.device)
        if why and named is None:
            say_once(f"warning: {VARLEN} attention {why}; sdpa trains, with padding")
    if why and named == VARLEN:
        raise varlen_refused(recipe, why)
    wrapped = args.packing and args.packing_strategy == "wrapped"
    if wrapped or recipe.train.get("padding_free") is False:
        return
    if on_cpu:
        cpu_attention.use_document_attention(model)
        return
    several = args.per_device_train_batch_size * args.gradient_accumulation_steps > 1
    joined = args.packing or args.padding_free or several
    if named == VARLEN or (named is None and joined and not why):
        varlen.use_varlen(model)


def padding_costs_nothing_to_drop(
    recipe: Recipe, args: SFTConfig, model: PreTrainedModel, attention: str
) -> bool:
    """Whether to flatten each micro-batch into one row, because the attention keeps its examples
    apart at no cost. A recipe that says `padding_free` itself, or packs, is left alone.
    """
    decided = "padding_free" in recipe.train or args.packing
    apart = "flash" in attention or attention in (cpu_attention.NAME, VARLEN)
    # rows of several micro-batches share a pass up to a cap, which a GPU chooses by itself
    shared = args.gradient_accumulation_steps > 1 and (
        "flash" in attention or recipe.run.max_tokens_per_micro_batch is not None
    )
    several = args.per_device_train_batch_size > 1 or attention == VARLEN or shared
    return not decided and apart and several and not why_rows_apart(model)


def _training_rows(train: Dataset, recipe: Recipe, args: SFTConfig) -> Dataset:
    rows = train.remove_columns("example_id").add_column(ROW, list(range(len(train))))
    if args.shuffle_dataset:
        rows = rows.shuffle(seed=args.seed)
    if args.packing:
        rows = pack_dataset(
            rows.select_columns(["input_ids", "labels"]),
            recipe.train["max_length"],
            args.packing_strategy,
        )
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.dataloader_drop_last and len(rows) < step:
        raise recipe.error(
            "train.dataloader_drop_last",
            f"train.dataloader_drop_last leaves nothing to train: {len(rows)} examples do not fill"
            f" a step of {step}",
            "set it to false, or make run.global_batch_size smaller",
        )
    return rows


def _validation_rows(validation: Dataset | None, args: SFTConfig) -> Dataset | None:
    """The validation rows, filled up so that every rank gets as many full batches: accelerate would
    repeat the first rows, and the loss depend on the number of ranks.
    """
    if validation is None or not len(validation) or args.eval_strategy == "no":
        return None
    rows = validation.select_columns(["input_ids", "labels"])
    missing = -len(rows) % (args.per_device_eval_batch_size * args.world_size)
    return with_fillers(rows, missing) if missing else rows


# ---- What a training says before its first step ----


def settled(trainer: RecipeTrainer) -> dict[str, str | int]:
    """Return what run.json keeps of the choices that only the trainer makes."""
    return {} if trainer.max_tokens is None else {"tokens_per_pass": trainer.max_tokens}


def start_up_lines(trainer: RecipeTrainer, launch_line: str) -> list[str]:
    """Return the batch arithmetic, what is trained, and what is really active."""
    args, model = trainer.args, trainer.model
    flat = args.padding_free or trainer.flattens
    padding = ", padding-free" if flat else ", packed" if args.packing else ""
    precision = (
        "bf16 mixed" if args.bf16 else "fp16 mixed" if args.fp16 else precision_name(model.dtype)
    )
    attention = getattr(model.config, "_attn_implementation", "unknown")
    shape = {
        "per_device": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "world_size": args.world_size,
    }
    rows, drop_last = len(trainer.train_dataset), args.dataloader_drop_last
    per_epoch, total = steps = planned_steps(
        rows,
        **shape,
        epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        drop_last=drop_last,
    )
    scheduler = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    lines = [
        f"launch: {launch_line}; precision {precision}; attention {attention}{padding}; seed"
        f" {args.seed}",
        f"batch: {describe_batch(rows, steps, **shape)}",
    ]
    if trainer.max_tokens is not None:
        whence = "what the GPU has room for" if trainer.cap_is_chosen else "the recipe's cap"
        what = "the rows of a step go together" if flat or args.packing else "micro-batches are cut"
        lines.append(f"passes: {what}, up to {trainer.max_tokens:,} tokens a pass ({whence})")
    last = describe_last_step(rows, **shape, drop_last=drop_last)
    if last and total >= per_epoch:
        lines.append(f"epoch: {last}")
    schedule = describe_schedule(scheduler, args.learning_rate, args.warmup_steps, total)
    raised = trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision != "no"
    lines += [f"schedule: {schedule}", f"trains: {describe_trainable(model, raised=raised)}"]
    if isinstance(model, PeftModel):
        lines.append(describe_targets(model))
    weight = trainer.router_aux_loss_coef if trainer.aux_loss_enabled else 0.0
    if experts := describe_experts(model, weight):
        lines.append(experts)
    several = args.gradient_accumulation_steps > 1 or trainer.max_tokens is not None
    if trainer.is_fsdp_enabled and several:
        kept = sum(one.numel() for one in model.parameters() if one.requires_grad) * 4 / 2**20
        lines.append(
            "gradients: shared out after every backward pass (sync_each_batch), each rank keeps its"
            " share"
            if trainer.syncs_each_batch
            else "gradients: shared out once per step, each rank keeps all of them until then:"
            f" {kept:,.1f} MiB"
        )
    return lines


def count_quantized(model: Any) -> int:
    """Return the number of 4-bit layers, which FSDP shards, too."""
    return sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())


def describe_trainable(model: Any, *, raised: bool = False) -> str:
    """Return how many parameters are trained, and where they sit.

    Args:
        raised: whether FSDP2 will keep those of half precision in float32, as it does under mixed
            precision.
    """
    parameters, quantized = list(model.parameters()), count_quantized(model)
    trained = [one for one in parameters if one.requires_grad]
    count, total = (sum(one.numel() for one in some) for some in (trained, parameters))
    precision = ", ".join(sorted({precision_name(one.dtype) for one in trained}))
    if raised and not quantized and precision != "float32":
        precision = f"float32 (FSDP2 keeps the {precision} weights so)"
    frozen = {precision_name(one.dtype) for one in parameters if not one.requires_grad}
    kind = ", ".join(sorted(frozen - {"uint8"}))
    kind = f"NF4 in {quantized} layers" if quantized else kind
    return f"{count:,} of {total:,} parameters in {precision}" + (f"; base {kind}" if kind else "")
