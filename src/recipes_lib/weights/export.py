"""A folder to give away: a run's weights with all that is needed to use them, and nothing of this
machine; it may be sent to the Hugging Face Hub, private unless asked otherwise.

Only files of known kinds are taken, never a pickle. Paths are cut to their last part, and what is
written is searched for secrets before the folder gets its name.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import shutil
import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from recipes_lib.config.model_files import local_folder
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.atomic_files import publish
from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipesError
from recipes_lib.core.faults import check_space
from recipes_lib.core.json_files import read_object
from recipes_lib.core.redaction import holds_secret
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.weights.base import is_packaged
from recipes_lib.weights.card import is_hub_id, write_card
from recipes_lib.weights.finished_run import (
    TrainedRun,
    check_base_of,
    check_tensors,
    check_weights,
    finished_run,
)
from recipes_lib.weights.merge import merge_record, why_stale
from recipes_lib.weights.saved import RECORDED

# What a folder of weights may hold; everything else (training_args.bin, our own records) stays
# where it is.
TAKEN = (*RECORDED, "generation_config.json")
WRITTEN = (".md", ".yaml", ".json", ".jinja")
TERMS = re.compile(r"^(licen[sc]e|notice|use_policy|copying)([._-].*)?$", re.IGNORECASE)
COPIES = "base_license"
UNSEARCHED = {"tokenizer.json", "vocab.json"}  # pieces of words, megabytes of them


def export(trained: TrainedRun, to: Path, merged: bool) -> list[Path]:
    """Write the run's weights into a new folder; return the files, by name.

    Args:
        to: must not exist, or be empty.
        merged: the adapter folded into its base instead of the adapter alone.

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
    if not trained.full:
        check_base_of(trained)
    check_weights(trained)
    check_tensors(trained, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    taken = sorted({file for pattern in TAKEN for file in source.glob(pattern)})
    needed = sum(file.stat().st_size for file in taken)
    remedy = ", or export to another disk; nothing was written"
    check_space(target.parent, needed, "the export", remedy)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        scratch.mkdir()
        for file in taken:
            shutil.copyfile(file, scratch / file.name)
        _explain(scratch, trained, merged)
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
        name: dataclasses.replace(
            getattr(recipe, name),
            **{key: value for key, value in values[name].items() if isinstance(value, str)},
        )
        for name in ("model", "run", "launch")
    }
    paths = {key: values["data"][key] for key in ("source", "chat_template", "columns")}
    data = dataclasses.replace(recipe.data, **paths)
    return dataclasses.replace(
        recipe, **sections, data=data, train=values["train"], lora=values["lora"], as_written={}
    )


def refuse_secrets(folder: Path) -> None:
    """Refuse to give away a text file with what looks like a token in it.

    Raises:
        RecipesError: the file and the line, without the value.
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


def _source(trained: TrainedRun, merged: bool) -> Path:
    """Return `adapter/`, `model/` or an up-to-date `merged/`."""
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
    stale = why_stale(trained, record)
    if stale:
        raise RecipeError(
            f"merged/ of run '{name}' is out of date: {stale}", f"recipes merge {name}"
        )
    return trained.merged


def _explain(folder: Path, trained: TrainedRun, merged: bool) -> None:
    """Take this machine's paths out of the copies, and write card, recipe and NOTICE."""
    recipe = portable(trained.recipe)
    base = recipe.model.name_or_path
    for name in ("adapter_config.json", "config.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        values = read_object(file)
        if name == "adapter_config.json":
            values["base_model_name_or_path"] = base
            values["revision"] = recipe.model.revision if is_hub_id(base) else None
        templates = {key: values.pop(key) for key in ("chat_template",) if key in values}
        text = json.dumps(
            {**without_machine_paths(values), **templates}, indent=2, ensure_ascii=False
        )
        file.write_text(text + "\n", encoding="utf-8")
    state, record = trained.run.read_state(), merge_record(trained) if merged else None
    write_card(folder, recipe, state.get("summary") or {}, merged=record, here=trained.recipe)
    head = (
        "# The recipe this was trained with, every value resolved. Paths are cut to their last"
        " part.\n"
    )
    guard = state.get("guard", {}).items()
    versions = {key.partition(".")[2]: one for key, one in guard if key.startswith("version.")}
    if known := ", ".join(f"{name} {version}" for name, version in versions.items() if version):
        head += f"# Versions: {known}\n"
    (folder / "recipe.yaml").write_text(head + recipe.resolved_yaml(), encoding="utf-8")
    write_notice(folder, trained.recipe, base, holds_base=trained.full or merged)


def write_notice(folder: Path, recipe: Recipe, name: str, holds_base: bool) -> None:
    """Write NOTICE: whose model this was made from, under which terms, by the base's own files,
    which are copied into `base_license/`.

    Args:
        name: what to call the base.
        holds_base: whether the exported weights contain the base's.
    """
    try:
        base = local_folder(recipe)
    except RecipesError:
        base = None
    files = sorted(file for file in base.iterdir() if file.is_file()) if base else []
    terms = [file for file in files if TERMS.match(file.name)]
    for file in terms:
        (folder / COPIES).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / COPIES / file.name)
    revision = f", revision {recipe.model.revision}" if recipe.model.revision else ""
    licence = _stated_licence(base)
    contents = (
        "contain the base's weights, changed"
        if holds_base
        else "are a difference to the base's weights; they do not contain them"
    )
    lines = [
        f"Made from the base model {name}{revision}.",
        f"These weights {contents}.",
        f"Licence of the base, as its model card states it: {licence}."
        if licence
        else "The base's files on the training machine state no licence: read it on the model's"
        " page before you pass this on.",
    ]
    if terms:
        lines.append(f"Its own terms are in {COPIES}/: {', '.join(file.name for file in terms)}.")
    lines.append(
        "The licence of the training data is not covered here: see data.source in recipe.yaml."
    )
    (folder / "NOTICE").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _stated_licence(base: Path | None) -> str | None:
    from huggingface_hub import metadata_load

    try:
        card = (metadata_load(base / "README.md") if base else None) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return None
    found = card.get("license_name") or card.get("license")
    return str(found) if found else None


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
        raise RecipeError(
            f"'{repo}' is not a repository's name", "it is OWNER/NAME, for example ada/my-first"
        ) from None
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

    api = HfApi()
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Weights exported from a checked run"
        )
    except Exception as error:
        # the Hub client has many exception types; each becomes one line with the client's own words
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise EnvironmentFault(
            f"could not push to '{repo}': {lines[0]}",
            "hf auth login, or check the name and the network",
        ) from error
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
        raise recipe.error(
            "train.push_to_hub", "train.push_to_hub needs train.hub_model_id: OWNER/NAME"
        )
    check_repo(repo)
    return str(repo)


def push_finished_run(run: RunDirectory, repo: str) -> str:
    """Export a finished run and upload the export, private; return its address."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "export"
        export(finished_run(run), target, merged=False)
        return push(target, repo, public=False)
