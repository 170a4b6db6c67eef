"""The model card of weights, for PEFT and transformers alone and with nothing of this machine."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import DPO, HUB_ID, RECIPE_FILE, Recipe, load_recipe
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import object_or_none
from recipes_lib.data.sources import listed_sources
from recipes_lib.models.families import needs_of
from recipes_lib.models.packaged import SOURCE

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that its --max-lora-rank knows (vLLM 0.32)


def write_card(
    folder: Path, recipe: Recipe, summary: Mapping[str, Any], merged: Any = None
) -> None:
    """Write the model card as README.md; `merged` is merge.json of an adapter in its base."""
    import jinja2
    from huggingface_hub import ModelCardData

    base = public_name(recipe)
    lora = recipe.lora or {}
    rank = max(lora.get("r") or 8, *(lora.get("rank_pattern") or {}).values(), 0)
    max_lora_rank = next((known for known in VLLM_RANKS if known >= rank), None)  # None beyond
    stated = base_file(recipe, "README.md")
    licence = stated.get("license_name") or stated.get("license")
    data = _data_of(recipe)
    stages = _stages(recipe)
    is_adapter = recipe.lora is not None and merged is None
    header = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        datasets=[name for name in data if "/" in name] or None,
        library_name="peft" if is_adapter else "transformers",
        license=licence or base_file(recipe, SOURCE).get("license"),
        pipeline_tag="text-generation",
        tags=[*dict.fromkeys(stage.stage for stage in stages), "trl", *recipe.run.tags],
    )
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
        method=_method(recipe),
        earlier=[
            f"{stage.name}: {_method(stage)} of `{public_name(stage)}` on"
            f" {', '.join(_data_of(stage))}, prompt format `{stage.data.prompt_format}`"
            for stage in stages[:-1]
        ],
        base=base,
        is_on_hub=is_hub_id(base),
        data=data,
        merged=merged,
        max_lora_rank=max_lora_rank,
        numbers=numbers,
        is_adapter=is_adapter,
        has_embeddings=recipe.model.resize_embeddings or bool(lora.get("modules_to_save")),
        auto_class=needs_of(str(base_file(recipe, "config.json").get("model_type"))).auto_class,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _stages(recipe: Recipe) -> list[Recipe]:
    """Return the recipes of the runs that a recipe builds on, as far as they are here, and itself:
    a base that is a run's lies beside the run's recipe.
    """
    folder = Path(recipe.model.name_or_path).parent
    if (folder / "run.json").is_file() and (folder / RECIPE_FILE).is_file():
        with suppress(RecipesError):
            return _stages(load_recipe(folder / RECIPE_FILE)) + [recipe]
    return [recipe]


def _data_of(recipe: Recipe) -> list[str]:
    """Return the names of a recipe's sources, without folders of this machine."""
    names = [source.source for source in listed_sources(recipe.data)]
    return [name if is_hub_id(name) else Path(name).name for name in names]


def _method(recipe: Recipe) -> str:
    """Return how a recipe trains, in words."""
    method = "Full fine-tuning"
    lora = recipe.lora
    if lora is not None:
        kind = "QLoRA" if recipe.quantization else "LoRA"
        method = f"{kind} (r {lora.get('r')}, alpha {lora.get('lora_alpha')})"
        if recipe.base_format:
            method += f" on the {recipe.base_format} base"
    if recipe.stage != DPO:
        return method
    loss = recipe.train.get("loss_type", "sigmoid")
    return f"Preference tuning (DPO, loss {loss}, beta {recipe.train.get('beta', 0.1)}), {method}"


def is_hub_id(name: str) -> bool:
    """Return whether a model's name can be downloaded from the Hub."""
    return "/" in name and bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def public_name(recipe: Recipe) -> str:
    """Return the base's public name: its Hub id, or `./FOLDER`, which is not a Hub id."""
    name = recipe.model.name_or_path
    if is_hub_id(name):
        return name
    folder = Path(name)
    if (folder.parent / "run.json").is_file():  # a run's weights are known by its name
        folder = folder.parent
    return str(base_file(recipe, SOURCE).get("hub_id") or f"./{folder.name}")


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
