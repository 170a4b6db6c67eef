"""An adapter folded into its base: `merged/`, a whole model that needs no PEFT, no bitsandbytes and
no base beside it, compared with the adapter on real prompts before it gets its name.

A 4-bit base is loaded afresh and dequantised first: a forward pass on a CPU may repack 4-bit
weights in place, and dequantising those gives noise without an error.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from recipes_lib.core.atomic_files import publish, write_json
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipesError
from recipes_lib.core.faults import check_space, explain_fault
from recipes_lib.core.json_files import read_object
from recipes_lib.core.run_lock import run_lock
from recipes_lib.core.terminal import shown_size
from recipes_lib.weights.base import attach, load_base, precision_name, size_of, weight_hashes
from recipes_lib.weights.card import write_card
from recipes_lib.weights.check import (
    EXACT_TOLERANCE,
    FOLD_TOLERANCE,
    LogitsComparison,
    Prompts,
    StoredComparison,
    compare_logits,
    free_memory,
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
)
from recipes_lib.weights.saved import ADAPTER_WEIGHTS, changed_files, recorded_hashes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Measured on SmolLM2-135M, rank 8: merging in bfloat16 costs 3-5% of the effect on average; a 4-bit
# adapter merged into the original 16-bit base is 32% off.
LOST_LIMIT = 0.25
RECORD = "merge.json"
SHARD = "5GB"


class StoredFold(TypedDict):
    """A `FoldComparison` in a record."""

    prompts: str
    computed_in: str
    difference: StoredComparison
    adapter_effect: dict[str, float]
    lost_share: float
    lost_limit: float
    agrees: bool


class MergeRecord(TypedDict):
    """merge.json: what was merged, in which precision, what the check found, and the files."""

    run: str
    base: str
    adapter_sha256: str
    dtype: str
    dequantised: bool
    check: StoredFold
    files: NotRequired[dict[str, int]]
    sha256: NotRequired[dict[str, str]]


def merge_record(trained: TrainedRun) -> MergeRecord | None:
    """Return what is recorded of the run's `merged/`, or None where there is none."""
    file = trained.merged / RECORD
    record = read_object(file, f"make it again: recipes merge {trained.run.name}")
    return cast(MergeRecord, record) if record else None


def why_stale(trained: TrainedRun, record: MergeRecord, dtype: str | None = None) -> str | None:
    """Return why `merged/` is not what merging would give now, or None when it is.

    Args:
        dtype: the precision asked for; None for any.
    """
    if record["adapter_sha256"] != weight_hashes(trained.weights).get(ADAPTER_WEIGHTS):
        return "it was made from another adapter"
    if dtype is not None and record["dtype"] != dtype:
        return f"it is in {record['dtype']}, not in {dtype}"
    found = file_sizes(trained.merged)
    damaged = [name for name, size in record["files"].items() if found.get(name) != size]
    if damaged:
        return f"{damaged[0]} in it is missing or damaged"
    changed = changed_files(trained.merged, record["sha256"])
    return f"{changed[0]} in it was changed" if changed else None


def fold(trained: TrainedRun, family: Family, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Fold the adapter of the family's only run into its base, using up the family's model."""
    wanted, model = dtype or family.model.dtype, family.model
    family.model = None
    if trained.recipe.quantization is not None:
        del model
        free_memory()
        model = _on_plain_base(trained, wanted)
    if model.dtype.itemsize < wanted.itemsize:
        model = model.to(wanted)
    return with_transposed_layers(model.merge_and_unload(safe_merge=True)).to(wanted)


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
            layer.weight = torch.nn.Parameter(found.weight.data.T.contiguous())
            layer.bias = found.bias
            model.set_submodule(name, layer)
    return model


def load_merged(
    folder: Path, trained: TrainedRun, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> PreTrainedModel:
    """Load a merged model from its files alone."""
    recipe = trained.recipe
    section = dataclasses.replace(recipe.model, dtype=dtype, resize_embeddings=False)  # type: ignore[arg-type]
    recipe = dataclasses.replace(recipe, model=section)
    return reload(folder, recipe, full_finetuning=True, tokenizer=tokenizer).eval()


def _on_plain_base(trained: TrainedRun, dtype: torch.dtype) -> Any:
    """Return the adapter in float32 on a fresh copy of its base, which is dequantised to `dtype`
    where it is quantized.
    """
    from transformers import AutoTokenizer

    base: Any = load_base(trained.recipe, AutoTokenizer.from_pretrained(trained.weights))
    if trained.recipe.quantization is not None:
        states = [getattr(parameter, "quant_state", None) for parameter in base.parameters()]
        assert not any(getattr(state, "packing_format_for_cpu", False) for state in states), (
            "repacked by a forward pass"
        )
        base = base.dequantize(dtype=dtype)
    model = attach(base, {"default": trained.weights})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model.eval()


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
    """A folded adapter against the adapter on its base, and that against the bare base."""

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
            found.append(
                f"logits differ by {difference.largest:.3g} where {difference.allowed:.3g} is"
                " allowed"
            )
        if self.lost > LOST_LIMIT:
            found.append(
                f"the mean difference is {self.lost:.0%} of what the adapter changes,"
                f" {LOST_LIMIT:.0%} is allowed: its effect is lost in rounding (try --dtype"
                " float32), or these are not its weights"
            )
        return found

    def as_dict(self) -> StoredFold:
        """Return the numbers for a record or for --json."""
        effect = dataclasses.asdict(self.effect)
        del effect["tolerance"]
        return {
            "prompts": self.prompts,
            "computed_in": self.computed_in,
            "difference": self.difference.as_dict(),
            "adapter_effect": effect,
            "lost_share": self.lost,
            "lost_limit": LOST_LIMIT,
            "agrees": not self.problems,
        }


def adapter_logits(family: Family, trained: TrainedRun, prompts: Prompts) -> AdapterLogits:
    """Return the logits of the bare base and of the adapter on it."""
    with family.using(BASE) as model:
        base = logits_on(model, prompts.rows)
    with family.using(trained.run.name) as model:
        return AdapterLogits(base, logits_on(model, prompts.rows))


def compare_folded(
    trained: TrainedRun,
    logits: AdapterLogits,
    folded: PreTrainedModel,
    prompts: Prompts,
    precision: str,
) -> FoldComparison:
    """Compare a folded model with the adapter on its base, by two yardsticks: the largest
    difference as a share of the largest logit (rounding), and the mean difference as a share of the
    adapter's own effect, which a merge that lost a weak adapter fails. Where the effect is too
    small to be told from rounding, both sides are computed again in float32.

    Args:
        folded: may be turned into float32.
        precision: of the base in memory when `logits` were computed.
    """
    import torch

    written, rerouted = precision_name(folded.dtype), rerouted_share(folded)

    def compare(logits: AdapterLogits, again: Any, exact: bool, precision: str) -> FoldComparison:
        tolerance = EXACT_TOLERANCE if exact else FOLD_TOLERANCE
        return FoldComparison(
            str(prompts),
            compare_logits(logits.adapter, again, tolerance, rerouted),
            compare_logits(logits.base, logits.adapter, 0.0),
            precision,
        )

    exact = trained.recipe.quantization is None and {precision, written} == {"float32"}
    first = compare(logits, logits_on(folded, prompts.rows), exact, precision)
    if exact or first.lost <= LOST_LIMIT:
        return first
    free_memory()
    again = logits_on(folded.float(), prompts.rows)
    model = _on_plain_base(trained, torch.float32).float().eval()
    with model.disable_adapter():
        base = logits_on(model, prompts.rows)
    precise = AdapterLogits(base, logits_on(model, prompts.rows))
    return compare(precise, again, written == "float32", "float32")


@dataclass(frozen=True)
class Merge:
    """A merged model on the disk, and what was measured on it."""

    folder: Path
    record: MergeRecord
    already: bool


def merge(trained: TrainedRun, dtype: str | None, report: Callable[[str], None]) -> Merge:
    """Write `merged/` of a LoRA or QLoRA run, or find that it is there and up to date.

    Args:
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
            stale = why_stale(trained, record, dtype)
            if stale is None:
                return Merge(trained.merged, record, already=True)
            report(f"making merged/ again: {stale}")
        return _merge(trained, dtype, report)


def _merge(trained: TrainedRun, dtype: str | None, report: Callable[[str], None]) -> Merge:
    import torch

    recipe, scratch = trained.recipe, trained.run.path / "merged.unchecked"
    rejected = scratch.with_name("merged.rejected")
    shutil.rmtree(scratch, ignore_errors=True)
    report(f"loading {recipe.model.name_or_path} and the adapter ...")
    family = Family([trained])
    tokenizer = family.tokenizer
    prompts = real_prompts(trained, tokenizer)
    logits = adapter_logits(family, trained, prompts)
    before, precision = size_of(family.model.get_base_model()), precision_name(family.model.dtype)
    model = fold(trained, family, getattr(torch, dtype) if dtype else None)
    written, size = precision_name(model.dtype), size_of(model)
    if recipe.quantization is not None:
        report(
            f"dequantised the {recipe.base_format} base first: {shown_size(before)}"
            f" became {shown_size(size)} in {written}\nwhat quantization took from the original"
            " weights stays lost: the adapter was trained on what was left"
        )
    remedy = " and run the same command again; nothing was written"
    check_space(trained.run.path, size, "the merged model", remedy)
    report(f"writing {shown_size(size)} in {written} ...")
    _save(model, tokenizer, scratch)
    del model
    free_memory()
    report("loading what was written, to compare it with the adapter ...")
    again = load_merged(scratch, trained, tokenizer, written)
    comparison = compare_folded(trained, logits, again, prompts, precision)
    del again
    free_memory()
    if comparison.problems:
        shutil.rmtree(rejected, ignore_errors=True)
        os.replace(scratch, rejected)
        raise RecipesError(
            f"the merged model is not the adapter on its base: {comparison.problems[0]}",
            f"it is kept in {rejected}",
        )
    record: MergeRecord = {
        "run": trained.run.name,
        "base": recipe.model.name_or_path,
        "adapter_sha256": weight_hashes(trained.weights)[ADAPTER_WEIGHTS],
        "dtype": written,
        "dequantised": recipe.quantization is not None,
        "check": comparison.as_dict(),
    }
    write_card(scratch, recipe, trained.run.read_state().get("summary") or {}, merged=record)
    record["files"], record["sha256"] = file_sizes(scratch), recorded_hashes(scratch)
    write_json(scratch / RECORD, record)
    publish(scratch, trained.merged)
    shutil.rmtree(rejected, ignore_errors=True)
    return Merge(trained.merged, record, already=False)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    settings = model.generation_config
    if settings is not None and {settings.temperature, settings.top_p} - {None, 1.0}:
        # as Llama-2's file has them; upstream refuses to save sampling values without it
        settings.do_sample = True
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
