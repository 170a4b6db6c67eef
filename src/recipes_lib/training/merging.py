"""Writing `merged/`: a whole model that needs no PEFT, no bitsandbytes and no base beside it.

What is written is loaded again and compared with the adapter on real prompts before it gets its
name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.core.atomic_files import publish, write_json
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipesError
from recipes_lib.core.faults import explain_fault
from recipes_lib.core.run_lock import run_lock
from recipes_lib.core.terminal import shown_size
from recipes_lib.training.adapters import (
    RECORD,
    check_space,
    file_sizes,
    fold,
    free_memory,
    load_merged,
    merge_record,
    why_stale,
)
from recipes_lib.training.base_identity import ADAPTER_WEIGHTS, recorded_hashes, weight_hashes
from recipes_lib.training.card import quantized_bits, write_card
from recipes_lib.training.probes import real_prompts
from recipes_lib.training.trained import Family, TrainedRun, check_base_of, check_weights
from recipes_lib.training.verification import FoldComparison, adapter_logits, compare_folded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REJECTED = "merged.rejected"
SHARD = "5GB"


@dataclass(frozen=True)
class Merge:
    """A merged model on the disk, and what was measured on it."""

    folder: Path
    record: dict[str, Any]
    already: bool


def merge(trained: TrainedRun, dtype: str | None, report: Callable[[str], None]) -> Merge:
    """Write `merged/` of a LoRA or QLoRA run, or find that it is there and up to date.

    Args:
        trained: a finished run.
        dtype: precision of the merged weights; None for that of the base in memory.
        report: is told what happens, a line at a time.

    Raises:
        RecipeError: a full fine-tuning, or another base than the adapter's.
        EnvironmentFault: not enough disk space, another process works on the run, or the base
            cannot be had.
        RecipesError: the merged model does not answer like the adapter; it is kept in
            `merged.rejected/`.
    """
    name = trained.run.name
    if trained.full:
        what = f"run '{name}' is a full fine-tuning: its model is whole, there is nothing to merge"
        raise RecipeError(
            what, f"use {trained.weights} as it is, or: recipes export {name} --to DIR"
        )
    check_base_of(trained)
    check_weights(trained)
    with run_lock(trained.run.path):
        record = merge_record(trained)
        if record is not None:
            stale = why_stale(trained, record, dtype, contents=True)
            if stale is None:
                return Merge(trained.merged, record, already=True)
            report(f"making merged/ again: {stale}")
        return _merge(trained, dtype, report)


def _merge(trained: TrainedRun, dtype: str | None, report: Callable[[str], None]) -> Merge:
    import torch

    scratch = trained.run.path / "merged.unchecked"
    shutil.rmtree(scratch, ignore_errors=True)
    report(f"loading {trained.recipe.model.name_or_path} and the adapter ...")
    family = Family([trained])
    tokenizer = family.tokenizer
    prompts = real_prompts(trained, tokenizer)
    logits = adapter_logits(family, trained, prompts)
    before, precision = (
        _size(family.model.get_base_model()),
        str(family.model.dtype).removeprefix("torch."),
    )
    model = fold(trained, family, getattr(torch, dtype) if dtype else None)
    written = str(model.dtype).removeprefix("torch.")
    if trained.recipe.quantization is not None:
        report(_dequantisation_note(trained, before, _size(model), written))
    check_space(
        trained.run.path, _size(model), "the merged model", " and run the same command again"
    )
    report(f"writing {shown_size(_size(model))} in {written} ...")
    _save(model, tokenizer, scratch)
    del model
    free_memory()
    report("loading what was written, to compare it with the adapter ...")
    again = load_merged(scratch, trained, tokenizer, written)
    comparison = compare_folded(trained, logits, again, prompts, precision)
    del again
    free_memory()
    record = _record(trained, written, comparison)
    if comparison.problems:
        rejected = _set_aside(scratch)
        raise RecipesError(
            f"the merged model is not the adapter on its base: {comparison.problems[0]}",
            f"it is kept in {rejected}",
        )
    write_card(
        scratch, trained.recipe, trained.run.read_state().get("summary") or {}, merged=record
    )
    write_json(
        scratch / RECORD,
        {**record, "files": file_sizes(scratch), "sha256": recorded_hashes(scratch)},
    )
    publish(scratch, trained.merged)
    shutil.rmtree(trained.merged.with_name(REJECTED), ignore_errors=True)
    return Merge(trained.merged, merge_record(trained) or record, already=False)


def _dequantisation_note(trained: TrainedRun, before: int, after: int, dtype: str) -> str:
    """Return what dequantising costs and what it cannot bring back."""
    return (
        f"dequantised the {quantized_bits(trained.recipe)}-bit base first: {shown_size(before)}"
        f" became {shown_size(after)} in {dtype}\nwhat quantization took from the original weights"
        " stays lost: the adapter was trained on what was left"
    )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    settings = model.generation_config
    if (
        settings is not None
        and not settings.do_sample
        and (settings.temperature not in (None, 1.0) or settings.top_p not in (None, 1.0))
    ):
        settings.do_sample = (
            True  # as Llama-2's file has it; upstream refuses to save sampling values without it
        )
    try:
        model.save_pretrained(folder, max_shard_size=SHARD)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, OSError) and explain_fault(error) is None:
            raise
        raise EnvironmentFault(
            f"the merged model could not be written: {error}", "nothing was left behind"
        ) from error


def _record(trained: TrainedRun, dtype: str, comparison: FoldComparison) -> dict[str, Any]:
    return {
        "run": trained.run.name,
        "base": trained.recipe.model.name_or_path,
        "adapter_sha256": weight_hashes(trained.weights)[ADAPTER_WEIGHTS],
        "dtype": dtype,
        "dequantised": trained.recipe.quantization is not None,
        "check": comparison.as_dict(),
    }


def _set_aside(scratch: Path) -> Path:
    rejected = scratch.with_name(REJECTED)
    shutil.rmtree(rejected, ignore_errors=True)
    os.replace(scratch, rejected)
    return rejected


def _size(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
