"""A folder to give away: a run's weights with all that is needed to use them by PEFT and
transformers alone, and nothing of this machine; it may be sent to the Hugging Face Hub, private
unless asked otherwise. Only files of known kinds are taken, never a pickle.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import EnvironmentFault, RecipeError, check_space, one_line
from recipes_lib.core.files import publish, read_object
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.weights.card import is_hub_id, public_name, write_card
from recipes_lib.weights.check import ADAPTER_CONFIG, RECORDED
from recipes_lib.weights.merge import RECORD, merge_record
from recipes_lib.weights.runs import TrainedRun, check_base_of, check_weights, finished_run

_WITH_PATHS = (ADAPTER_CONFIG, "config.json", "tokenizer_config.json")


def export(trained: TrainedRun, to: Path, merged: bool) -> list[Path]:
    """Write the run's weights into a new folder; return the files, by name.

    Args:
        to: must not exist, or be empty.
        merged: the adapter folded into its base instead of the adapter alone.

    Raises:
        RecipeError: the folder has something in it, there is no merged model, or the base is not
            the run's.
        EnvironmentFault: weights are missing or damaged, or the disk is too small.
    """
    name, target, record = trained.run.name, to.expanduser().resolve(), None
    if merged and trained.full:
        what = f"run '{name}' is a full fine-tuning: its model is whole already"
        raise RecipeError(what, f"recipes export {name} --to DIR")
    if merged and (record := merge_record(trained)) is None:
        what = f"run '{name}' has no merged/ of its present adapter that is whole"
        raise RecipeError(what, f"recipes merge {name}")
    if target.is_relative_to(trained.run.path.resolve()):
        raise RecipeError(f"{to} lies inside the run", "export into a folder of its own")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        what = "is a file" if target.is_file() else "is not empty, and nothing is overwritten"
        raise RecipeError(f"{to} {what}", "give a folder that does not exist yet")
    if not trained.full:
        check_base_of(trained)
    check_weights(trained)

    source = trained.merged if merged else trained.weights
    taken = {file for pattern in RECORDED for file in source.glob(pattern)} - {source / RECORD}
    target.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(file.stat().st_size for file in taken)
    check_space(target.parent, needed, "the export", ", or export to another disk")
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        scratch.mkdir()
        for file in taken:
            shutil.copyfile(file, scratch / file.name)
        _take_paths_out(scratch, trained.recipe)
        summary = trained.run.read_state().get("summary") or {}
        write_card(scratch, trained.recipe, summary, asdict(record) if record else None)
        (scratch / "recipe.yaml").write_text(portable_recipe(trained.recipe), encoding="utf-8")
        publish(scratch, target, replace=False)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sorted(path for path in target.rglob("*") if path.is_file())


def _take_paths_out(folder: Path, recipe: Recipe) -> None:
    """Rewrite the copies of settings without this machine's paths, and name the base as others know
    it.
    """
    base = public_name(recipe)
    for file in filter(Path.is_file, map(folder.joinpath, _WITH_PATHS)):
        values = without_paths(read_object(file))
        if file.name == ADAPTER_CONFIG:
            values["base_model_name_or_path"] = base
            values["revision"] = recipe.model.revision if is_hub_id(base) else None
        text = json.dumps(values, indent=2, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


def portable_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, its paths cut to their last part."""
    import yaml

    values = without_paths(recipe.to_dict())
    values["model"]["name_or_path"] = public_name(recipe)
    head = "# The recipe of this training, every value resolved; paths are cut to their last part."
    return f"{head}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"


def without_paths(value: Any) -> Any:
    """Return nested values with every absolute path cut to its last part.

    Example:
        >>> without_paths({"model": "/home/ada/models/tiny", "data": ["~/rows/a.jsonl", "b/c.csv"]})
        {'model': 'tiny', 'data': ['a.jsonl', 'b/c.csv']}
    """
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    is_path = isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value
    return Path(value).name if is_path else value


# ---- to the Hub ----


def check_repo(repo: str) -> None:
    """Refuse what cannot be pushed to, before anything is computed.

    Raises:
        RecipeError: not a repository's name.
        EnvironmentFault: offline.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        what = f"'{repo}' is not a repository's name"
        raise RecipeError(what, "it is OWNER/NAME, for example ada/my-first") from None
    if constants.HF_HUB_OFFLINE:
        raise EnvironmentFault("offline (HF_HUB_OFFLINE is set): nothing can be pushed to the Hub")


def push(folder: Path, repo: str, public: bool) -> str:
    """Upload an exported folder as it is and return its address.

    Args:
        repo: OWNER/NAME; made if it does not exist.
        public: whether a new repository can be read by everybody.

    Raises:
        EnvironmentFault: not logged in, not allowed, or no network; the export stays on the disk.
    """
    from huggingface_hub import HfApi

    api, message = HfApi(), "Weights exported from a checked run"
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # the Hub's client has many types; each becomes one line
        what = f"could not push to '{repo}': {one_line(error)}"
        raise EnvironmentFault(what, "hf auth login, or check the name and the network") from error
    return str(address)


def push_target(recipe: Recipe) -> str | None:
    """Return where a finished run's weights are pushed (`train.push_to_hub`), or None.

    Raises:
        RecipeError: no `train.hub_model_id`, or not a repository's name.
        EnvironmentFault: offline.
    """
    if not recipe.train.get("push_to_hub"):
        return None
    repo = recipe.train.get("hub_model_id")
    if not repo:
        what = "train.push_to_hub needs train.hub_model_id: OWNER/NAME"
        raise recipe.error("train.push_to_hub", what)
    check_repo(repo)
    return str(repo)


def push_finished_run(run: RunDirectory, repo: str) -> str:
    """Export a finished run and upload the export, private; return its address."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "export"
        export(finished_run(run), target, merged=False)
        return push(target, repo, public=False)
