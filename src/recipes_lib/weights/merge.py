"""An adapter folded into its base: `merged/`, once its logits are the adapter's."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.core.errors import RecipeError, RecipesError
from recipes_lib.core.files import file_hash, publish, write_json
from recipes_lib.core.run_directory import run_lock
from recipes_lib.core.terminal import say
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.data.rows import Message
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

# SmolLM2-135M, rank 8: merging in bfloat16 costs 3-5% of the adapter's effect, a 4-bit adapter on
# the original 16-bit base 32%.
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
    """
    name = trained.run.name
    if trained.full:
        what = f"run '{name}' is a full fine-tuning: its model is whole, there is nothing to merge"
        raise RecipeError(what, f"recipes export {name} --to DIR")
    check_base_of(trained)
    check_weights(trained.run, trained.full)
    scratch = trained.run.path / "merged.unchecked"
    with run_lock(trained.run.path):
        record = merge_record(trained)
        if record is not None and dtype in (None, record.dtype):
            return record, True
        shutil.rmtree(scratch, ignore_errors=True)  # of a merge that was killed
        try:
            return _merge(trained, dtype, scratch), False
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _merge(trained: TrainedRun, dtype: str | None, folder: Path) -> MergeRecord:
    import torch
    from transformers import AutoTokenizer

    recipe = trained.recipe
    tokenizer = AutoTokenizer.from_pretrained(trained.weights)
    prompts = []
    for question in QUESTIONS:
        asked: list[Message] = [{"role": "user", "content": question}]
        text = generation_prompt(trained.prompt_section, tokenizer, asked)
        prompts.append(tokenizer(text).input_ids)

    # The adapter in float32 on a fresh copy of its base, which is not quantized any more: a forward
    # pass on a CPU may repack 4-bit weights in place, and dequantising those gives noise.
    say(f"loading {recipe.model.name_or_path} and the adapter ...")
    plain: Any = load_base(recipe, tokenizer)
    check_base_of(trained)  # again: until here its files may have been on the Hub alone
    precision = getattr(torch, dtype) if dtype else plain.dtype
    if recipe.quantization is not None:
        say(f"the {recipe.base_format} base is dequantised first: what it has lost stays lost")
        plain = plain.dequantize(dtype=precision)
    # Zamba2: what is folded into a shared weight at one place would be there at all
    shared = {key.removesuffix(".weight") for key in plain.all_tied_weights_keys}
    model: Any = attach(plain.to(precision), {"default": trained.weights})
    if layers := sorted(shared & {*model.targeted_module_names}):
        what = f"the adapter cannot be merged: {layers[0]} shares its weight with another layer"
        raise RecipeError(what, "use the adapter on its base: export, chat and eval take it")
    for key, parameter in model.eval().named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.float()
    with model.disable_adapter():
        base = logits_on(model, prompts)
    adapter = logits_on(model, prompts)

    # base + adapter -> merged model -> files
    folded = _with_transposed_layers(model.merge_and_unload(safe_merge=True))
    written = precision_name(folded.dtype)
    say(f"writing {folded.get_memory_footprint() / 2**20:,.1f} MiB in {written} ...")
    settings = folded.generation_config
    if settings is not None and {settings.temperature, settings.top_p} - {None, 1.0}:
        settings.do_sample = True  # Llama-2's file lacks it, and upstream refuses to save it so
    folded.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    del plain, model, folded
    free_memory()

    # files -> model -> the same logits?
    say("loading what was written, to compare it with the adapter ...")
    merged = logits_on(load_saved(folder, recipe, tokenizer, written).eval(), prompts)
    free_memory()
    record = MergeRecord(
        adapter_sha256=file_hash(trained.weights / ADAPTER_WEIGHTS),
        dtype=written,
        effect=float((adapter - base).abs().mean()),
        difference=float((merged - adapter).abs().mean()),
    )
    if not record.lost <= LOST_LIMIT:  # NaN is no agreement
        what = f"merging loses {record.lost:.0%} of what the adapter changes in the base's logits"
        hint = "lost in rounding (try --dtype float32), or these are not its weights"
        raise RecipesError(f"{what} ({LOST_LIMIT:.0%} is allowed)", hint)
    write_card(folder, recipe, trained.run.read_state().get("summary") or {}, asdict(record))
    record.sha256 = recorded_hashes(folder)
    write_json(folder / RECORD, asdict(record))
    publish(folder, trained.merged)
    return record


def _with_transposed_layers(model: Any) -> Any:
    """Give a dequantised model the layers of its class: GPT-2 has them transposed."""
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
    """Return the logits of all prompts' tokens, shape (tokens, vocabulary)."""
    import torch

    rows = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            rows.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return torch.cat(rows)
