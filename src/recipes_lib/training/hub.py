"""An export sent to the Hugging Face Hub: only a checked one, private unless asked otherwise, never
from a checkpoint.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.training.export import export
from recipes_lib.training.trained import finished_run

if TYPE_CHECKING:
    from recipes_lib.config.recipe import Recipe
    from recipes_lib.core.run_directory import RunDirectory


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
        folder: an export.
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
    """Return where the weights of the finished run go (`train.push_to_hub`), or None where they
    stay here.

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
    """Export a finished run, whose weights have been checked, and upload the export; private.
    Return its address.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "export"
        export(finished_run(run), target, merged=False)
        return push(target, repo, public=False)
