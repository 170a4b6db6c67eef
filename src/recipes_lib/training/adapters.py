"""An adapter folded into its base: `merged/`, a whole model that needs no PEFT, no bitsandbytes and no base beside it.

A 4-bit base is loaded afresh and dequantised first. Afresh, because a forward pass on a CPU may repack 4-bit weights in place, and
dequantising the repacked ones gives noise without an error. What is written is loaded again and compared with the adapter on
real prompts before it gets its name.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.atomic_files import publish, write_json
from recipes_lib.errors import EnvironmentFault, RecipeError, RecipesError
from recipes_lib.faults import explain_fault
from recipes_lib.json_files import read_object
from recipes_lib.terminal import shown_size
from recipes_lib.training.base_identity import ADAPTER_WEIGHTS, changed_files, explain_peft_failure, recorded_hashes, weight_hashes
from recipes_lib.training.card import quantized_bits, write_card
from recipes_lib.training.trained import Family, TrainedRun, load_base

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recipes_lib.training.verification import Comparison

RECORD = "merge.json"
REJECTED = "merged.rejected"
SPARE = 1.2  # free space asked for, as a multiple of what is written
SHARD = "5GB"
DTYPES = ("float32", "bfloat16", "float16")


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
        EnvironmentFault: not enough disk space, another process works on the run, or the base cannot be had.
        RecipesError: the merged model does not answer like the adapter; it is kept in `merged.rejected/`.
    """
    from recipes_lib.runs.lock import run_lock
    from recipes_lib.training.trained import check_base_of, check_weights

    name = trained.run.name
    if trained.full:
        what = f"run '{name}' is a full fine-tuning: its model is whole, there is nothing to merge"
        raise RecipeError(what, f"use {trained.weights} as it is, or: recipes export {name} --to DIR")
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


def merge_record(trained: TrainedRun) -> dict[str, Any] | None:
    """Return what is recorded of the run's `merged/`, or None where there is none."""
    file = trained.merged / RECORD
    return read_object(file, f"make it again: recipes merge {trained.run.name}") or None


def why_stale(trained: TrainedRun, record: dict[str, Any], dtype: str | None = None, contents: bool = False) -> str | None:
    """Return why `merged/` is not what merging would give now, or None when it is.

    Args:
        trained: the run.
        record: what `merge_record` returned.
        dtype: the precision asked for; None for any.
        contents: whether to read the files and compare their hashes, not only their sizes.
    """
    if record["adapter_sha256"] != weight_hashes(trained.weights).get(ADAPTER_WEIGHTS):
        return "it was made from another adapter"
    if dtype is not None and record["dtype"] != dtype:
        return f"it is in {record['dtype']}, not in {dtype}"
    found = _sizes(trained.merged)
    damaged = [name for name, size in record["files"].items() if found.get(name) != size]
    if damaged:
        return f"{damaged[0]} in it is missing or damaged"
    changed = changed_files(trained.merged, record["sha256"]) if contents else []
    return f"{changed[0]} in it was changed" if changed else None


def fold(trained: TrainedRun, family: Family, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Fold the adapter of the family's only run into its base, using up the family's model.

    Args:
        trained: the run.
        family: it, loaded; its model must not be used afterwards.
        dtype: precision of the result; None for that of the base in memory.

    Returns:
        A plain model, on the family's device.
    """
    wanted = dtype or family.model.dtype
    if trained.recipe.quantization is None:
        model = family.model
        family.model = None
    else:
        family.model = None
        free_memory()
        model = _on_plain_base(trained, family.tokenizer, wanted)
    if model.dtype.itemsize < wanted.itemsize:
        model = model.to(wanted)
    merged = with_transposed_layers(model.merge_and_unload(safe_merge=True))
    return merged if merged.dtype == wanted else merged.to(wanted)


def with_transposed_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Give a dequantised model the layers of its class: 4-bit ones become linear also where the class has them transposed (GPT-2)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        plain = type(model)(model.config)
    for name, layer in plain.named_modules():
        found = model.get_submodule(name)
        if isinstance(layer, Conv1D) and isinstance(found, torch.nn.Linear):
            layer.weight, layer.bias = torch.nn.Parameter(found.weight.data.T.contiguous()), found.bias
            model.set_submodule(name, layer)
    return model


def load_merged(folder: Path, trained: TrainedRun, tokenizer: PreTrainedTokenizerBase, dtype: str) -> PreTrainedModel:
    """Load a merged model from its files alone."""
    from recipes_lib.training.weights_check import reload

    recipe = trained.recipe
    section = dataclasses.replace(recipe.model, dtype=dtype, resize_embeddings=False)  # type: ignore[arg-type]
    return reload(folder, dataclasses.replace(recipe, model=section), full_finetuning=True, tokenizer=tokenizer).eval()


def unfolded_float32(trained: TrainedRun) -> Any:
    """Load the adapter on its base, dequantised where it is quantized, with all arithmetic in float32."""
    import torch
    from transformers import AutoTokenizer

    model = _on_plain_base(trained, AutoTokenizer.from_pretrained(trained.weights), torch.float32)
    return model.float().eval()


def free_memory() -> None:
    """Give memory of models that nobody refers to any more back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- The stages of a merge ----


def _merge(trained: TrainedRun, dtype: str | None, report: Callable[[str], None]) -> Merge:
    import torch

    from recipes_lib.training.probes import real_prompts
    from recipes_lib.training.verification import adapter_logits, compare_folded

    scratch = trained.run.path / "merged.unchecked"
    shutil.rmtree(scratch, ignore_errors=True)
    report(f"loading {trained.recipe.model.name_or_path} and the adapter ...")
    family = Family([trained])
    tokenizer = family.tokenizer
    prompts = real_prompts(trained, tokenizer)
    logits = adapter_logits(family, trained, prompts)
    before, precision = _size(family.model.get_base_model()), str(family.model.dtype).removeprefix("torch.")
    model = fold(trained, family, getattr(torch, dtype) if dtype else None)
    written = str(model.dtype).removeprefix("torch.")
    if trained.recipe.quantization is not None:
        report(_dequantisation_note(trained, before, _size(model), written))
    _check_space(trained.run.path, _size(model))
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
        raise RecipesError(f"the merged model is not the adapter on its base: {comparison.problems[0]}", f"it is kept in {rejected}")
    write_card(scratch, trained.recipe, trained.run.read_state().get("summary") or {}, merged=record)
    write_json(scratch / RECORD, {**record, "files": _sizes(scratch), "sha256": recorded_hashes(scratch)})
    publish(scratch, trained.merged)
    shutil.rmtree(trained.merged.with_name(REJECTED), ignore_errors=True)
    return Merge(trained.merged, merge_record(trained) or record, already=False)


def _on_plain_base(trained: TrainedRun, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Any:
    """Return the adapter on a fresh copy of its base, which is dequantised to `dtype` where it is quantized."""
    from peft import PeftModel

    base: Any = load_base(trained.recipe, tokenizer)
    if trained.recipe.quantization is not None:
        states = [getattr(parameter, "quant_state", None) for parameter in base.parameters()]
        assert not any(getattr(state, "packing_format_for_cpu", False) for state in states), "repacked by a forward pass"
        base = base.dequantize(dtype=dtype)
    try:
        return PeftModel.from_pretrained(base, str(trained.weights)).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        raise explain_peft_failure(trained.weights, error) from error


def _dequantisation_note(trained: TrainedRun, before: int, after: int, dtype: str) -> str:
    """Return what dequantising costs and what it cannot bring back."""
    return (
        f"dequantised the {quantized_bits(trained.recipe)}-bit base first: "
        f"{shown_size(before)} became {shown_size(after)} in {dtype}\n"
        "what quantization took from the original weights stays lost: the adapter was trained on what was left"
    )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < SPARE * needed:
        raise EnvironmentFault(
            f"disk full: the merged model needs {shown_size(needed)} (and 20% spare), {shown_size(free)} are free in {folder}",
            "free some space and run the same command again; nothing was written",
        )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    settings = model.generation_config
    if settings is not None and not settings.do_sample and (settings.temperature not in (None, 1.0) or settings.top_p not in (None, 1.0)):
        settings.do_sample = True  # as Llama-2's file has it; upstream refuses to save sampling values without it
    try:
        model.save_pretrained(folder, max_shard_size=SHARD)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, OSError) and explain_fault(error) is None:
            raise
        raise EnvironmentFault(f"the merged model could not be written: {error}", "nothing was left behind") from error


def _record(trained: TrainedRun, dtype: str, comparison: Comparison) -> dict[str, Any]:
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


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
