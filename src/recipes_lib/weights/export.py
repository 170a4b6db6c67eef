"""A folder to give away: a run's weights and a model card, for PEFT and transformers alone, with
nothing of this machine. Only files of known kinds are taken, never a pickle.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import HUB_ID
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipesError, one_line
from recipes_lib.core.files import object_or_none, publish, read_object
from recipes_lib.data.sources import listed_sources
from recipes_lib.models.families import auto_class
from recipes_lib.models.packaged import PACKAGED_HUB_ID, SOURCE, is_packaged
from recipes_lib.weights.check import ADAPTER_CONFIG, RECORDED
from recipes_lib.weights.runs import RECORD, TrainedRun, check_base_of, check_weights, merge_record

_WITH_PATHS = (ADAPTER_CONFIG, "config.json", "tokenizer_config.json")
# What of a training's summary a card shows.
NUMBERS = (
    *("steps", "best_step", "training_rows", "validation_rows", "tokens"),
    *("first_training_loss", "last_training_loss", "first_validation_loss", "last_validation_loss"),
    *("seconds", "peak_memory_gib", "world_size"),
)


def export(trained: TrainedRun, to: Path, merged: bool) -> list[Path]:
    """Write the run's weights, or `merged/`, into a new folder; return the files, by name."""
    name, target = trained.run.name, to.expanduser().resolve()
    record = merge_record(trained) if merged else None
    if merged and record is None:
        what = f"run '{name}' has no merged/ of its present adapter that is whole"
        raise RecipeError(what, f"recipes merge {name}")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        what = f"{to} is a file, or not empty, and nothing is overwritten"
        raise RecipeError(what, "give a folder that does not exist yet")
    if not trained.full:
        check_base_of(trained)
    check_weights(trained.run, trained.full)

    source, recipe, base = trained.weights, trained.recipe, public_name(trained.recipe)
    if record is not None:
        source = trained.merged
    taken = {file for pattern in RECORDED for file in source.glob(pattern)} - {source / RECORD}
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        scratch.mkdir()
        for file in taken:
            shutil.copyfile(file, scratch / file.name)
        for file in filter(Path.is_file, map(scratch.joinpath, _WITH_PATHS)):
            values = without_paths(read_object(file))
            if file.name == ADAPTER_CONFIG:
                values["base_model_name_or_path"] = base
                values["revision"] = recipe.model.revision if is_hub_id(base) else None
            text = json.dumps(values, indent=2, ensure_ascii=False)
            file.write_text(text + "\n", encoding="utf-8")
        summary = trained.run.read_state().get("summary") or {}
        write_card(scratch, recipe, summary, asdict(record) if record else None)
        publish(scratch, target, replace=False)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sorted(path for path in target.rglob("*") if path.is_file())


def without_paths(value: Any) -> Any:
    """Return nested values with every absolute path cut to its last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    is_path = isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value
    return Path(value).name if is_path else value


def write_card(
    folder: Path,
    recipe: Recipe,
    summary: Mapping[str, Any],
    merged: Mapping[str, Any] | None = None,
) -> None:
    """Write the model card as README.md: what was trained on what, how to use it, the numbers.

    Args:
        summary: rows, steps, losses and time of the run; None where not measured.
        merged: for an adapter folded into its base, `merge.MergeRecord`.
    """
    import jinja2
    from huggingface_hub import ModelCardData

    base, lora = public_name(recipe), recipe.lora
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
        method += f" on the {recipe.base_format} base" if recipe.base_format else ""
    numbers = {
        name.replace("_", " "): f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        for name in NUMBERS
        if (value := summary.get(name)) is not None
    }
    blocks = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
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
        auto_class=auto_class(str(base_file(recipe, "config.json").get("model_type"))),
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

    api, message = HfApi(), "Weights exported from a checked run"
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # the Hub's client has many types; each becomes one line
        what = f"could not push to '{repo}': {one_line(error)}"
        raise EnvironmentFault(what, "hf auth login, or check the name and the network") from error
    return str(address)
