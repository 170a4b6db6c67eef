"""The model card beside the weights: what was trained on what, how to load and serve it, and the
numbers with their n. It names nothing of the machine it was written on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import HUB_ID
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import object_or_none
from recipes_lib.models.families import auto_class
from recipes_lib.models.packaged import PACKAGED_HUB_ID, SOURCE, is_packaged

# What of a training's summary a card shows.
NUMBERS = {
    "steps": "steps",
    "best_step": "step of these weights",
    "training_rows": "training rows",
    "validation_rows": "validation rows",
    "tokens": "tokens trained on",
    "first_training_loss": "training loss, first",
    "last_training_loss": "training loss, last",
    "first_validation_loss": "validation loss, first",
    "last_validation_loss": "validation loss, last",
    "seconds": "seconds",
    "peak_memory_gib": "peak memory, GiB",
    "world_size": "processes",
}


def write_card(
    folder: Path,
    recipe: Recipe,
    summary: Mapping[str, Any],
    merged: Mapping[str, Any] | None = None,
) -> None:
    """Write the card as README.md into a folder of weights.

    Args:
        summary: rows, steps, losses and time of the run; None where not measured.
        merged: for an adapter folded into its base, `merge.MergeRecord`.
    """
    (folder / "README.md").write_text(card_text(recipe, summary, merged), encoding="utf-8")


def card_text(
    recipe: Recipe, summary: Mapping[str, Any], merged: Mapping[str, Any] | None = None
) -> str:
    """Return the card: YAML header for the Hub, then Markdown."""
    base, is_adapter = public_name(recipe), recipe.lora is not None and merged is None
    header: dict[str, object] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "trl", *recipe.run.tags],
        "base_model": base,
        "license": licence_of(recipe),
        "datasets": [name for name in _data_names(recipe) if "/" in name],
    }
    if not is_hub_id(base):
        del header["base_model"]
    head = yaml.safe_dump({k: v for k, v in header.items() if v}, sort_keys=False)
    revision = f" at revision `{recipe.model.revision}`" if recipe.model.revision else ""
    rows = "\n".join(
        f"| {title} | {_shown(summary[name])} |"
        for name, title in NUMBERS.items()
        if summary.get(name) is not None
    )
    parts = [
        f"---\n{head}---\n\n# {recipe.name}",
        f"{_method(recipe)} of `{base}`{revision} on {', '.join(_data_names(recipe))}, prompt"
        f" format `{recipe.data.prompt_format}`.",
    ]
    if not is_hub_id(base):
        parts.append(f"The base is a folder named `{base}`: ask for it where you got this.")
    if "license" not in header or not header["license"]:
        parts.append("The base's files state no licence: read it on the model's page.")
    if merged:
        parts.append(
            f"The adapter is folded into its base, in {merged['dtype']}: on {merged['prompts']} its"
            f" logits differ by {merged['difference']:.3g} on average from the adapter's, which"
            f" moves the base's by {merged['effect']:.3g}; the most likely next token is the same"
            f" at {merged['same_top_token']:.1%} of the positions."
        )
    if rows:
        parts.append(f"| | |\n|---|---|\n{rows}\n\nLosses are on this run's own rows alone.")
    loading = _loading_adapter(recipe, base) if is_adapter else LOADING_MODEL
    loading = loading.replace("AutoModelForCausalLM", _auto_class(recipe))
    parts += [f"## Loading\n\n{loading}", f"## Serving\n\n{_serving(recipe, base, is_adapter)}"]
    return "\n\n".join(parts) + "\n"


def is_hub_id(name: str) -> bool:
    """Return whether a model's name is one that anybody can download by."""
    return "/" in name and bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def public_name(recipe: Recipe) -> str:
    """Return the base as others know it: its Hub id, or `./FOLDER`, which is nobody's Hub id."""
    name = recipe.model.name_or_path
    if is_hub_id(name):
        return name
    if is_packaged(name):
        return PACKAGED_HUB_ID
    folder = _folder(recipe)
    source = object_or_none(folder / SOURCE) if folder else None
    known = (source or {}).get("hub_id")
    return str(known) if known else f"./{Path(name).name}"


def licence_of(recipe: Recipe) -> str | None:
    """Return the licence that the base's own card states, if its files are here."""
    from huggingface_hub import metadata_load

    folder = _folder(recipe)
    try:
        stated = (metadata_load(folder / "README.md") if folder else None) or {}
    except (OSError, ValueError, yaml.YAMLError):
        stated = {}
    source = object_or_none(folder / SOURCE) if folder else None
    found = stated.get("license_name") or stated.get("license") or (source or {}).get("license")
    return str(found) if found else None


def _folder(recipe: Recipe) -> Path | None:
    try:
        return local_folder(recipe)
    except RecipesError:  # it was moved away since
        return None


def _data_names(recipe: Recipe) -> list[str]:
    """Return the sources of the data by name: a Hub id, or the last part of a path."""
    source = recipe.data.source
    entries = [source] if isinstance(source, str) else source
    names = [entry if isinstance(entry, str) else str(entry["source"]) for entry in entries]
    return [name if is_hub_id(name) else Path(name).name for name in names]


def _method(recipe: Recipe) -> str:
    if recipe.lora is None:
        return "Full fine-tuning"
    kind = "QLoRA" if recipe.quantization else "LoRA"
    form = f" on the {recipe.base_format} base" if recipe.base_format else ""
    return f"{kind} (r {recipe.lora.get('r')}, alpha {recipe.lora.get('lora_alpha')}){form}"


LOADING_MODEL = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this folder>")
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
```"""


def _loading_adapter(recipe: Recipe, base: str) -> str:
    imports, prepare, arguments = "AutoModelForCausalLM, AutoTokenizer", "", f'"{base}"'
    if recipe.model.revision:
        arguments += f', revision="{recipe.model.revision}"'
    if recipe.model.dtype != "auto":
        arguments += f', dtype="{recipe.model.dtype}"'
    if recipe.quantization:
        imports += ", BitsAndBytesConfig"
        values = ", ".join(f"{key}={value!r}" for key, value in recipe.quantization.items())
        prepare = f"quantized = BitsAndBytesConfig({values})\n"
        arguments += ", quantization_config=quantized"
    name = _auto_class(recipe)
    return (
        f"```python\nfrom peft import PeftModel\nfrom transformers import {imports}\n\n{prepare}"
        f"base = {name}.from_pretrained({arguments})\n"
        'model = PeftModel.from_pretrained(base, "<this folder>")\n'
        'tokenizer = AutoTokenizer.from_pretrained("<this folder>")\n```'
    )


def _serving(recipe: Recipe, base: str, is_adapter: bool) -> str:
    rank = json.dumps((recipe.lora or {}).get("r", 16))
    name = recipe.name.lower()
    if is_adapter:
        vllm = (
            f"vllm serve {base} --enable-lora --max-lora-rank {rank}"
            f" --lora-modules {name}=<this folder>"
        )
        convert = f"python convert_lora_to_gguf.py <this folder> --outfile {name}.gguf"
        modelfile = f"FROM <{base} as GGUF>\nADAPTER ./{name}.gguf"
        note = (
            "The adapter was trained on the quantized base and belongs on it: on the base as"
            " published it answers differently.\n\n"
            if recipe.quantization
            else ""
        )
    else:
        vllm = f"vllm serve <this folder> --served-model-name {name}"
        convert = f"python convert_hf_to_gguf.py <this folder> --outfile {name}.gguf"
        modelfile, note = f"FROM ./{name}.gguf", ""
    return (
        f"{note}vLLM:\n\n```bash\n{vllm}\n```\n\nllama.cpp (scripts of its repository), then"
        f" Ollama with this Modelfile:\n\n```bash\n{convert}\nollama create {name} -f Modelfile\n"
        f"```\n\n```\n{modelfile}\n```"
    )


def _auto_class(recipe: Recipe) -> str:
    folder = _folder(recipe)
    config = object_or_none(folder / "config.json") if folder else None
    return auto_class(str((config or {}).get("model_type")))


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
