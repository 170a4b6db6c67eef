"""The configurations of models that people fine-tune, so that a plan needs neither weights nor the
Hub: `recipes/FOLDER/model.json` for the folder's model, `recipes/models.jsonl`, one object a line,
for others; shipped ones, and those in a folder `recipes` of the working directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import object_or_none
from recipes_lib.core.project import project_root, shown_path

_FORM = 'a model is {"names": [...], "source": "...", "config": {"model_type": ...}}'


def known_configs() -> dict[str, Mapping[str, Any]]:
    """Return repository name -> content of its config.json.

    Raises:
        RecipeError: a file cannot be read.
    """
    configs: dict[str, Mapping[str, Any]] = {}
    for folder in (project_root() / "recipes", Path("recipes")):
        for file in (*sorted(folder.glob("*/model.json")), *folder.glob("models.jsonl")):
            text = file.read_text("utf-8")
            for line in [text] if file.suffix == ".json" else text.splitlines():
                try:
                    model = json.loads(line)
                    configs |= {name: dict(model["config"]) for name in model["names"]}
                except (ValueError, TypeError, LookupError):
                    raise RecipeError("cannot be read", _FORM, file=shown_path(file)) from None
    return configs


def known_config(name: str) -> Mapping[str, Any] | None:
    """Return the config.json of a local folder or of a known model, else None."""
    folder = Path(name)
    return object_or_none(folder / "config.json") if folder.is_dir() else known_configs().get(name)
