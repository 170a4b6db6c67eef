"""An adapter folded into its base: `merged/`, a whole model that needs no PEFT, no bitsandbytes and
no base beside it.

What is written is loaded again and compared with the adapter on real prompts before it gets its
name. A 4-bit base is loaded afresh and dequantised first. Afresh, because a forward pass on a CPU
may repack 4-bit weights in place, and dequantising the repacked ones gives noise without an error.
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

from recipes_lib.core.atomic_files import publish, write_json
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipesError
from recipes_lib.core.faults import check_space, explain_fault
from recipes_lib.core.json_files import read_object
from recipes_lib.core.run_lock import run_lock
from recipes_lib.core.terminal import shown_size
from recipes_lib.weights.base import (
    ADAPTER_WEIGHTS,
    changed_files,
    explain_peft_failure,
    recorded_hashes,
    weight_hashes,
)
from recipes_lib.weights.card import quantized_bits, write_card
from recipes_lib.weights.check import (
    EXACT_TOLERANCE,
    LogitsComparison,
    Prompts,
    compare_logits,
    logits_on,
    real_prompts,
    reload,
    rerouted_share,
)
from recipes_lib.weights.finished_run import (
    BASE,
    Family,
    TrainedRun,
    check_base_of,
    check_weights,
    load_base,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Measured on SmolLM2-135M, rank 8: merging in bfloat16 costs 3-5% of the effect on average and 4-6%
# of the largest logit at most, of which the arithmetic in bfloat16 alone is 3%; a 4-bit adapter
# merged into the original 16-bit base is 32% and 39% off.
LOST_LIMIT = 0.25
FOLD_TOLERANCE = 0.15
RECORD = "merge.json"
REJECTED = "merged.rejected"
SHARD = "5GB"


def merge_record(trained: TrainedRun) -> dict[str, Any] | None:
    """Return what is recorded of the run's `merged/`, or None where there is none."""
    file = trained.merged / RECORD
    return read_object(file, f"make it again: recipes merge {trained.run.name}") or None


def why_stale(
    trained: TrainedRun, record: dict[str, Any], dtype: str | None = None, contents: bool = False
) -> str | None:
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
    found = file_sizes(trained.merged)
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
    """Give a dequantised model the layers of its class: 4-bit ones become linear also where the
    class has them transposed (GPT-2).
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        plain = type(model)(model.config)
    for name, layer in plain.named_modules():
        found = model.get_submodule(name)
        if isinstance(layer, Conv1D) and isinstance(found, torch.nn.Linear):
            layer.weight, layer.bias = (
                torch.nn.Parameter(found.weight.data.T.contiguous()),
                found.bias,
            )
            model.set_submodule(name, layer)
    return model


def load_merged(
    folder: Path, trained: TrainedRun, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> PreTrainedModel:
    """Load a merged model from its files alone."""
    recipe = trained.recipe
    section = dataclasses.replace(recipe.model, dtype=dtype, resize_embeddings=False)  # type: ignore[arg-type]
    return reload(
        folder,
        dataclasses.replace(recipe, model=section),
        full_finetuning=True,
        tokenizer=tokenizer,
    ).eval()


def unfolded_float32(trained: TrainedRun) -> Any:
    """Load the adapter on its base, dequantised where it is quantized, with all arithmetic in
    float32.
    """
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


def _on_plain_base(
    trained: TrainedRun, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> Any:
    """Return the adapter on a fresh copy of its base, which is dequantised to `dtype` where it is
    quantized.
    """
    from peft import PeftModel

    base: Any = load_base(trained.recipe, tokenizer)
    if trained.recipe.quantization is not None:
        states = [getattr(parameter, "quant_state", None) for parameter in base.parameters()]
        assert not any(getattr(state, "packing_format_for_cpu", False) for state in states), (
            "repacked by a forward pass"
        )
        base = base.dequantize(dtype=dtype)
    try:
        return PeftModel.from_pretrained(base, str(trained.weights)).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        raise explain_peft_failure(trained.weights, error) from error


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of a folder's weight files."""
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}


@dataclass(frozen=True)
class AdapterLogits:
    """Logits of one run's base and adapter on the same prompts, shape (tokens, vocabulary) each."""

    base: torch.Tensor
    adapter: torch.Tensor


@dataclass(frozen=True)
class FoldComparison:
    """A folded adapter against the adapter on its base.

    Args:
        prompts: what both were asked.
        difference: folded against adapter.
        effect: adapter against bare base: what the adapter does.
        computed_in: precision of the arithmetic on both sides.
    """

    prompts: str
    difference: LogitsComparison
    effect: LogitsComparison
    computed_in: str

    @property
    def lost(self) -> float:
        """The mean difference as a share of the adapter's mean effect."""
        return self.difference.mean / self.effect.mean if self.effect.mean else float("inf")

    @property
    def problems(self) -> list[str]:
        """Why the two are not the same; empty when they are."""
        found = []
        difference = self.difference
        if not difference.agrees:
            allowed = difference.tolerance * difference.scale
            found.append(
                f"logits differ by {difference.largest:.3g} where {allowed:.3g} is allowed"
            )
        if self.lost > LOST_LIMIT:
            found.append(
                f"the mean difference is {self.lost:.0%} of what the adapter changes,"
                f" {LOST_LIMIT:.0%} is allowed: its effect is lost in rounding (try --dtype"
                " float32), or these are not its weights"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for a record or for --json."""
        return {
            "prompts": self.prompts,
            "computed_in": self.computed_in,
            "difference": self.difference.as_dict(),
            "adapter_effect": {
                key: value
                for key, value in dataclasses.asdict(self.effect).items()
                if key != "tolerance"
            },
            "lost_share": self.lost,
            "lost_limit": LOST_LIMIT,
            "agrees": not self.problems,
        }


def adapter_logits(family: Family, trained: TrainedRun, prompts: Prompts) -> AdapterLogits:
    """Return the logits of the bare base and of the adapter on it."""
    logits = []
    for name in (BASE, trained.run.name):
        with family.using(name) as model:
            logits.append(logits_on(model, prompts.rows))
    return AdapterLogits(*logits)


def compare_folded(
    trained: TrainedRun,
    logits: AdapterLogits,
    folded: PreTrainedModel,
    prompts: Prompts,
    precision: str,
) -> FoldComparison:
    """Compare a folded model with the adapter on its base.

    Args:
        trained: the run.
        logits: of base and adapter.
        folded: the folded model; it may be turned into float32.
        prompts: what `logits` were computed on.
        precision: of the base in memory when they were.
    """
    written = str(folded.dtype).removeprefix("torch.")
    exact = trained.recipe.quantization is None and {precision, written} == {"float32"}
    rerouted = rerouted_share(folded)
    first = _compare(logits, logits_on(folded, prompts.rows), prompts, exact, precision, rerouted)
    if exact or first.lost <= LOST_LIMIT:
        return first
    free_memory()
    again = logits_on(folded.float(), prompts.rows)
    model = unfolded_float32(trained)
    with model.disable_adapter():
        base = logits_on(model, prompts.rows)
    return _compare(
        AdapterLogits(base, logits_on(model, prompts.rows)),
        again,
        prompts,
        written == "float32",
        "float32",
        rerouted,
    )


def _compare(
    logits: AdapterLogits,
    folded: torch.Tensor,
    prompts: Prompts,
    exact: bool,
    precision: str,
    rerouted: float,
) -> FoldComparison:
    difference = compare_logits(
        logits.adapter, folded, EXACT_TOLERANCE if exact else FOLD_TOLERANCE, rerouted
    )
    return FoldComparison(
        str(prompts), difference, compare_logits(logits.base, logits.adapter, 0.0), precision
    )


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
    remedy = " and run the same command again; nothing was written"
    check_space(trained.run.path, _size(model), "the merged model", remedy)
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
