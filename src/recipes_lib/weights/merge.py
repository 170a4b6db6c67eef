"""An adapter folded into its base: `merged/`, a whole model that needs no PEFT, no bitsandbytes and
no base beside it. Its logits are compared with the adapter's on real prompts before it gets its
name.

A 4-bit base is loaded afresh and dequantised first: a forward pass on a CPU may repack 4-bit
weights in place, and dequantising those gives noise without an error.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import (
    DataError,
    EnvironmentFault,
    RecipeError,
    RecipesError,
    check_space,
    explain_fault,
)
from recipes_lib.core.files import publish, read_object, write_json
from recipes_lib.core.lock import run_lock
from recipes_lib.core.terminal import shown_size
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.models.families import auto_class
from recipes_lib.weights.card import write_card
from recipes_lib.weights.check import ADAPTER_WEIGHTS, changed_files, recorded_hashes
from recipes_lib.weights.load import (
    attach,
    free_memory,
    load_base,
    load_saved,
    model_path,
    precision_name,
    size_of,
)
from recipes_lib.weights.runs import TrainedRun, check_base_of, check_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Measured on SmolLM2-135M, rank 8: merging in bfloat16 costs 3-5% of the adapter's effect on
# average; a 4-bit adapter merged into the original 16-bit base is 32% off.
LOST_LIMIT = 0.25
RECORD = "merge.json"
SHARD = "5GB"
NUM_PROMPTS, MAX_TOKENS, MIN_TOKENS = 8, 128, 16
MAX_LOGITS = 2**26  # values of one comparison: 256 MiB in float32
QUESTIONS = (
    "Explain to a child why the sky is blue.",
    "Write three short tips for someone who starts a new job.",
    "What is the capital of Australia, and why is it not Sydney?",
    "List the steps to make a cup of tea.",
)


@dataclass
class MergeRecord:
    """merge.json: what was merged, in which precision, and what the comparison of logits found.

    Args:
        effect: how far the adapter moves the base's logits, on average.
        difference: how far merging moves the adapter's, on average.
        same_top_token: share of positions with the same most likely next token.
        sha256: of each file in `merged/` that decides what it answers.
    """

    run: str
    base: str
    adapter_sha256: str
    dtype: str
    dequantised: bool
    prompts: str
    effect: float
    difference: float
    same_top_token: float
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def lost(self) -> float:
        """The difference as a share of the adapter's effect."""
        return self.difference / self.effect if self.effect else float("inf")


def merge_record(trained: TrainedRun) -> MergeRecord | None:
    """Return what is recorded of the run's `merged/`, or None where there is none that is whole and
    of the present adapter.
    """
    file = trained.merged / RECORD
    try:
        record = MergeRecord(**read_object(file)) if file.is_file() else None
        current = record and record.adapter_sha256 == _adapter_hash(trained)
        is_whole = record and not changed_files(trained.merged, record.sha256)
    except (TypeError, DataError):  # of an earlier release, or damaged: it is made again
        return None
    return record if current and is_whole else None


def merge(
    trained: TrainedRun, dtype: str | None, report: Callable[[str], None]
) -> tuple[MergeRecord, bool]:
    """Write `merged/` of a LoRA or QLoRA run; return its record, and whether it was there already.

    Args:
        dtype: precision of the merged weights; None for the base's.
        report: is told what happens, a line at a time.

    Raises:
        RecipeError: a full fine-tuning, another base than the adapter's, or an architecture whose
            adapters cannot be folded; before anything is loaded.
        EnvironmentFault: not enough disk space, another process works on the run, or the base
            cannot be had.
        RecipesError: the merged model does not answer like the adapter; it is kept in
            `merged.rejected/`.
    """
    name = trained.run.name
    if trained.full:
        what = f"run '{name}' is a full fine-tuning: its model is whole, there is nothing to merge"
        hint = f"use {trained.weights} as it is, or: recipes export {name} --to DIR"
        raise RecipeError(what, hint)
    check_base_of(trained)
    check_weights(trained)
    _refuse_shared_layers(trained)
    with run_lock(trained.run.path):
        record = merge_record(trained)
        if record is not None and dtype in (None, record.dtype):
            return record, True
        return _merge(trained, dtype, report), False


def _merge(trained: TrainedRun, dtype: str | None, report: Callable[[str], None]) -> MergeRecord:
    import torch
    from transformers import AutoTokenizer

    recipe, scratch = trained.recipe, trained.run.path / "merged.unchecked"
    shutil.rmtree(scratch, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(trained.weights)
    prompts, source = real_prompts(trained, tokenizer)

    # base + adapter -> logits
    report(f"loading {recipe.model.name_or_path} and the adapter ...")
    model = _on_plain_base(trained, tokenizer, getattr(torch, dtype) if dtype else None)
    with model.disable_adapter():
        base = logits_on(model, prompts)
    adapter = logits_on(model, prompts)
    effect = float((adapter - base).abs().mean())
    del base

    # base + adapter -> merged model -> files
    folded = _with_transposed_layers(model.merge_and_unload(safe_merge=True))
    written, size = folded.dtype, size_of(folded)
    remedy = " and run the same command again; nothing was written"
    check_space(trained.run.path, size, "the merged model", remedy)
    if recipe.quantization is not None:
        report(
            f"the {recipe.base_format} base is dequantised first; what quantization took from the"
            " original weights stays lost: the adapter was trained on what was left"
        )
    report(f"writing {shown_size(size)} in {precision_name(written)} ...")
    _save(folded, tokenizer, scratch)
    del model, folded
    free_memory()

    # files -> model -> the same logits?
    report("loading what was written, to compare it with the adapter ...")
    again = load_saved(scratch, _in_precision(recipe, precision_name(written)), tokenizer).eval()
    merged = logits_on(again, prompts)
    del again
    free_memory()
    record = MergeRecord(
        run=trained.run.name,
        base=recipe.model.name_or_path,
        adapter_sha256=_adapter_hash(trained),
        dtype=precision_name(written),
        dequantised=recipe.quantization is not None,
        prompts=source,
        effect=effect,
        difference=float((merged - adapter).abs().mean()),
        same_top_token=float((merged.argmax(-1) == adapter.argmax(-1)).float().mean()),
    )
    if not record.lost <= LOST_LIMIT:  # NaN is no agreement
        rejected = scratch.with_name("merged.rejected")
        shutil.rmtree(rejected, ignore_errors=True)
        os.replace(scratch, rejected)
        raise RecipesError(
            f"the merged model is not the adapter on its base: logits differ by"
            f" {record.difference:.3g} on average, {record.lost:.0%} of what the adapter changes;"
            f" {LOST_LIMIT:.0%} is allowed",
            "its effect is lost in rounding (try --dtype float32), or these are not its weights",
            f"it is kept in {rejected}",
        )
    write_card(
        scratch, recipe, trained.run.read_state().get("summary") or {}, merged=asdict(record)
    )
    record.sha256 = recorded_hashes(scratch)
    write_json(scratch / RECORD, asdict(record))
    publish(scratch, trained.merged)
    return record


def _in_precision(recipe: Recipe, dtype: str) -> Recipe:
    section = recipe.model.model_copy(update={"dtype": dtype})
    return dataclasses.replace(recipe, model=section)


def _on_plain_base(
    trained: TrainedRun, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None
) -> Any:
    """Return the adapter in float32 on a fresh copy of its base in `dtype`, dequantised where it is
    quantized.
    """
    base: Any = load_base(trained.recipe, tokenizer)
    wanted = dtype or base.dtype
    if trained.recipe.quantization is not None:
        base = base.dequantize(dtype=wanted)
    model: Any = attach(base.to(wanted), {"default": trained.weights})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model.eval()


def _with_transposed_layers(model: Any) -> Any:
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


def _refuse_shared_layers(trained: TrainedRun) -> None:
    """Refuse an adapter of layers that share one weight (Zamba2): what is folded into it at one
    place would be there at all.
    """
    import torch
    import transformers
    from safetensors import safe_open

    section = trained.recipe.model
    try:
        config = transformers.AutoConfig.from_pretrained(
            model_path(section),
            revision=section.revision or "main",
            trust_remote_code=section.trust_remote_code,
        )
        with torch.device("meta"):
            model = getattr(transformers, auto_class(config.model_type)).from_config(config)
    except Exception:  # whatever it is, loading the base says it better
        return
    with safe_open(trained.weights / ADAPTER_WEIGHTS, framework="pt") as file:
        adapted = {name.removeprefix("base_model.model.") for name in file.keys()}  # noqa: SIM118
    for name, other in model.all_tied_weights_keys.items():
        layer = name.removesuffix(".weight")
        if any(one.startswith(f"{layer}.lora_") for one in adapted):
            raise RecipeError(
                f"an adapter of '{section.name_or_path}' cannot be merged: {layer} and"
                f" {other.removesuffix('.weight')} have one weight",
                "use the adapter on its base: export, chat and eval take it",
            )


def real_prompts(
    trained: TrainedRun, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], str]:
    """Return token ids of the run's own validation rows, and what they are; where the data is gone,
    of four questions.
    """
    # Here, because `export --help` imports no numpy.
    from recipes_lib.data.prepare import prepare_data
    from recipes_lib.data.supervision import prompt_ids

    limit = min(MAX_TOKENS, max(MIN_TOKENS, MAX_LOGITS // (NUM_PROMPTS * len(tokenizer))))
    try:
        data = prepare_data(trained.recipe, tokenizer)
    except (RecipesError, OSError):
        section = trained.prompt_section
        texts = [generation_prompt(section, tokenizer, instruction=text) for text in QUESTIONS]
        rows = [prompt_ids(section, tokenizer, text) for text in texts]
        source = "general questions; the data is not readable now"
    else:
        rows = (data.validation or data.train)[:NUM_PROMPTS]["input_ids"]
        source = "validation rows" if data.validation else "training rows"
    rows = [list(ids[:limit]) for ids in rows]
    return rows, f"{len(rows)} {source} ({sum(map(len, rows))} tokens)"


def logits_on(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Return the logits of each prompt's tokens one after the other, shape (tokens, vocabulary)."""
    import torch

    rows = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            rows.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return torch.cat(rows)


def _adapter_hash(trained: TrainedRun) -> str:
    return recorded_hashes(trained.weights, [ADAPTER_WEIGHTS])[ADAPTER_WEIGHTS]


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    settings = model.generation_config
    if settings is not None and {settings.temperature, settings.top_p} - {None, 1.0}:
        # As Llama-2's file has them: upstream refuses to save sampling values without it.
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
