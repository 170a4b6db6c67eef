"""The model card of weights, for PEFT and transformers alone and with nothing of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import HUB_ID, Recipe
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import object_or_none
from recipes_lib.data.sources import listed_sources
from recipes_lib.models.families import needs_of
from recipes_lib.models.packaged import SOURCE


def write_card(
    folder: Path, recipe: Recipe, summary: Mapping[str, Any], merged: Any = None
) -> None:
    """Write the model card as README.md; `merged` is merge.json of an adapter in its base."""
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
        title = name.replace("_", " ")
        if isinstance(value, int):
            numbers[title] = f"{value:,}"
        elif isinstance(value, float):
            numbers[title] = f"{value:,.4g}"
    template = Path(__file__).with_name("card.md.jinja").read_text("utf-8")
    blocks = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
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
