"""An adapter folded into its base: written, read again, and compared by logits."""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.core.errors import RecipeError, RecipesError
from recipes_lib.core.files import file_hash, publish, write_json
from recipes_lib.core.run_directory import run_lock
from recipes_lib.core.terminal import say
from recipes_lib.data.conversations import Message
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.models.families import short_name
from recipes_lib.weights import runs
from recipes_lib.weights.card import write_card
from recipes_lib.weights.load import ADAPTER_WEIGHTS, attach, free_memory, load_base, load_saved
from recipes_lib.weights.runs import TrainedRun

if TYPE_CHECKING:
    import torch

LOST_LIMIT = 0.25  # measured: 3 to 5% in bfloat16, 32% on another base (docs/weights.md)
QUESTIONS = (
    "Explain to a child why the sky is blue.",
    "Write three short tips for someone who starts a new job.",
)


def merge(trained: TrainedRun, dtype: str | None) -> tuple[dict[str, Any], bool]:
    """Write `merged/` of a LoRA or QLoRA run, in `dtype` or else the base's; return its record, and
    whether it was there already.
    """
    name = trained.run.name
    if trained.full:
        what = f"run '{name}' is a full fine-tuning, so there is nothing to merge"
        raise RecipeError(what, f"recipes export {name} --to DIR")
    runs.check_base_of(trained)
    runs.check_weights(trained.run, trained.full)
    scratch = trained.run.path / "merged.unchecked"
    with run_lock(trained.run.path):
        record = runs.merge_record(trained)
        if record is not None and dtype in (None, record["dtype"]):
            return record, True
        shutil.rmtree(scratch, ignore_errors=True)  # of a merge that was killed
        try:
            return _merge(trained, dtype, scratch), False
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class _Folded:
    """What the model told that is not in memory any more, once its files are written."""

    base: "torch.Tensor"  # logits without the adapter
    adapter: "torch.Tensor"  # logits with it
    dtype: str  # of the files


def _merge(trained: TrainedRun, dtype: str | None, folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    recipe = trained.recipe
    tokenizer = AutoTokenizer.from_pretrained(trained.weights)
    prompts = []
    for question in QUESTIONS:
        turns: list[Message] = [{"role": "user", "content": question}]
        text = generation_prompt(trained.prompt_section, tokenizer, turns)
        prompts.append(tokenizer(text).input_ids)

    # base + adapter -> merged model -> files. What the model needs goes with the call that made it:
    # one name left here would keep all of it beside the model that is read next.
    folded = _fold(trained, tokenizer, prompts, dtype, folder)
    free_memory()

    # files -> model -> the same logits?
    merged = logits_on(
        load_saved(folder, recipe, tokenizer, folded.dtype, on_cpu_if_full=True).eval(), prompts
    )
    free_memory()
    effect = float((folded.base - folded.adapter).abs().mean())
    difference = float((merged - folded.adapter).abs().mean())
    lost = difference / effect if effect else float("inf")
    if not lost <= LOST_LIMIT:  # NaN is no agreement
        what = f"merging loses {lost:.0%} of what the adapter changes in the base's logits"
        hint = "lost in rounding (try --dtype float32), or these are not its weights"
        raise RecipesError(f"{what} ({LOST_LIMIT:.0%} is allowed)", hint)
    record = {
        "adapter_sha256": file_hash(trained.weights / ADAPTER_WEIGHTS),
        "dtype": folded.dtype,
        "effect": effect,  # how far the adapter moves the base's logits, on average
        "difference": difference,  # how far merging moves the adapter's
        "lost": lost,
    }
    write_card(folder, recipe, trained.run.read_state().get("summary") or {}, record)
    record["sha256"] = runs.recorded_hashes(folder)
    write_json(folder / runs.RECORD, record)
    publish(folder, trained.merged)
    return record


def _fold(
    trained: TrainedRun, tokenizer: Any, prompts: list[list[int]], dtype: str | None, folder: Path
) -> _Folded:
    """Write the adapter, in float32, folded into a fresh copy of its base, not quantized any more;
    return what base and adapter answered.
    """
    import torch

    recipe = trained.recipe
    say(f"loading {recipe.model.name_or_path} and the adapter ...")
    plain: Any = load_base(recipe, tokenizer, merged_in=dtype or "auto")
    runs.check_base_of(trained)  # again: until here its files may have been on the Hub alone
    precision = getattr(torch, dtype) if dtype else plain.dtype
    if recipe.quantization is not None:
        if plain.config.model_type == "gpt2":
            what = "GPT-2 keeps its layers transposed: its 4-bit adapters cannot be merged"
            raise RecipeError(what)
        say(f"the {recipe.base_format} base is dequantised first; what it lost stays lost")
        plain = plain.dequantize(dtype=precision)
    model: Any = attach(plain.to(precision), {"default": trained.weights})
    # two layers share a weight as tied embeddings, or Zamba2's blocks: what is folded into it would
    # be in both
    weights = model.named_parameters(remove_duplicate=False)
    num_uses = Counter(id(weight) for _, weight in weights)
    for name, weight in model.named_parameters(remove_duplicate=False):
        layer = short_name(name)
        is_adapted = ".base_layer." in name and "token_adapter" not in layer
        if is_adapted and num_uses[id(weight)] > 1:
            what = f"the adapter cannot be merged: {layer} shares its weight with another layer"
            raise RecipeError(what, "use the adapter on its base: export, chat and eval take it")
    for key, parameter in model.eval().named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.float()
    with model.disable_adapter():
        base = logits_on(model, prompts)
    adapter = logits_on(model, prompts)

    merged = model.merge_and_unload(safe_merge=True)
    written = str(merged.dtype).removeprefix("torch.")
    say(f"writing {merged.get_memory_footprint() / 2**20:,.1f} MiB in {written} ...")
    settings = merged.generation_config
    if settings is not None:
        if {settings.temperature, settings.top_p} - {None, 1.0}:
            settings.do_sample = True  # Llama-2's file lacks it, and upstream refuses to save it so
        ends = settings.eos_token_id
        if not isinstance(ends, list):
            ends = [ends]
        # the run's own (train.eos_token) first, as in a full fine-tuning
        ends = [tokenizer.eos_token_id, *ends]
        settings.eos_token_id = [end for end in dict.fromkeys(ends) if end is not None] or None
    merged.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    return _Folded(base=base, adapter=adapter, dtype=written)


def logits_on(model: Any, prompts: list[list[int]]) -> "torch.Tensor":
    """Return the logits of all prompts' tokens, shape (tokens, vocabulary)."""
    import torch

    rows = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            rows.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return torch.cat(rows)
