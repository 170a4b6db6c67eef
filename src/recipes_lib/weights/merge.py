"""An adapter folded into its base: `merged/`, a whole model that needs no PEFT, no bitsandbytes and
no base beside it. Its logits are compared with the adapter's before it gets its name.

A 4-bit base is loaded afresh and dequantised first: a forward pass on a CPU may repack 4-bit
weights in place, and dequantising those gives noise without an error.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from recipes_lib.core.errors import RecipeError, RecipesError
from recipes_lib.core.files import file_hash, publish, write_json
from recipes_lib.core.lock import run_lock
from recipes_lib.core.terminal import say, shown_size
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.weights.check import recorded_hashes
from recipes_lib.weights.export import write_card
from recipes_lib.weights.load import (
    ADAPTER_WEIGHTS,
    attach,
    free_memory,
    load_base,
    load_saved,
    precision_name,
)
from recipes_lib.weights.runs import (
    RECORD,
    MergeRecord,
    TrainedRun,
    check_base_of,
    check_weights,
    merge_record,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Measured on SmolLM2-135M, rank 8: merging in bfloat16 costs 3-5% of the adapter's effect on
# average; a 4-bit adapter merged into the original 16-bit base is 32% off.
LOST_LIMIT = 0.25
QUESTIONS = (
    "Explain to a child why the sky is blue.",
    "Write three short tips for someone who starts a new job.",
    "What is the capital of Australia, and why is it not Sydney?",
    "List the steps to make a cup of tea.",
)


def merge(trained: TrainedRun, dtype: str | None) -> tuple[MergeRecord, bool]:
    """Write `merged/` of a LoRA or QLoRA run; return its record, and whether it was there already.

    Args:
        dtype: precision of the merged weights; None for the base's.

    Raises:
        RecipeError: a full fine-tuning, another base than the adapter's, or an architecture whose
            adapters cannot be folded.
        EnvironmentFault: not enough disk space, another process works on the run, or the base
            cannot be had.
        RecipesError: the merged model does not answer like the adapter.
    """
    name = trained.run.name
    if trained.full:
        what = f"run '{name}' is a full fine-tuning: its model is whole, there is nothing to merge"
        raise RecipeError(what, f"recipes export {name} --to DIR")
    check_base_of(trained)
    check_weights(trained)
    with run_lock(trained.run.path):
        record = merge_record(trained)
        if record is not None and dtype in (None, record.dtype):
            return record, True
        try:
            return _merge(trained, dtype), False
        finally:
            shutil.rmtree(trained.run.path / "merged.unchecked", ignore_errors=True)


def _merge(trained: TrainedRun, dtype: str | None) -> MergeRecord:
    import torch
    from transformers import AutoTokenizer

    recipe, scratch = trained.recipe, trained.run.path / "merged.unchecked"
    tokenizer = AutoTokenizer.from_pretrained(trained.weights)
    prompts, section = [], trained.prompt_section
    for text in QUESTIONS:
        asked = generation_prompt(section, tokenizer, [{"role": "user", "content": text}])
        prompts.append(tokenizer(asked).input_ids)

    # base + adapter -> logits
    say(f"loading {recipe.model.name_or_path} and the adapter ...")
    model = _on_plain_base(trained, tokenizer, getattr(torch, dtype) if dtype else None)
    with model.disable_adapter():
        base = logits_on(model, prompts)
    adapter = logits_on(model, prompts)

    # base + adapter -> merged model -> files
    folded = _with_transposed_layers(model.merge_and_unload(safe_merge=True))
    size, precision = folded.get_memory_footprint(), precision_name(folded.dtype)
    if recipe.quantization is not None:
        say(
            f"the {recipe.base_format} base is dequantised first; what quantization took from the"
            " original weights stays lost: the adapter was trained on what was left"
        )
    say(f"writing {shown_size(size)} in {precision} ...")
    settings = folded.generation_config
    if settings is not None and {settings.temperature, settings.top_p} - {None, 1.0}:
        # as Llama-2's file has them: upstream refuses to save sampling values without it
        settings.do_sample = True
    shutil.rmtree(scratch, ignore_errors=True)
    folded.save_pretrained(scratch, max_shard_size="5GB")
    tokenizer.save_pretrained(scratch)
    del model, folded
    free_memory()

    # files -> model -> the same logits?
    say("loading what was written, to compare it with the adapter ...")
    merged = logits_on(load_saved(scratch, recipe, tokenizer, precision).eval(), prompts)
    free_memory()
    record = MergeRecord(
        adapter_sha256=file_hash(trained.weights / ADAPTER_WEIGHTS),
        dtype=precision,
        num_tokens=len(merged),
        effect=float((adapter - base).abs().mean()),
        difference=float((merged - adapter).abs().mean()),
        same_top_token=float((merged.argmax(-1) == adapter.argmax(-1)).float().mean()),
    )
    if not record.lost <= LOST_LIMIT:  # NaN is no agreement
        raise RecipesError(
            f"the merged model is not the adapter on its base: logits differ by"
            f" {record.difference:.3g} on average, {record.lost:.0%} of what the adapter changes;"
            f" {LOST_LIMIT:.0%} is allowed",
            "its effect is lost in rounding (try --dtype float32), or these are not its weights",
        )
    write_card(scratch, recipe, trained.run.read_state().get("summary") or {}, asdict(record))
    record.sha256 = recorded_hashes(scratch)
    write_json(scratch / RECORD, asdict(record))
    publish(scratch, trained.merged)
    return record


def _on_plain_base(
    trained: TrainedRun, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None
) -> Any:
    """Return the adapter in float32 on a fresh copy of its base in `dtype`, dequantised where it is
    quantized.

    Raises:
        RecipeError: layers that share one weight have adapters (Zamba2): what is folded into it at
            one place would be there at all.
    """
    base: Any = load_base(trained.recipe, tokenizer)
    check_base_of(trained)  # again: until here its files may have been on the Hub alone
    name, precision = trained.recipe.model.name_or_path, dtype or base.dtype
    hint = "use the adapter on its base: export, chat and eval take it"
    if trained.recipe.quantization is not None:
        base = base.dequantize(dtype=precision)
    shared = {name.removesuffix(".weight") for name in base.all_tied_weights_keys}
    model: Any = attach(base.to(precision), {"default": trained.weights})
    if layers := sorted(shared & {*model.targeted_module_names}):
        what = (
            f"an adapter of '{name}' cannot be merged: {layers[0]} shares its weight with another"
        )
        raise RecipeError(f"{what} layer", hint)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
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
        linear = model.get_submodule(name)
        if isinstance(layer, Conv1D) and isinstance(linear, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(linear.weight.data.T.contiguous())
            layer.bias = linear.bias
            model.set_submodule(name, layer)
    return model


def logits_on(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Return the logits of each prompt's tokens one after the other, shape (tokens, vocabulary)."""
    import torch

    rows = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            rows.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return torch.cat(rows)
