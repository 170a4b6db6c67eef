"""The model card beside the weights (card.md.jinja): what was trained on what, how to load and
serve it, and the numbers. It names nothing of the machine it was written on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import HUB_ID
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import object_or_none
from recipes_lib.models.families import auto_class
from recipes_lib.models.packaged import PACKAGED_HUB_ID, SOURCE, is_packaged

TEMPLATE = Path(__file__).with_name("card.md.jinja")
# What of a training's summary a card shows.
NUMBERS = (
    *("steps", "best_step", "training_rows", "validation_rows", "tokens"),
    *("first_training_loss", "last_training_loss", "first_validation_loss", "last_validation_loss"),
    *("seconds", "peak_memory_gib", "world_size"),
)


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
    import jinja2
    from huggingface_hub import ModelCardData

    base, data = public_name(recipe), _data_names(recipe)
    is_adapter = recipe.lora is not None and merged is None
    header = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        datasets=[name for name in data if "/" in name] or None,
        library_name="peft" if is_adapter else "transformers",
        license=_licence(recipe),
        pipeline_tag="text-generation",
        tags=["sft", "trl", *recipe.run.tags],
    )
    numbers = {
        name.replace("_", " "): f"{summary[name]:,}"
        if isinstance(summary[name], int)
        else f"{summary[name]:,.4g}"
        for name in NUMBERS
        if summary.get(name) is not None
    }
    config = _read(recipe, "config.json")
    blocks = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
    card = blocks.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        header=header,
        recipe=recipe,
        method=_method(recipe),
        base=base,
        is_on_hub=is_hub_id(base),
        data=data,
        merged=merged,
        numbers=numbers,
        is_adapter=is_adapter,
        auto_class=auto_class(str(config.get("model_type"))),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


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
    return str(_read(recipe, SOURCE).get("hub_id") or f"./{Path(name).name}")


def _licence(recipe: Recipe) -> str | None:
    """Return the licence that the base's own card states, if its files are here."""
    import yaml
    from huggingface_hub import metadata_load

    folder = _folder(recipe)
    try:
        stated = (metadata_load(folder / "README.md") if folder else None) or {}
    except (OSError, ValueError, yaml.YAMLError):
        stated = {}
    known = stated.get("license_name") or stated.get("license")
    return known or _read(recipe, SOURCE).get("license")


def _folder(recipe: Recipe) -> Path | None:
    try:
        return local_folder(recipe)
    except RecipesError:  # it was moved away since
        return None


def _read(recipe: Recipe, name: str) -> Mapping[str, Any]:
    """Return a JSON file of the base's folder; an empty one where it is not here."""
    folder = _folder(recipe)
    return (object_or_none(folder / name) if folder else None) or {}


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
    base = f" on the {recipe.base_format} base" if recipe.base_format else ""
    return f"{kind} (r {recipe.lora.get('r')}, alpha {recipe.lora.get('lora_alpha')}){base}"
