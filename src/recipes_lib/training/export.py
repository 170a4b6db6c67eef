"""A folder to give away: the weights of a run with all that is needed to use them, and nothing of
the machine they came from.

Only files of known kinds are taken (safetensors, JSON, the tokenizer's, Markdown, YAML), never a
pickle. Paths of this machine are cut to their last part, and what is written is searched for
secrets before the folder gets its name.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import yaml

from recipes_lib.core.atomic_files import publish
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipesError
from recipes_lib.core.json_files import read_object
from recipes_lib.core.redaction import holds_secret
from recipes_lib.training import base_identity
from recipes_lib.training.adapters import check_space, merge_record, why_stale
from recipes_lib.training.base_notice import write_notice
from recipes_lib.training.card import is_hub_id, write_card
from recipes_lib.training.checkpoints import folder_size
from recipes_lib.training.packaged_models import is_packaged
from recipes_lib.training.trained import check_base_of, check_weights
from recipes_lib.training.weights_check import check_files

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe
    from recipes_lib.training.trained import TrainedRun

# What a folder of weights may hold; everything else (training_args.bin, our own records) stays
# where it is.
TAKEN = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
WRITTEN = (".md", ".yaml", ".json", ".jinja")
UNSEARCHED = {"tokenizer.json", "vocab.json"}  # pieces of words, megabytes of them


def export(trained: TrainedRun, to: Path, merged: bool) -> list[Path]:
    """Write the run's weights into a new folder.

    Args:
        trained: a finished run.
        to: the folder; it must not exist, or be empty.
        merged: the adapter folded into its base instead of the adapter alone.

    Returns:
        The files, by name.

    Raises:
        RecipeError: the folder has something in it, there is no merged model, or the base is not
            the run's.
        EnvironmentFault: weights are missing or truncated, or the disk is too small.
        RecipesError: tensors that are not finite, or what looks like a secret.
    """
    source = _source(trained, merged)
    to = to.expanduser()
    target = to.resolve()
    check_target(to, trained)
    _check_tensors(trained, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    check_space(target.parent, folder_size(source), "the export", ", or export to another disk")
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        scratch.mkdir()
        _fill(scratch, source, trained, merged)
        refuse_secrets(scratch)
        publish(scratch, target, replace=False)
    except OSError as error:
        raise EnvironmentFault(
            f"the export could not be written: {error}", "nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sorted(path for path in target.rglob("*") if path.is_file())


def check_target(to: Path, trained: TrainedRun) -> None:
    """Refuse a folder that has something in it, is a file, or lies inside the run.

    Raises:
        RecipeError: choose another.
    """
    target = to.resolve()
    if target.is_relative_to(trained.run.path.resolve()):
        raise RecipeError(f"{to} lies inside the run", "export into a folder of its own")
    if target.exists() and not target.is_dir():
        raise RecipeError(f"{to} is a file", "give a folder that does not exist yet")
    if target.is_dir() and any(target.iterdir()):
        raise RecipeError(
            f"{to} is not empty, and nothing is overwritten",
            "give a folder that does not exist yet",
        )


def without_machine_paths(value: Any) -> Any:
    """Return nested values with every absolute path cut to its last part.

    Example:
        >>> without_machine_paths({"model": "/home/ada/models/tiny", "data": ["rows/a.jsonl", "C:\\\\data\\\\b.csv"]})
        {'model': 'tiny', 'data': ['rows/a.jsonl', 'b.csv']}
    """  # noqa: E501
    if isinstance(value, dict):
        return {key: without_machine_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_machine_paths(item) for item in value]
    if not isinstance(value, str) or "\n" in value:
        return value
    if PurePosixPath(value).is_absolute() or value.startswith("~"):
        return PurePosixPath(value).name
    return PureWindowsPath(value).name if PureWindowsPath(value).drive else value


def portable(recipe: Recipe) -> Recipe:
    """Return the recipe without paths of this machine; a base that is a folder here becomes
    `./NAME`.
    """
    values = without_machine_paths(recipe.to_dict())
    base = recipe.model.name_or_path
    if not is_packaged(base) and not is_hub_id(base):
        values["model"]["name_or_path"] = f"./{Path(base).name}"
    sections = {
        name: dataclasses.replace(getattr(recipe, name), **_fields(values[name]))
        for name in ("model", "run", "launch")
    }
    data = dataclasses.replace(
        recipe.data, **{key: values["data"][key] for key in ("source", "chat_template", "columns")}
    )
    return dataclasses.replace(
        recipe, **sections, data=data, train=values["train"], lora=values["lora"]
    )


def refuse_secrets(folder: Path) -> None:
    """Refuse to give away a text file with what looks like a token in it; the value is not
    repeated.

    Raises:
        RecipesError: the file and the line.
    """
    for file in sorted(folder.rglob("*")):
        if file.suffix not in WRITTEN or file.name in UNSEARCHED:
            continue
        for number, line in enumerate(
            file.read_text(encoding="utf-8", errors="replace").split("\n"), 1
        ):
            if holds_secret(line):
                raise RecipesError(
                    f"{file.name}:{number}: this looks like a secret; nothing was exported",
                    "remove it from the recipe or the tokenizer",
                )


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _source(trained: TrainedRun, merged: bool) -> Path:
    """Return the folder to export from: `adapter/`, `model/` or an up-to-date `merged/`."""
    name = trained.run.name
    if not merged:
        return trained.weights
    if trained.full:
        raise RecipeError(
            f"run '{name}' is a full fine-tuning: its model is whole already",
            f"recipes export {name} --to DIR",
        )
    record = merge_record(trained)
    if record is None:
        raise RecipeError(f"run '{name}' has no merged/", f"recipes merge {name}")
    stale = why_stale(trained, record, contents=True)
    if stale:
        raise RecipeError(
            f"merged/ of run '{name}' is out of date: {stale}", f"recipes merge {name}"
        )
    return trained.merged


def _check_tensors(trained: TrainedRun, source: Path) -> None:
    """The weights are whole and finite, and an adapter's base is the one it was trained on."""
    if not trained.full:
        check_base_of(trained)
    check_weights(trained)
    base_identity.check_whole(source)
    full = trained.full or source == trained.merged
    check_files(
        source,
        full,
        base="" if full else base_identity.adapter_config(source)["base_model_name_or_path"],
    )


def _fill(folder: Path, source: Path, trained: TrainedRun, merged: bool) -> None:
    """Copy the weights and the tokenizer, and write what explains them."""
    for file in sorted({file for pattern in TAKEN for file in source.glob(pattern)}):
        shutil.copyfile(file, folder / file.name)
    recipe = portable(trained.recipe)
    for name in ("adapter_config.json", "config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _rewrite(folder / name, recipe)
    state, record = trained.run.read_state(), merge_record(trained) if merged else None
    write_card(folder, recipe, state.get("summary") or {}, merged=record)
    (folder / "recipe.yaml").write_text(_recipe_text(recipe, state), encoding="utf-8")
    write_notice(
        folder, trained.recipe, recipe.model.name_or_path, holds_base=trained.full or merged
    )


def _rewrite(file: Path, recipe: Recipe) -> None:
    """Take this machine's paths out of a JSON file, and name an adapter's base as the
    recipe does.
    """
    values = read_object(file)
    if file.name == "adapter_config.json":
        values["base_model_name_or_path"] = recipe.model.name_or_path
        values["revision"] = recipe.model.revision if is_hub_id(recipe.model.name_or_path) else None
    templates = {key: values.pop(key) for key in ("chat_template",) if key in values}
    cleaned = {**without_machine_paths(values), **templates}
    file.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _recipe_text(recipe: Recipe, state: dict[str, Any]) -> str:
    versions = {
        key.partition(".")[2]: value
        for key, value in state.get("guard", {}).items()
        if key.startswith("version.")
    }
    with_versions = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    head = (
        "# The recipe this was trained with, every value resolved. Paths are cut to their last"
        " part.\n"
    )
    head += f"# Versions: {with_versions}\n" if with_versions else ""
    return head + yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
