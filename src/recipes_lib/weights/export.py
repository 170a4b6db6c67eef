"""Weights for use elsewhere: an adapter folded into its base, and a folder to give away, with a
model card, for PEFT and transformers alone and with nothing of this machine.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import HUB_ID, Recipe
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipesError, one_line
from recipes_lib.core.files import file_hash, object_or_none, publish, read_object, write_json
from recipes_lib.core.run_directory import run_lock
from recipes_lib.core.terminal import say
from recipes_lib.data.conversations import Message
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.data.sources import listed_sources
from recipes_lib.models.families import needs_of, short_name
from recipes_lib.models.packaged import SOURCE
from recipes_lib.weights.load import ADAPTER_WEIGHTS, attach, free_memory, load_base, load_saved
from recipes_lib.weights.runs import (
    ADAPTER_CONFIG,
    RECORD,
    TrainedRun,
    check_base_of,
    check_weights,
    merge_record,
    recorded_hashes,
    recorded_names,
)

if TYPE_CHECKING:
    import torch

_WITH_PATHS = (ADAPTER_CONFIG, "config.json", "tokenizer_config.json")
# an absolute one in JSON, and its last part; "/nothink" is a token of GLM-4.5
_PATH = re.compile(r'"~?/[^"\\]*/([^"/\\]+)/?"')
LOST_LIMIT = 0.25  # measured: 3 to 5% in bfloat16, 32% on another base (docs/weights.md)
QUESTIONS = (
    "Explain to a child why the sky is blue.",
    "Write three short tips for someone who starts a new job.",
)


# ---- an adapter folded into its base ----


def merge(trained: TrainedRun, dtype: str | None) -> tuple[dict[str, Any], bool]:
    """Write `merged/` of a LoRA or QLoRA run, in `dtype` or else the base's; return its record, and
    whether it was there already.
    """
    name = trained.run.name
    if trained.full:
        what = f"run '{name}' is a full fine-tuning, so there is nothing to merge"
        raise RecipeError(what, f"recipes export {name} --to DIR")
    check_base_of(trained)
    check_weights(trained.run, trained.full)
    scratch = trained.run.path / "merged.unchecked"
    with run_lock(trained.run.path):
        record = merge_record(trained)
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

    base: torch.Tensor  # logits without the adapter
    adapter: torch.Tensor  # logits with it
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
    record["sha256"] = recorded_hashes(folder)
    write_json(folder / RECORD, record)
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
    check_base_of(trained)  # again: until here its files may have been on the Hub alone
    precision = getattr(torch, dtype) if dtype else plain.dtype
    if recipe.quantization is not None:
        if plain.config.model_type == "gpt2":
            what = "GPT-2 keeps its layers transposed: its 4-bit adapters cannot be merged"
            raise RecipeError(what)
        say(f"the {recipe.base_format} base is dequantised first; what it lost stays lost")
        plain = plain.dequantize(dtype=precision)
    model: Any = attach(plain.to(precision), {"default": trained.weights})
    layer = _shared_layer(model)
    if layer is not None:
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
    if settings is not None and {settings.temperature, settings.top_p} - {None, 1.0}:
        settings.do_sample = True  # Llama-2's file lacks it, and upstream refuses to save it so
    merged.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    return _Folded(base=base, adapter=adapter, dtype=written)


def _shared_layer(model: Any) -> str | None:
    """Return a layer with an adapter whose weight another layer uses too; None without one."""
    # as tied embeddings, or Zamba2's blocks: what is folded into it would be in all places
    named = list(model.named_parameters(remove_duplicate=False))
    num_uses = Counter(id(weight) for _, weight in named)
    for name, weight in named:
        layer = short_name(name)
        is_adapted = ".base_layer." in name and "token_adapter" not in layer
        if is_adapted and num_uses[id(weight)] > 1:
            return layer
    return None


def logits_on(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Return the logits of all prompts' tokens, shape (tokens, vocabulary)."""
    import torch

    rows = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            rows.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return torch.cat(rows)


# ---- a folder to give away ----


def export(trained: TrainedRun, to: Path, merged: bool) -> list[Path]:
    """Write the run's weights, or `merged/`, into a new folder; return the files, by name."""
    name = trained.run.name
    recipe = trained.recipe
    target = to.expanduser().resolve()
    record = merge_record(trained) if merged else None
    if merged and not record:
        what = f"run '{name}' has no complete merged/ of its current adapter"
        raise RecipeError(what, f"recipes merge {name}")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        what = f"{to} is a file or is not empty, and nothing is overwritten"
        raise RecipeError(what, "give a new or empty folder")
    if not trained.full:
        check_base_of(trained)
    check_weights(trained.run, trained.full)

    source = trained.merged if merged else trained.weights
    base = public_name(recipe)
    summary = trained.run.read_state().get("summary") or {}
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        scratch.mkdir()
        for file_name in recorded_names(source):
            file = scratch / file_name
            if file_name != RECORD:
                shutil.copyfile(source / file_name, file)
            if file_name not in _WITH_PATHS:
                continue
            values = read_object(file)
            if file_name == ADAPTER_CONFIG:
                values["base_model_name_or_path"] = base
                values["revision"] = recipe.model.revision if is_hub_id(base) else None
            text = json.dumps(values, indent=2, ensure_ascii=False)
            file.write_text(_PATH.sub(r'"\1"', text) + "\n", encoding="utf-8")
        write_card(scratch, recipe, summary, record)
        publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sorted(path for path in target.rglob("*") if path.is_file())


def write_card(
    folder: Path, recipe: Recipe, summary: Mapping[str, Any], merged: Any = None
) -> None:
    """Write the model card as README.md: what was trained on what, how to use it, the numbers of
    the run's `summary`; `merged` is merge.json of an adapter folded into its base.
    """
    import jinja2
    from huggingface_hub import ModelCardData

    base = public_name(recipe)
    lora = recipe.lora
    stated = base_file(recipe, "README.md")
    licence = stated.get("license_name") or stated.get("license")
    names = [source.source for source in listed_sources(recipe.data)]
    data = [name if is_hub_id(name) else Path(name).name for name in names]
    is_adapter = lora is not None and merged is None
    header = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        datasets=[name for name in data if "/" in name] or None,
        library_name="peft" if is_adapter else "transformers",
        license=licence or base_file(recipe, SOURCE).get("license"),
        pipeline_tag="text-generation",
        tags=["sft", "trl", *recipe.run.tags],
    )
    method = "Full fine-tuning"
    if lora is not None:
        kind = "QLoRA" if recipe.quantization else "LoRA"
        method = f"{kind} (r {lora.get('r')}, alpha {lora.get('lora_alpha')})"
        if recipe.base_format:
            method += f" on the {recipe.base_format} base"
    numbers = {}
    for name, value in summary.items():
        if isinstance(value, int | float):
            text = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
            numbers[name.replace("_", " ")] = text
    blocks = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
    template = Path(__file__).with_name("card.md.jinja").read_text("utf-8")
    card = blocks.from_string(template).render(
        header=header,
        recipe=recipe,
        method=method,
        base=base,
        is_on_hub=is_hub_id(base),
        data=data,
        merged=merged,
        numbers=numbers,
        is_adapter=is_adapter,
        has_embeddings=recipe.model.resize_embeddings or bool((lora or {}).get("modules_to_save")),
        auto_class=needs_of(str(base_file(recipe, "config.json").get("model_type"))).auto_class,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def is_hub_id(name: str) -> bool:
    """Return whether a model's name can be downloaded from the Hub."""
    return "/" in name and bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def public_name(recipe: Recipe) -> str:
    """Return the base's public name: its Hub id, or `./FOLDER`, which is not a Hub id."""
    name = recipe.model.name_or_path
    if is_hub_id(name):
        return name
    return str(base_file(recipe, SOURCE).get("hub_id") or f"./{Path(name).name}")


def base_file(recipe: Recipe, name: str) -> Mapping[str, Any]:
    """Return a JSON file of the base's folder, or the header of its README.md, or {}."""
    import yaml
    from huggingface_hub import metadata_load

    with suppress(RecipesError, OSError, ValueError, yaml.YAMLError):  # moved away, or no header
        folder = local_folder(recipe)
        if folder is not None:
            read = metadata_load if name == "README.md" else object_or_none
            return read(folder / name) or {}
    return {}


def push(folder: Path, repo: str, public: bool) -> str:
    """Upload an exported folder to OWNER/NAME, made if it does not exist; return its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    message = "Weights exported from a checked run"
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # the Hub's client has many types; each becomes one line
        what = f"could not push to '{repo}': {one_line(error)}"
        raise EnvironmentFault(what, "hf auth login, or check the name and the network") from error
    return str(address)
