"""The model card beside the final weights: what was trained on what, how to load it, and the numbers with their n."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from recipes_lib.recipe.recipe import Recipe

HUB_FORBIDS_PATHS = ("/", ".", "package:")


def write_card(folder: Path, recipe: Recipe, summary: dict[str, Any]) -> None:
    """Write README.md into the weights' folder.

    Args:
        folder: the weights.
        recipe: the resolved recipe; its name, sections and model go into the card.
        summary: rows, steps, losses, wall time and devices of the run; None where not measured.
    """
    (folder / "README.md").write_text(card_text(recipe, summary), encoding="utf-8")


def card_text(recipe: Recipe, summary: dict[str, Any]) -> str:
    """Return the card: YAML header for the Hub, then Markdown."""
    base = recipe.model.name_or_path
    adapter = recipe.lora is not None
    header: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation", "tags": ["sft", "trl", *recipe.run.tags]}
    if not base.startswith(HUB_FORBIDS_PATHS):
        header["base_model"] = base
    method = f"LoRA r={recipe.lora['r']}, alpha={recipe.lora.get('lora_alpha')}" if recipe.lora else "full fine-tuning"
    if recipe.quantization:
        method = f"QLoRA (4-bit base), {method.removeprefix('LoRA ')}"
    loading = (
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "<this folder>")'
        if adapter
        else 'model = AutoModelForCausalLM.from_pretrained("<this folder>")'
    )
    imports = "from transformers import AutoModelForCausalLM\n" + ("from peft import PeftModel\n" if adapter else "")
    rows = "\n".join(f"| {name} | {_shown(value)} |" for name, value in summary.items())
    source = recipe.data.source if isinstance(recipe.data.source, str) else "a mixture, see the recipe"
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {recipe.name}\n\n"
        f"{method} of `{base}` on `{source}`, prompt format `{recipe.data.prompt_format}`.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        f"Losses are on this run's own validation rows and say nothing about other data.\n\n"
        f"```python\n{imports}\n{loading}\n```\n\n## Recipe\n\n```yaml\n{yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)}```\n"
    )


def _shown(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
