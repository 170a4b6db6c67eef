"""Puts model, data and recipe together into a trainer. Every departure from TRL's own preparation
is listed here.

TRL's dataset preparation is skipped: `data.preparation` has already tokenised, masked, truncated
and audited the rows, so that nothing is dropped without being named. Packing is still TRL's
`pack_dataset`.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, pack_dataset

from recipes_lib.config.batch import sync_each_batch
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.upstream import build_lora_config
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.data.preparation import PreparedData
from recipes_lib.models.architectures import prepare_for_training, settle_targets, why_rows_apart
from recipes_lib.training.batches import ROW, with_fillers
from recipes_lib.training.cpu import attention as cpu_attention
from recipes_lib.training.metrics import MetricsCallback
from recipes_lib.training.stopping import StopRequest
from recipes_lib.training.trainer import RecipeTrainer


def build_trainer(
    recipe: Recipe,
    args: SFTConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    run: RunDirectory,
    stop: StopRequest,
    marker_facts: dict[str, Any],
) -> RecipeTrainer:
    """Return the trainer, with the adapter (if the recipe has one) already on the model.

    Args:
        args: what `recipe.upstream.build_sft_config` returned.
        marker_facts: recorded in every checkpoint's marker.

    Raises:
        RecipeError: a 4-bit base whose `model.dtype: auto` became the other half precision than
            autocast's.
    """
    check_half_precision(recipe, args, model)
    attention = attention_of(recipe, args, model)
    prepare_for_training(model)
    lora = build_lora_config(recipe)
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=_training_rows(data.train, recipe, args),
        eval_dataset=_validation_rows(data.validation, args),
        processing_class=tokenizer,
        peft_config=lora and settle_targets(lora, model),
        callbacks=[MetricsCallback(run.metrics, quiet=args.process_index != 0)],
        stop=stop,
        keep_checkpoints=recipe.train.get("save_total_limit"),
        flattens=padding_costs_nothing_to_drop(recipe, args, model, attention),
        max_tokens=recipe.run.max_tokens_per_micro_batch,
        row_ids=list(data.train["example_id"]),
        marker_facts=marker_facts,
    )
    if trainer.is_fsdp_enabled:
        trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = sync_each_batch(
            recipe
        )
    if args.fp16:
        raise_trained_weights(trainer.model)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def check_half_precision(recipe: Recipe, args: SFTConfig, model: PreTrainedModel) -> None:
    """Refuse what `recipe.combinations` cannot see: the precision that `model.dtype: auto` found in
    the checkpoint.
    """
    half = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None
    if recipe.quantization and half and model.dtype.itemsize == 2 and model.dtype != half:
        found, wanted = (str(dtype).removeprefix("torch.") for dtype in (model.dtype, half))
        what = (
            f"the checkpoint is {found} and autocast {wanted}: quantized layers would mix the two,"
            " which torch refuses"
        )
        raise recipe.error("model.dtype", what, f"set model.dtype: {wanted}")


def raise_trained_weights(model: Any) -> None:
    """Give the trained weights float32, as fp16 training needs: its loss scaling cannot undo the
    scale of gradients of fewer bits.

    TRL makes the adapters of a quantized base bfloat16, whatever `train.fp16` says, and torch has
    no unscaling of bfloat16 gradients on a GPU: the first step would end in an error.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def attention_of(recipe: Recipe, args: SFTConfig, model: PreTrainedModel) -> str:
    """Return the name of the model's attention, after switching it to document attention where that
    is the fastest (a CPU).
    """
    whole_text_rows = args.packing and args.packing_strategy == "wrapped"
    if (
        args.device.type == "cpu"
        and recipe.train.get("padding_free") is not False
        and not whole_text_rows
    ):
        cpu_attention.use_document_attention(model)
    return str(getattr(model.config, "_attn_implementation", ""))


def padding_costs_nothing_to_drop(
    recipe: Recipe, args: SFTConfig, model: PreTrainedModel, attention: str
) -> bool:
    """Whether to flatten each micro-batch into one row, because the attention keeps its examples
    apart at no cost; the loss stays the same.

    That is flash attention on a GPU and `cpu.attention` on a CPU, in a model that has no other
    layers over tokens. A recipe that says `padding_free` itself, or packs, is left alone.
    """
    undecided = (
        "padding_free" not in recipe.train and not args.packing and not why_rows_apart(model)
    )
    return (
        undecided
        and ("flash" in attention or attention == cpu_attention.NAME)
        and args.per_device_train_batch_size > 1
    )


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
        what = (
            f"train.dataloader_drop_last leaves nothing to train: {len(rows)} examples do not fill"
            f" a step of {step}"
        )
        raise recipe.error(
            "train.dataloader_drop_last",
            what,
            "set it to false, or make run.global_batch_size smaller",
        )
    return rows


def _validation_rows(validation: Dataset | None, args: SFTConfig) -> Dataset | None:
    """The validation rows, filled up with rows that carry no loss so that every rank gets the same
    number of full batches.

    Otherwise accelerate repeats the first rows in the last batch, and the validation loss depends
    on the number of ranks.
    """
    if validation is None or not len(validation) or args.eval_strategy == "no":
        return None
    rows = validation.select_columns(["input_ids", "labels"])
    missing = -len(rows) % (args.per_device_eval_batch_size * args.world_size)
    return with_fillers(rows, missing) if missing else rows
