"""Facts of models that people fine-tune, so that a plan needs neither the model nor the Hub: the
numbers of a config.json, and where they were read.

They stand in `recipes/FOLDER/model.json` for the folder's model, and in `recipes/models.jsonl`, one
object a line, for others; also in a folder `recipes` of the working directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.json_files import object_or_none
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.models.shapes import ModelShape, shape_of_config

_FORM = 'facts of a model are {"names": [...], "source": "...", "config": {"model_type": ...}}'


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of a model without its files.

    Args:
        names: repositories that say the same in their config.json.
        source: where the numbers were read.
        license: as the model card names it; None where it was not looked up.
        gated: whether the Hub gives the files only after an agreement.
    """

    names: tuple[str, ...]
    source: str
    config: Mapping[str, Any]
    license: str | None = None
    gated: bool = False


def known_facts() -> dict[str, ModelFacts]:
    """Return repository name -> facts.

    Raises:
        RecipeError: a file of facts cannot be read.
    """
    folders = {folder.resolve(): None for folder in (project_root() / "recipes", Path("recipes"))}
    return {name: facts for folder in folders for facts in _facts(folder) for name in facts.names}


@lru_cache(maxsize=4)
def _facts(folder: Path) -> tuple[ModelFacts, ...]:
    return tuple(_read(folder))


def _read(folder: Path) -> Iterator[ModelFacts]:
    others = folder / "models.jsonl"
    texts = [(file, file.read_text("utf-8")) for file in sorted(folder.glob("*/model.json"))]
    if others.is_file():
        texts += [(others, line) for line in others.read_text("utf-8").splitlines() if line]
    for file, text in texts:
        try:
            found = json.loads(text)
            facts = ModelFacts(**{**found, "names": tuple(map(str, found["names"]))})
        except (ValueError, TypeError, LookupError):
            facts = None
        if facts is None or not isinstance(facts.config, dict) or not facts.source:
            raise RecipeError("cannot be read", _FORM, file=shown_path(file))
        yield facts


def named_shape(name: str) -> ModelShape | None:
    """Return the shape of a model by its facts or a local folder's config.json, else None."""
    try:
        facts = known_facts().get(name)
        local = object_or_none(Path(name) / "config.json") if Path(name).is_dir() else None
        if facts is not None and local is None:
            return shape_of_config(facts.config, name, facts.source)
        return shape_of_config(local, name) if local else None
    except RecipeError:
        return None
