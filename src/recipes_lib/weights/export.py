"""Weights for use elsewhere: a folder to give away, with nothing of this machine, and the Hub."""

import json
import re
import secrets
import shutil
from pathlib import Path

from recipes_lib.core.errors import EnvironmentFault, RecipeError, one_line
from recipes_lib.core.files import publish, read_object
from recipes_lib.weights import runs
from recipes_lib.weights.card import is_hub_id, public_name, write_card

_WITH_PATHS = (runs.ADAPTER_CONFIG, "config.json", "tokenizer_config.json")
# an absolute one in JSON, and its last part; "/nothink" is a token of GLM-4.5
_PATH = re.compile(r'"~?/[^"\\]*/([^"/\\]+)/?"')


def export(trained: runs.TrainedRun, to: Path, merged: bool) -> list[Path]:
    """Write the run's weights, or `merged/`, into a new folder; return the files, by name."""
    name = trained.run.name
    recipe = trained.recipe
    target = to.expanduser().resolve()
    source = trained.weights
    record = None
    if merged:
        source = trained.merged
        record = runs.merge_record(trained)
        if not record:
            what = f"run '{name}' has no complete merged/ of its current adapter"
            raise RecipeError(what, f"recipes merge {name}")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        what = f"{to} is a file or is not empty, and nothing is overwritten"
        raise RecipeError(what, "give a new or empty folder")
    if not trained.full:
        runs.check_base_of(trained)
    runs.check_weights(trained.run, trained.full)

    base = public_name(recipe)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        scratch.mkdir()
        for file_name in runs.recorded_names(source):
            file = scratch / file_name
            if file_name != runs.RECORD:
                shutil.copyfile(source / file_name, file)
            if file_name not in _WITH_PATHS:
                continue
            values = read_object(file)
            if file_name == runs.ADAPTER_CONFIG:
                values["base_model_name_or_path"] = base
                values["revision"] = recipe.model.revision if is_hub_id(base) else None
            text = json.dumps(values, indent=2, ensure_ascii=False)
            file.write_text(_PATH.sub(r'"\1"', text) + "\n", encoding="utf-8")
        write_card(scratch, recipe, trained.run.read_state().get("summary") or {}, record)
        publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sorted(path for path in target.rglob("*") if path.is_file())


def push(folder: Path, repo: str, public: bool) -> str:
    """Upload an exported folder to OWNER/NAME, made if it does not exist; return its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    message = "Weights exported from a checked run"
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # the Hub's client has many types; each becomes one line
        what = f"could not push to '{repo}': {one_line(error)}"
        raise EnvironmentFault(what, "hf auth login, or check the name and the network") from error
    return str(address)
